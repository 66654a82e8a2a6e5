"""Proof that the masks of an attention are causal, with a window or without, where new rows fill an empty cache.

A mask is read as inequalities between places, each ``q * query + k * token + c >= 0``. What is traced is taken to be
what it is when the rows go to places 0 to T - 1: starts are 0, positions count up. `Structure.holds` asks that of the
values when the program runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .axes import Atom
from .evaluate import moves
from .expr import shape_of
from .masks import made
from .match import Attention
from .softmax import Softmax, number


class _Unproved(Exception):
    """A mask is made in a way that is not followed here."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Query t sees tokens 0 to t, or the last `window` of them.

    Attributes:
      starts: integers that must all be 0 for it.
      places: arrays that must count up from 0 along their last axis.
    """

    window: int | None
    starts: tuple[jax.Array, ...]
    places: tuple[jax.Array, ...]

    def holds(self) -> jax.Array:
        """``bool[]``."""
        zero = [(x == 0).all() for x in self.starts]
        up = [(x == jnp.arange(x.shape[-1], dtype=x.dtype)).all() for x in self.places]
        return jnp.stack([*zero, *up, jnp.bool_(True)]).all()


def structure(run: Any, found: Attention, softmax: Softmax, time: Atom) -> Structure | None:
    """The structure of the masks where new rows fill an empty cache; None where none is proved."""
    proof = _Proof(run, found, time)
    try:
        lines = [line for mask in softmax.masks for line in proof.mask(mask)]
    except _Unproved:
        return None
    if Line(1, -1, 0) not in lines:
        return None
    last = found.rows - 1
    windows = [line.c + 1 for line in lines if (line.q, line.k) == (-1, 1) and 0 <= line.c < last]
    others = [line for line in lines if (line.q, line.k) != (-1, 1) or line.c < 0]
    corners = [(0, 0), (last, 0), (last, last)]  # of what a causal mask shows
    if any(line.at(*corner) < 0 for line in others for corner in corners):
        return None
    starts, places = tuple(proof.starts.values()), tuple(proof.places.values())
    return Structure(min(windows, default=None), starts, places)


@dataclasses.dataclass(frozen=True)
class Line:
    """``q * query + k * token + c``, of the places of a query and a token."""

    q: int = 0
    k: int = 0
    c: int = 0

    __array_ufunc__ = None  # numpy leaves the arithmetic to this class

    def at(self, query: int, token: int) -> int:
        return self.q * query + self.k * token + self.c

    def __add__(self, other: Any) -> Line:
        x = _line(other)
        return Line(self.q + x.q, self.k + x.k, self.c + x.c)

    def __mul__(self, other: Any) -> Line:
        x, y = self, _line(other)
        if (y.q, y.k) != (0, 0):
            x, y = y, x
        if (y.q, y.k) != (0, 0):
            raise _Unproved
        return Line(x.q * y.c, x.k * y.c, x.c * y.c)

    def __neg__(self) -> Line:
        return self * -1

    def __sub__(self, other: Any) -> Line:
        return self + -_line(other)

    def __rsub__(self, other: Any) -> Line:
        return _line(other) - self

    __radd__, __rmul__ = __add__, __mul__


def _line(x: Any) -> Line:
    if isinstance(x, Line):
        return x
    if x is None:
        return Line()
    if x is ANY or np.size(x) != 1 or not np.issubdtype(np.asarray(x).dtype, np.integer):
        raise _Unproved
    return Line(c=int(np.asarray(x).item()))


class _Proof:
    """Reads masks; `starts` and `places` are what was taken for granted."""

    def __init__(self, run: Any, found: Attention, time: Atom):
        self.run, self.found, self.time = run, found, time
        self.rank = 1  # of coordinates, which are lines
        self.starts: dict[int, jax.Array] = {}
        self.places: dict[int, jax.Array] = {}

    def mask(self, mask: Any) -> list[Line]:
        """Where it shows a token."""
        labels = self.run.axes.labels(mask.node.labels)
        ends = {(self.time,): Line(q=1), (self.found.token,): Line(k=1)}
        coords = [
            ends.get(dim, ANY) if n != 1 else None for n, dim in zip(shape_of(mask.array), labels)
        ]
        return self.where(mask.array, coords, mask.shown)

    def where(self, x: Any, coords: Sequence[Any], wanted: Any) -> list[Line]:
        """Where an array of flags, or of two numbers, is `wanted`."""
        node = made(self.run, x)
        if node is None:
            if number(self.run, x) != wanted:
                raise _Unproved
            return []
        if (inner := self.inner(node, coords)) is not None:
            return self.where(node.inputs[0], inner, wanted)
        if node.op == "select_n":
            which, *cases = node.inputs
            same = [number(self.run, case) == wanted for case in cases]
            if len(same) != 2 or sum(same) != 1:
                raise _Unproved
            return self.where(which, self.operand(which, coords), same.index(True) == 1)
        if node.op == "not":
            return self.where(node.inputs[0], coords, not wanted)
        if node.op == ("and" if wanted else "or"):
            return [y for v in node.inputs for y in self.where(v, self.operand(v, coords), wanted)]
        if node.op not in _LESS:
            raise _Unproved
        x, y = (self.value(v, self.operand(v, coords)) for v in node.inputs)
        return [_LESS[node.op if wanted else _OPPOSITE[node.op]](x, y)]

    def value(self, x: Any, coords: Sequence[Any]) -> Line:
        """An array of integers at coordinates."""
        node = made(self.run, x)
        if node is None:
            return self.leaf(x, coords)
        if not jnp.issubdtype(node.dtype, jnp.integer):
            raise _Unproved
        if node.op == "iota":
            return _line(coords[node.eqn.params["dimension"]])  # pyright: ignore
        if (inner := self.inner(node, coords)) is not None:
            return self.value(node.inputs[0], inner)
        if node.op not in _SUMS:
            raise _Unproved
        return _SUMS[node.op](*(self.value(v, self.operand(v, coords)) for v in node.inputs))

    def inner(self, node: Any, coords: Sequence[Any]) -> Any:
        """The coordinates in the operand of what only moves entries or changes their type."""
        if node.op in _SAME:
            return coords
        if node.op in ("reshape", "dynamic_slice") and not _is_plain(node):
            raise _Unproved
        return moves(node, list(coords), self)  # pyright: ignore[reportArgumentType]

    def operand(self, x: Any, coords: Sequence[Any]) -> list[Any]:
        return [None if n == 1 else c for n, c in zip(shape_of(x), coords)]

    def leaf(self, x: Any, coords: Sequence[Any]) -> Line:
        """What is traced, as it is where the rows go to the first places; or a constant."""
        if not isinstance(x, Tracer):
            return _constant(np.asarray(x), coords)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise _Unproved
        if x.shape[-1:] == (self.found.rows,):
            self.places[id(x)] = x
            return _line(coords[-1])
        self.starts[id(x)] = x
        return Line()


class _Any:
    """A coordinate along another axis; nothing is known of what it indexes but what all entries have in common."""

    def _refuse(self, *_: Any) -> Any:
        raise _Unproved

    __mul__ = __radd__ = __rsub__ = _refuse


ANY = _Any()


def _is_plain(node: Any) -> bool:
    """Whether a reshape only adds or drops axes of size 1; a slice is not followed."""
    sized = lambda shape: [n for n in shape if n != 1]
    return node.op == "reshape" and sized(shape_of(node.inputs[0])) == sized(node.shape)


def _constant(x: np.ndarray, coords: Sequence[Any]) -> Line:
    """One number, or numbers at equal distances along one axis."""
    if not np.issubdtype(x.dtype, np.integer):
        raise _Unproved
    sized = [d for d, n in enumerate(x.shape) if n != 1]
    if len(sized) > 1:
        raise _Unproved
    flat = x.reshape(-1)
    step = int(flat[1] - flat[0]) if flat.size > 1 else 0
    if not flat.size or not np.array_equal(flat, flat[0] + step * np.arange(flat.size)):
        raise _Unproved
    return int(flat[0]) + (step * _line(coords[sized[0]]) if step else Line())


_SAME = (
    "convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "name", "sharding_constraint",
    "optimization_barrier",
)  # fmt: skip
_SUMS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
}
_LESS = {
    "le": lambda x, y: y - x,
    "lt": lambda x, y: y - x - 1,
    "ge": lambda x, y: x - y,
    "gt": lambda x, y: x - y - 1,
}
_OPPOSITE = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}
