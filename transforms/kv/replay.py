"""Attention on the rows that a cache holds: the program's own equations, on other rows.

Every equation between the two matmuls runs as it was traced, in its own dtype, with the token axis replaced by
the slots of the cache. Masks and other index arithmetic are evaluated at the positions of the slots. A reduction
over tokens leaves empty slots out. Long queries are taken in blocks, so that scores of query length x cache length
never exist at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import compat
from .axes import Atom, Dim, Labels
from .defer import ELEMENTWISE
from .evaluate import Along, Coord, Evaluation
from .expr import Node, is_rooted, shape_of
from .match import Attention, Read

SCORE_BYTES = 64 << 20  # of scores in f32; more are made in blocks of queries


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What attention runs on.

    Attributes:
      values: for each stream ``[B, K, C, D]`` (K is 1 where all heads share the slots).
      positions: ``int32[B, K or 1, C]``; None where slot i holds position i.
      live: ``bool[B, K or 1, C]``; None for all.
    """

    values: Sequence[jax.Array]
    positions: jax.Array | None
    live: jax.Array | None


_IDENTITY = {
    "reduce_max": -math.inf, "reduce_min": math.inf, "reduce_sum": 0, "reduce_and": True, "reduce_or": False,
}  # fmt: skip


class Replay:
    """One evaluation of an attention; `block` restricts a query axis to ``(atom, start, size)``."""

    def __init__(self, run: Any, found: Attention, rows: Rows, block: Any = None, memo: Any = None):
        self.run, self.found, self.rows, self.block = run, found, rows, block
        self.slots = rows.values[0].shape[2]
        self.memo: dict[int, jax.Array] = dict(memo or {})
        self.reads = {id(r.node): (r, v) for r, v in zip(found.reads, rows.values)}
        self.axes = run.axes

    def size(self, atom: Atom) -> int:
        if atom is self.found.token:
            return self.slots
        if atom.base is not None and self.axes.resolve((atom.base,)) == (self.found.token,):
            return self.slots + sum(atom.extra)
        if self.block is not None and atom is self.block[0]:
            return self.block[2]
        return atom.size

    def shape(self, labels: Labels) -> tuple[int, ...]:
        return tuple(math.prod(map(self.size, dim)) for dim in labels)

    def labels(self, node: Node) -> Labels:
        assert node.labels is not None
        return self.axes.labels(node.labels)

    def __call__(self, node: Node) -> jax.Array:
        if id(node) not in self.memo:
            self.memo[id(node)] = self.compute(node)
        return self.memo[id(node)]

    def compute(self, node: Node) -> jax.Array:
        if id(node) in self.reads:
            return self.arrange(*self.reads[id(node)])
        assert node.eqn is not None
        labels = self.labels(node)
        shape = self.shape(labels)
        values = [self.operand(node, i) for i in range(len(node.inputs))]
        if node.op in _RESHAPED:
            return _RESHAPED[node.op](self, node, values, shape)
        if node.op in _IDENTITY:
            values[0] = self.masked(node.inputs[0], values[0], _IDENTITY[node.op])
        if node.op in ELEMENTWISE:
            values = [jnp.broadcast_to(v, _stretch(v, shape)) if np.ndim(v) else v for v in values]
        return compat.bind(node.eqn, values)[node.out]

    def operand(self, node: Node, i: int) -> Any:
        """An operand; where it does not depend on the caches, at the coordinates of the slots."""
        x = node.inputs[i]
        if is_rooted(x):
            return self(x)
        if not shape_of(x):
            return self.run.array(x)
        if node.op == "dot_general":
            return self.factor(node, i)
        labels = list(self.labels(node))
        if node.op == "concatenate":
            axis = node.eqn.params["dimension"]  # pyright: ignore
            labels[axis] = (Atom(shape_of(x)[axis]),)
            return jnp.broadcast_to(self.at(x, tuple(labels)), self.shape(tuple(labels)))
        return self.at(x, tuple(labels))

    def factor(self, node: Node, i: int) -> jax.Array:
        """The array that a cache is multiplied by; a block of it where queries are in blocks."""
        x = self.run.array(node.inputs[i])
        if self.block is None:
            return x
        contract, batch = node.eqn.params["dimension_numbers"]  # pyright: ignore
        free = [d for d in range(x.ndim) if d not in contract[i] and d not in batch[i]]
        labels = self.labels(node)
        at = len(labels) - len(free) if i == 1 else len(batch[i])
        dims: list[Dim] = [(Atom(n),) for n in x.shape]
        for d, dim in zip(free, labels[at : at + len(free)]):
            dims[d] = dim
        return self.at(x, tuple(dims))

    def at(self, x: Any, labels: Labels) -> jax.Array:
        """An array that does not depend on the caches, for axes `labels`."""
        coords = [None if n == 1 else self.coord(labels, d) for d, n in enumerate(shape_of(x))]
        out = Evaluation(len(labels), self.run.array)(x, coords)
        return out if np.ndim(out) else jnp.reshape(out, (1,) * len(labels))

    def coord(self, labels: Labels, d: int) -> Coord:
        """Where the entries of dimension `d` are in an array of the original size."""
        dim, token = labels[d], self.found.token
        moved = {token} if self.rows.positions is not None else set()
        if self.block is not None:
            moved.add(self.block[0])
        if not moved & set(dim):
            return Along(d, math.prod(map(self.size, dim)))
        index: Any = 0
        for k, atom in enumerate(dim):
            index = index * atom.size + self.entry(atom, k, len(dim))
        index = jnp.broadcast_to(index, index.shape[:2] + tuple(map(self.size, dim)))
        return self.spread(index.reshape(*index.shape[:2], -1), labels, d)

    def entry(self, atom: Atom, k: int, n: int) -> Any:
        """Indices along the `k`-th of `n` atoms of a dimension: ``[B, K, ...]``."""
        shape = [1] * k + [self.size(atom)] + [1] * (n - k - 1)
        if atom is self.found.token and self.rows.positions is not None:
            p = self.rows.positions
            return p.reshape(*p.shape[:2], *shape)
        count = jnp.arange(self.size(atom), dtype=jnp.int32)
        if self.block is not None and atom is self.block[0]:
            count = count + self.block[1]
        return count.reshape(1, 1, *shape)

    def spread(self, x: jax.Array, labels: Labels, d: int) -> jax.Array:
        """``[B, K, n]`` as an array that broadcasts against `labels`, n at dimension `d`."""
        read = self.found.reads[0]
        lead = read.lead
        x = x.reshape(*_lead_sizes(lead, read.batch, x.shape[:2]), x.shape[2])
        real = {a for a, n in zip(lead, x.shape) if n != 1}
        order, split, full, merged = [], [], [], []
        for i, dim in enumerate(labels):
            if i == d:
                order.append(len(lead))
                split.append(x.shape[-1])
                full.append(x.shape[-1])
                merged.append(x.shape[-1])
                continue
            atoms = dim if real & set(dim) else ()
            order += [lead.index(a) for a in atoms if a in real]
            split += [a.size if a in real else 1 for a in atoms]
            full += [self.size(a) for a in atoms]
            merged.append(math.prod(self.size(a) for a in atoms))
        rest = [i for i in range(x.ndim) if i not in order]
        x = x.transpose(*order, *rest).reshape(split)
        return jnp.broadcast_to(x, full).reshape(merged)

    def masked(self, source: Any, x: jax.Array, identity: Any) -> jax.Array:
        """`x` with the entries of empty slots replaced."""
        live = self.rows.live
        if live is None or not is_rooted(source):
            return x
        labels = self.labels(source)
        for d, dim in enumerate(labels):
            if dim == (self.found.token,):
                mask = self.spread(live, labels, d)
            elif len(dim) == 1 and dim[0].base is not None:
                lo, hi = dim[0].extra
                padded = jnp.pad(live, ((0, 0), (0, 0), (lo, hi)), constant_values=True)
                mask = self.spread(padded, labels, d)
            else:
                continue
            return jnp.where(mask, x, jnp.asarray(identity, x.dtype))
        return x

    def shift(self, dim: Dim, start: int) -> int:
        """How far columns that lie after the tokens are moved by there being other slots than tokens."""
        token, extra = self.found.token, self.slots - self.found.token.size
        if token in dim and self.rows.positions is not None:
            raise ValueError(
                f"{self.found.reads[0].cell.name}: the program takes a part of the scores along the tokens, so tokens "
                "can't be evicted; use a recipe without a selector"
            )
        after = len(dim) == 1 and dim[0].base is not None and start >= dim[0].extra[0] + token.size
        return extra if after else 0

    def arrange(self, read: Read, rows: jax.Array) -> jax.Array:
        """Rows ``[B, K, C, D]`` laid out as the program reads them."""
        labels = self.labels(read.node)
        lead, token = read.lead, self.found.token
        if rows.shape[1] != read.heads:
            rows = jnp.broadcast_to(rows, (rows.shape[0], read.heads, *rows.shape[2:]))
        x = rows.reshape(*(a.size for a in lead), rows.shape[2], *(a.size for a in read.inner))
        names = [*lead, token, *read.inner]
        order = [names.index(a) for dim in labels for a in dim if a in names]
        x = x.transpose(order)
        shape = [self.size(a) if a in names else 1 for dim in labels for a in dim]
        x = x.reshape(shape)
        full = [self.size(a) for dim in labels for a in dim]
        return jnp.broadcast_to(x, full).reshape(self.shape(labels))

    def result_labels(self) -> Labels:
        """Axes of the second matmul's result."""
        contract, batch = self.found.eqn.params["dimension_numbers"]
        x, y = (self.labels(v) for v in self.found.operands)
        free = [
            [i for i in range(len(z)) if i not in contract[s] and i not in batch[s]]
            for s, z in enumerate((x, y))
        ]
        return (*(x[i] for i in batch[0]), *(x[i] for i in free[0]), *(y[i] for i in free[1]))

    def result(self, statistic: Any = None) -> tuple[jax.Array, Any]:
        found = self.found
        values: list[Any] = [self(v) for v in found.operands]
        weights = self.masked(found.weights, values[found.side], 0)
        values[found.side] = weights
        out = compat.bind(found.eqn, values)[0]
        return out, None if statistic is None else statistic(*self.canonical(weights))

    def canonical(self, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights as ``f32[B, K, T, G, C]``, normalized over C, and the places of the queries."""
        found, read = self.found, self.found.reads[0]
        labels = self.labels(found.weights)
        atoms = [a for dim in labels for a in dim]
        queries = query_atoms(self)
        time = next((a for a in queries if a.size == found.rows and found.rows > 1), None)
        others = [a for a in queries if a is not time]
        x = weights.astype(jnp.float32).reshape([self.size(a) for a in atoms])
        order = [*read.lead, *([time] if time else []), *others, found.token]
        x = x.transpose([atoms.index(a) for a in order])
        t = self.size(time) if time else 1
        x = x.reshape(read.batch, read.heads, t, -1, self.slots)
        x = x / jnp.maximum(x.sum(-1, keepdims=True), 1e-30)
        start = self.block[1] if self.block is not None and self.block[0] is time else 0
        return x, start + jnp.arange(t, dtype=jnp.int32)

    def independent(self, atom: Atom) -> dict[int, jax.Array]:
        """The values that do not vary along a query axis."""

        def visit(node: Node) -> bool:
            inner = (
                [visit(v) for v in node.inputs if is_rooted(v)]
                if id(node) not in self.reads
                else []
            )
            free = all(inner) and all(atom not in dim for dim in self.labels(node))
            if free:
                self(node)
            return free

        for operand in self.found.operands:
            visit(operand)
        return self.memo


def _lead_sizes(lead: Dim, batch: int, have: tuple[int, ...]) -> list[int]:
    """Sizes of the lead axes of an array whose ``[B, K]`` are `have` (1 where shared)."""
    sizes, left = [], batch
    for atom in lead:
        if left > 1:
            sizes.append(atom.size if have[0] != 1 else 1)
            left //= atom.size
        else:
            sizes.append(atom.size if have[1] != 1 else 1)
    return sizes


def _stretch(x: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == np.ndim(x) else np.shape(x)


def _broadcast(run: Replay, node: Node, values: Any, shape: tuple[int, ...]) -> jax.Array:
    dims = node.eqn.params["broadcast_dimensions"]  # pyright: ignore
    return jax.lax.broadcast_in_dim(values[0], shape, dims)


def _reshape(run: Replay, node: Node, values: Any, shape: tuple[int, ...]) -> jax.Array:
    return values[0].reshape(shape)


def _cut(run: Replay, node: Node, values: Any, shape: tuple[int, ...]) -> jax.Array:
    """Slices and splits, which keep the token axis whole or drop extra columns."""
    x, source = values[0], node.inputs[0]
    p = node.eqn.params  # pyright: ignore
    if node.op == "split":
        starts = [0] * x.ndim
        starts[p["axis"]] = int(sum(p["sizes"][: node.out]))
        strides = (1,) * x.ndim
    else:
        starts = list(p["start_indices"])
        strides = p["strides"] or (1,) * x.ndim
    whole = [n == m for n, m in zip(source.shape, node.shape)]
    for d in range(x.ndim):
        if whole[d]:
            continue
        starts[d] += run.shift(run.labels(source)[d], starts[d])
        stop = starts[d] + (shape[d] - 1) * strides[d] + 1
        x = jax.lax.slice_in_dim(x, starts[d], stop, strides[d], axis=d)
    return x


_RESHAPED = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _cut,
    "split": _cut,
    "squeeze": _reshape,
}


def attend(run: Any, found: Attention, rows: Rows, statistic: Any = None) -> tuple[Any, Any]:
    """The result of the attention, and `statistic` of its weights summed over the queries.

    `statistic` takes weights ``f32[B, K, T, G, C]`` and the places ``int32[T]`` of their queries in this call.
    """
    whole = Replay(run, found, rows)
    return _in_blocks(whole, whole.result_labels(), lambda replay: replay.result(statistic))


def reduced(run: Any, found: Attention, rows: Rows, node: Node) -> jax.Array:
    """A value that the rows were reduced to: the denominator of a softmax, say."""
    whole = Replay(run, found, rows)
    return _in_blocks(whole, whole.labels(node), lambda replay: (replay(node), None))[0]


def _in_blocks(whole: Replay, labels: Labels, compute: Any) -> tuple[Any, Any]:
    """``compute(replay)``, in blocks of queries where there are too many."""
    block = _block(whole, labels)
    if block is None:
        return compute(whole)
    atom, size, axis = block
    memo = whole.independent(atom)
    return by_blocks(
        lambda start, n: compute(Replay(whole.run, whole.found, whole.rows, (atom, start, n), memo)),
        atom.size, size, axis,
    )  # fmt: skip


def by_blocks(part: Any, total: int, size: int, axis: int) -> tuple[Any, Any]:
    """``part(start, n)``: an array of `n` entries along `axis`, and what is to be added up. The two for all entries."""
    if size >= total:
        return part(jnp.int32(0), total)
    count = total // size
    starts = jnp.arange(count, dtype=jnp.int32) * size
    outs, stats = jax.lax.map(lambda s: part(s, size), starts)
    out = jnp.moveaxis(outs, 0, axis)
    out = out.reshape(*out.shape[:axis], count * size, *out.shape[axis + 2 :])
    stats = jax.tree.map(lambda x: x.sum(0), stats)
    if count * size < total:
        last, more = part(jnp.int32(count * size), total - count * size)
        out = jnp.concatenate([out, last], axis=axis)
        stats = jax.tree.map(jnp.add, stats, more)
    return out, stats


def _block(whole: Replay, result: Labels) -> tuple[Atom, int, int] | None:
    """The query axis to take in blocks, the size of a block, and its axis in the result."""
    total = 4 * math.prod(whole.shape(whole.labels(whole.found.weights)))
    queries = query_atoms(whole)
    if total <= SCORE_BYTES or not queries:
        return None
    atom = max(queries, key=lambda a: a.size)
    axis = next((i for i, dim in enumerate(result) if dim == (atom,)), None)
    size = max(1, atom.size * SCORE_BYTES // total)
    return None if axis is None or size >= atom.size else (atom, size, axis)


def query_atoms(replay: Replay) -> list[Atom]:
    """The axes of the weights that are no axis of a cache."""
    found = replay.found
    known = {found.token, *found.reads[0].lead}
    return [a for dim in replay.labels(found.weights) for a in dim if a not in known]
