"""One-hot updates of a cache.

Three ways to write new rows at positions ``at`` by arithmetic, ``hot`` being ``arange(S) == at``, or its sum over
several new rows::

    where(hot, new, cache)      cache * (1 - hot) + hot * new      cache + hot * (new - cache)

The comparison says which axis is counted and at which positions; a product or matmul with the same `hot` is zero
everywhere else, so nothing but those rows changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import compat
from .defer import Deferral, labels_of
from .evaluate import Along, Coord, along, concrete, moved
from .expr import Node, Write, is_rooted, shape_of
from .writes import Positions, view_of, written

_SAME = ("convert_element_type", "copy", "copy_p", "stop_gradient")
_ANY, _ALL = ("reduce_sum", "reduce_max", "reduce_or"), ("reduce_min", "reduce_and")


@dataclasses.dataclass(frozen=True, eq=False)
class Hot:
    """Where a 0/1 array is 1.

    Attributes:
      dim: the dimension of the cache that is counted.
      at: the positions.
      coords: for each axis of `at`, the dimension of the cache that it runs along; the axis of new rows counts as one
        more dimension.
      flipped: it is 0 there, and 1 elsewhere.
    """

    dim: int
    at: Any
    coords: tuple[Coord, ...]
    flipped: bool = False

    def same(self, run: Deferral, other: Hot) -> bool:
        places = (self.dim, self.coords) == (other.dim, other.coords)
        return places and run.same(self.at, other.at)


def one_hot(run: Deferral, eqn: compat.Eqn, values: Sequence[Any]) -> Node | None:
    """The updated cache, if a `select_n` or an `add` is a one-hot update."""
    found = (_selected if eqn.primitive.name == "select_n" else _added)(run, values)
    if found is None:
        return None
    x, hot, new = found
    ndim = x.ndim
    batch = [c.dim for c in hot.coords if isinstance(c, Along) and c.dim < ndim]
    rows = [c for c in hot.coords if isinstance(c, Along) and c.dim == ndim]
    if len(batch) > 1 or (rows and not Masks(run, x).distinct(hot.at, hot.coords)):
        return None
    order = sorted(range(len(hot.coords)), key=lambda i: getattr(hot.coords[i], "dim", -1))

    def positions() -> jax.Array:
        at = run.array(hot.at).astype(jnp.int32).transpose(order)
        return at.reshape((x.shape[batch[0]], -1) if batch else (-1,))

    def value() -> jax.Array:
        at = jnp.clip(positions(), 0, x.shape[hot.dim] - 1)
        shape = [1] * ndim
        shape[hot.dim] = at.shape[-1]
        if batch:
            shape[batch[0]] = x.shape[batch[0]]
            at = at if batch[0] < hot.dim else at.T
        full = jnp.broadcast_to(run.array(new), x.shape).astype(x.dtype)
        return jnp.take_along_axis(full, at.reshape(shape), axis=hot.dim)

    starts: list[Any] = [None] * ndim
    starts[hot.dim] = Positions((hot.at, hot.coords), tuple(batch), False, True, positions)
    sizes = list(x.shape)
    sizes[hot.dim] = rows[0].size if rows else 1
    write = Write("rows", labels_of(x), value, tuple(sizes), tuple(starts), view_of(x))
    return written(eqn, values, x, write)


Parts = tuple[Node, Hot, Any]  # the cache, where it is written, what stands there


def _selected(run: Deferral, values: Sequence[Any]) -> Parts | None:
    """``where(hot, new, cache)``."""
    if len(values) != 3 or is_rooted(values[0]):
        return None
    x = next((v for v in values[1:] if is_rooted(v)), None)
    new = next((v for v in values[1:] if not is_rooted(v)), None)
    if x is None or new is None or x.view is None:
        return None
    hot = Masks(run, x).hot(values[0])
    return None if hot is None or hot.flipped != (values[2] is x) else (x, hot, new)


def _added(run: Deferral, values: Sequence[Any]) -> Parts | None:
    """The two sums."""
    for kept, change in (values, tuple(values)[::-1]):
        if is_rooted(kept):
            found = (_cleared if kept.view is None else _moved_to)(run, kept, change)
            if found is not None:
                return found
    return None


def _cleared(run: Deferral, kept: Node, change: Any) -> Parts | None:
    """``cache * (1 - hot) + hot * new``."""
    x, factor = _product(kept)
    if x is None or x.view is None or x.shape != kept.shape or is_rooted(change):
        return None
    masks = Masks(run, x)
    keep, hot = masks.hot(factor), masks.support(change)
    if keep is None or hot is None or not keep.flipped or not hot.same(run, keep):
        return None
    return x, hot, change


def _moved_to(run: Deferral, x: Node, change: Any) -> Parts | None:
    """``cache + hot * (new - cache)``."""
    difference, factor = _product(change)
    if difference is None or difference.op != "sub" or difference.inputs[1] is not x:
        return None
    new, hot = difference.inputs[0], Masks(run, x).hot(factor)
    return None if hot is None or hot.flipped or is_rooted(new) else (x, hot, new)


def _product(x: Any) -> tuple[Node | None, Any]:
    """The factors of a product: what depends on a cache, and what does not."""
    if not is_rooted(x) or x.op != "mul":
        return None, None
    a, b = x.inputs if is_rooted(x.inputs[0]) else x.inputs[::-1]
    return (None, None) if is_rooted(b) else (a, b)


class Masks:
    """Reads what arrays that go with the cache `x` are made of."""

    def __init__(self, run: Deferral, x: Node):
        self.run, self.rows = run, x.ndim
        self.all = [along(i, n, x.ndim + 1) for i, n in enumerate(x.shape)]

    def hot(self, x: Any, coords: Sequence[Coord] | None = None) -> Hot | None:
        """Where `x` is 1, if it is a one-hot mask, or the sum of several."""
        node, coords = self.run.made_by(x), self.fit(x, coords)
        if node is None:
            return None
        inner = moved(node, coords)
        if inner is not None:
            return self.hot(node.inputs[0], inner)
        if node.op in _SAME:
            return self.hot(node.inputs[0], coords)
        if node.op == "not" or (node.op == "sub" and _is_one(node.inputs[0])):
            found = self.hot(node.inputs[-1], coords)
            return None if found is None else dataclasses.replace(found, flipped=not found.flipped)
        if node.op in _ANY + _ALL:
            inner = self.summed(shape_of(node.inputs[0]), node.eqn.params["axes"], coords)  # pyright: ignore
            found = None if inner is None else self.hot(node.inputs[0], inner)
            return found if found is not None and found.flipped == (node.op in _ALL) else None
        return self.compared(node, coords) if node.op in ("eq", "ne") else None

    def support(self, x: Any, coords: Sequence[Coord] | None = None) -> Hot | None:
        """Where `x` may be other than 0: a mask times something."""
        node, coords = self.run.made_by(x), self.fit(x, coords)
        if node is None:
            return None
        inner = moved(node, coords)
        if inner is not None:
            return self.support(node.inputs[0], inner)
        if node.op in _SAME:
            return self.support(node.inputs[0], coords)
        if node.op == "mul":
            found = [self.hot(v, coords) for v in node.inputs]
        elif node.op == "dot_general":
            inputs = [self.factor(node, side, coords) for side in (0, 1)]
            found = [self.hot(v, c) for v, c in zip(node.inputs, inputs) if c is not None]
        else:
            return None
        return next((h for h in found if h is not None and not h.flipped), None)

    def fit(self, x: Any, coords: Sequence[Coord] | None) -> list[Coord]:
        """Coordinates in an operand, whose axes of size 1 are broadcast."""
        coords = self.all if coords is None else coords
        return [None if n == 1 else c for n, c in zip(shape_of(x), coords)]

    def summed(self, shape: Any, axes: Any, coords: Sequence[Coord]) -> list[Coord] | None:
        """Coordinates before a sum over one axis, that of the new rows."""
        if sum(shape[a] != 1 for a in axes) > 1 or any(
            isinstance(c, Along) and c.dim == self.rows for c in coords
        ):
            return None
        rest = iter(coords)
        rank = self.rows + 1
        return [along(self.rows, n, rank) if a in axes else next(rest) for a, n in enumerate(shape)]

    def factor(self, node: Node, side: int, coords: Sequence[Coord]) -> list[Coord] | None:
        """Coordinates in an operand of a matmul that contracts the new rows."""
        contract, batch = node.eqn.params["dimension_numbers"]  # pyright: ignore
        free = [
            [i for i in range(len(shape_of(v))) if i not in contract[s] and i not in batch[s]]
            for s, v in enumerate(node.inputs)
        ]
        start = len(batch[0]) + (len(free[0]) if side else 0)
        kept = dict(zip(batch[side], coords))
        kept |= dict(zip(free[side], coords[start : start + len(free[side])]))
        order = [i for i in range(len(shape_of(node.inputs[side]))) if i in kept]
        shape = shape_of(node.inputs[side])
        return self.summed(shape, contract[side], [kept[i] for i in order])

    def compared(self, node: Node, coords: Sequence[Coord]) -> Hot | None:
        """``iota == positions``."""
        for counted, at in (node.inputs, node.inputs[::-1]):
            for coord in _counted(counted, self.fit(counted, coords)):
                if coord.dim < self.rows and coord == self.all[coord.dim]:
                    at, where = self.bare(at, self.fit(at, coords))
                    varies = all(c is None or isinstance(c, Along) for c in where)
                    if varies and coord not in where:
                        return Hot(coord.dim, at, tuple(where), node.op == "ne")
        return None

    def bare(self, x: Any, coords: list[Coord]) -> tuple[Any, list[Coord]]:
        """An index before it was laid out."""
        node = self.run.made_by(x)
        inner = None if node is None else moved(node, coords)
        return (x, coords) if node is None or inner is None else self.bare(node.inputs[0], inner)

    def distinct(self, at: Any, coords: Sequence[Coord]) -> bool:
        """Whether positions are a start and the ones after it."""
        node = self.run.made_by(at)
        if node is None or node.op != "add":
            return False
        rows = [c for c in coords if isinstance(c, Along) and c.dim == self.rows]
        for count, start in (node.inputs, node.inputs[::-1]):
            if rows[0] in _counted(count, self.fit(count, coords)):
                where = self.bare(start, self.fit(start, coords))[1]
                return all(c is None or (isinstance(c, Along) and c != rows[0]) for c in where)
        return False


def _counted(x: Any, coords: Sequence[Coord]) -> list[Along]:
    """The one axis along which a constant counts 0, 1, ..."""
    value = concrete(x)
    if value is None or value.size == 1:
        return []
    for axis, n in enumerate(value.shape):
        count = np.arange(n).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
        coord = coords[axis]
        if isinstance(coord, Along) and np.array_equal(value, np.broadcast_to(count, value.shape)):
            return [coord]
    return []


def _is_one(x: Any) -> bool:
    value = concrete(x)
    return value is not None and value.size == 1 and value.item() == 1
