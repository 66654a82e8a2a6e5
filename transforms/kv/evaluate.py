"""Index arithmetic at chosen coordinates: a mask at the positions that a cache holds.

`evaluate` computes a deferred array at coordinates: for each of its axes either `Along` an axis of the result,
entry 0, or an index array. Elementwise equations recurse, layout equations move coordinates, an iota is its
coordinate, and arrays are indexed. A mask made of iotas is so never made in full.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..core import compat
from .expr import Node, is_node, shape_of


@dataclasses.dataclass(frozen=True)
class Along:
    """All entries in order, along axis `dim` of the result."""

    dim: int
    size: int


Coord = Along | None | Any  # None is entry 0; anything else an integer array of the result's rank


def along(dim: int, size: int, rank: int) -> Coord:
    return None if size == 1 else Along(dim, size)


def index_array(coord: Coord, rank: int) -> Any:
    """The coordinate as an integer array that broadcasts against the result."""
    if coord is None:
        return np.zeros((1,) * rank, np.int32)
    if isinstance(coord, Along):
        shape = [coord.size if d == coord.dim else 1 for d in range(rank)]
        return np.arange(coord.size, dtype=np.int32).reshape(shape)
    return coord


class Evaluation:
    """Values at coordinates of a result with `rank` axes; `array` runs what is deferred."""

    def __init__(self, rank: int, array: Callable[[Any], jax.Array]):
        self.rank, self.array = rank, array

    def __call__(self, x: Any, coords: Sequence[Coord]) -> jax.Array:
        if not is_node(x):
            return self.leaf(x, coords)
        if x.op in SPECIAL:
            return SPECIAL[x.op](self, x, coords)
        moved = moves(x, coords, self)
        if moved is not None:
            return self(x.inputs[0], moved)
        if any(len(shape_of(v)) not in (0, x.ndim) for v in x.inputs) or x.op == "concatenate":
            return self.leaf(self.array(x), coords)
        values = [
            self(v, _of_operand(v, coords)) if shape_of(v) else self.array(v) for v in x.inputs
        ]
        sized = [bool(shape_of(v)) for v in x.inputs]
        values = [
            jnp.reshape(v, (1,) * self.rank) if s and not np.ndim(v) else v
            for v, s in zip(values, sized)
        ]
        return _bind(x.eqn, values)

    def leaf(self, x: Any, coords: Sequence[Coord]) -> jax.Array:
        """An array, indexed; only transposed where every coordinate is a whole axis."""
        x = jnp.asarray(x)
        if any(c is not None and not isinstance(c, Along) for c in coords):
            index = tuple(index_array(c, self.rank) for c in coords)
            return x.at[index].get(mode="clip") if coords else x
        for d, coord in enumerate(coords):
            if coord is None and x.shape[d] != 1:
                x = jax.lax.slice_in_dim(x, 0, 1, axis=d)
        dims = [c.dim for c in coords if c is not None]
        kept = x.reshape([c.size for c in coords if c is not None])
        kept = kept.transpose(np.argsort(dims)) if dims else kept
        shape = [1] * self.rank
        for c in coords:
            if c is not None:
                shape[c.dim] = c.size
        return kept.reshape(shape) if coords else x

    def iota(self, x: Node, coords: Sequence[Coord]) -> jax.Array:
        assert x.eqn is not None
        coord = coords[x.eqn.params["dimension"]]
        return jnp.asarray(index_array(coord, self.rank)).astype(x.dtype)

    def start(self, x: Any, last: int) -> Any:
        """A computed start of a slice, moved to where the slice fits."""
        return jnp.clip(jnp.asarray(self.array(x)), 0, last)


def _of_operand(x: Any, coords: Sequence[Coord]) -> list[Coord]:
    """The coordinates in an operand, whose axes may be of size 1."""
    return [None if n == 1 else c for n, c in zip(shape_of(x), coords)]


SPECIAL: dict[str, Any] = {"iota": Evaluation.iota}


def moves(x: Node, coords: Sequence[Coord], run: Evaluation) -> list[Coord] | None:
    """For a layout equation, the coordinates in its operand."""
    assert x.eqn is not None
    move = _MOVES.get(x.op)
    return None if move is None else move(x, list(coords), run)


def _transpose(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    out: list[Coord] = [None] * len(coords)
    for i, p in enumerate(x.eqn.params["permutation"]):  # pyright: ignore
        out[p] = coords[i]
    return out


def _broadcast(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    shape = shape_of(x.inputs[0])
    dims = x.eqn.params["broadcast_dimensions"]  # pyright: ignore
    return [None if shape[i] == 1 else coords[d] for i, d in enumerate(dims)]


def _reshape(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    old, new = shape_of(x.inputs[0]), x.shape
    out: list[Coord] = []
    i = j = 0
    while i < len(old):
        if old[i] == 1:
            out.append(None)
            i += 1
            continue
        a, b = [i], []
        have, want = old[i], 1
        while want != have:
            if want < have:
                b.append(j)
                want *= new[j]
                j += 1
            else:
                a.append(a[-1] + 1)
                have *= old[a[-1]]
        sized = [d for d in b if new[d] != 1]
        if len(a) == 1 and len(sized) == 1:
            out.append(coords[sized[0]])
        else:
            flat: Any = 0
            for d in b:
                flat = flat * new[d] + index_array(coords[d], run.rank)
            stride = have
            for d in a:
                stride //= old[d]
                out.append(flat // stride % old[d])
        i = a[-1] + 1
    return out


def _squeeze(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    n = len(shape_of(x.inputs[0]))
    gone = {d % n for d in x.eqn.params["dimensions"]}  # pyright: ignore
    kept = iter(coords)
    return [None if i in gone else next(kept) for i in range(n)]


def _shift(coord: Coord, start: Any, stride: int, size: int, whole: int, rank: int) -> Coord:
    if size == whole:
        return coord
    return index_array(coord, rank) * stride + start


def _slice(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    p, whole = x.eqn.params, shape_of(x.inputs[0])  # pyright: ignore
    strides = p["strides"] or (1,) * len(whole)
    starts = p["start_indices"]
    return [
        _shift(c, starts[i], strides[i], x.shape[i], whole[i], run.rank)
        for i, c in enumerate(coords)
    ]


def _split(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    p, whole = x.eqn.params, shape_of(x.inputs[0])  # pyright: ignore
    start = int(sum(p["sizes"][: x.out]))
    axis = p["axis"]
    out = list(coords)
    out[axis] = _shift(coords[axis], start, 1, x.shape[axis], whole[axis], run.rank)
    return out


def _dynamic_slice(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    whole = shape_of(x.inputs[0])
    starts = x.inputs[1:]
    out = []
    for i, c in enumerate(coords):
        start: Any = 0
        if x.shape[i] != whole[i]:
            start = run.start(starts[i], whole[i] - x.shape[i])
        out.append(_shift(c, start, 1, x.shape[i], whole[i], run.rank))
    return out


def _rev(x: Node, coords: list[Coord], run: Evaluation) -> list[Coord]:
    dims = x.eqn.params["dimensions"]  # pyright: ignore
    return [
        x.shape[i] - 1 - index_array(c, run.rank) if i in dims and c is not None else c
        for i, c in enumerate(coords)
    ]


_MOVES = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
}


def _bind(eqn: compat.Eqn | None, values: list[Any]) -> jax.Array:
    """An elementwise equation on operands that only broadcast against each other."""
    assert eqn is not None
    full = [v for v in values if np.ndim(v)]
    shape = np.broadcast_shapes(*(v.shape for v in full)) if full else ()
    values = [jnp.broadcast_to(v, shape) if np.ndim(v) else v for v in values]
    return compat.bind(eqn, values)[0]


def moved(x: Node, coords: Sequence[Coord]) -> list[Coord] | None:
    """The coordinates in the operand of a layout equation that needs no index to be computed."""
    if x.eqn is None or x.op == "dynamic_slice":
        return None
    rank = 1 + max([c.dim for c in coords if isinstance(c, Along)], default=0)
    return moves(x, coords, Evaluation(rank, jnp.asarray))


def concrete(x: Any) -> np.ndarray | None:
    """The value of an array that depends on nothing but constants."""
    if not is_node(x):
        return None if isinstance(x, Tracer) else np.asarray(x)
    if x.eqn is None or x.labels is not None or math.prod(x.shape) > 1 << 22:
        return None
    values = [concrete(v) for v in x.inputs]
    if any(v is None for v in values):
        return None
    with jax.ensure_compile_time_eval():
        out = compat.bind(x.eqn, [jnp.asarray(v) for v in values])
        return np.asarray(out[x.out])
