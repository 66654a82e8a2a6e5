"""Attention, found as dataflow.

A matmul whose two operands both depend on caches and that contracts their token axis is attention: what comes before
it on one side are weights over the rows of the caches (scores, masks, a softmax, or anything else), on the other side
the values. Nothing more is required of the form, because the equations between are run as they are, on the rows that
the compressed cache holds (`replay.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from .axes import Atom, Dim
from .defer import Deferral, labels_of, literal
from .expr import DONE, Cell, Node, View, Write, is_node, is_rooted, walk
from .spec import Stream
from .writes import Positions


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """A cache, or a part of it, as one attention reads it: one stream of rows ``[B, K, S, D]``.

    Attributes:
      node: the view of the cache.
      lead, inner: its batch and head axes, and the axes of a row, in the cache's order.
      batch: the size of the batch axis; the other lead axes are heads.
      part: which part of the cache it is: ``((axis, start, size), ...)``.
      write: its update; None where it is read before this call's update.
      role: "key", "value", or "both".
    """

    node: Node
    lead: Dim
    inner: Dim
    batch: int
    part: tuple[tuple[int, int, int], ...]
    write: Write | None
    role: str

    @property
    def cell(self) -> Cell:
        assert self.node.view is not None
        return self.node.view.cell

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.cell.name, self.part)

    @property
    def heads(self) -> int:
        return math.prod(a.size for a in self.lead) // max(1, self.batch)

    @property
    def width(self) -> int:
        return math.prod(a.size for a in self.inner)


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One attention over caches.

    Attributes:
      eqn: the matmul with the values.
      operands: of that matmul.
      side: which of them are the weights.
      token: the token axis.
      length: its size, the cache's length in tokens.
      reads: the streams.
      rows: new tokens among those it reads.
      index: the entry of a stacked cache, and the size of the stack; None where there is none.
      start: where the new rows go: a start, `Positions`, or the kind of a concatenation; None without new rows.
    """

    eqn: compat.Eqn
    operands: tuple[Node, Node]
    side: int
    token: Atom
    length: int
    reads: tuple[Read, ...]
    rows: int
    index: tuple[int, Any] | None
    start: Any

    @property
    def weights(self) -> Node:
        return self.operands[self.side]

    def describe(self) -> str:
        """The equations between the two matmuls, in order."""
        stop = {id(r.node) for r in self.reads}
        words, seen = [], set()
        todo = [self.weights]
        while todo:
            node = todo.pop()
            if id(node) in stop or id(node) in seen or node.eqn is None:
                continue
            seen.add(id(node))
            words.append(node.op)
            todo += [v for v in node.inputs if is_rooted(v)]
        skip = ("broadcast_in_dim", "reshape", "transpose", "stop_gradient", "convert_element_type")
        return " ".join(dict.fromkeys(w for w in reversed(words) if w not in skip))


def match(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Attention:
    """The attention that ends in `eqn`. Raises LayoutError with what is in the way."""
    contract, batch = eqn.params["dimension_numbers"]
    pairs = [
        (labels_of(values[0])[i], labels_of(values[1])[j])
        for i, j in zip(*contract)
        if values[0].shape[i] != 1
    ]
    if len(pairs) != 1:
        raise LayoutError("two caches are multiplied along other axes than the tokens")
    dim = run.axes.merge(*pairs[0])
    if len(dim) != 1 or dim[0].base is not None:
        raise LayoutError("the second matmul does not contract the token axis alone")
    token = dim[0]
    for i, j in zip(*batch):
        run.axes.merge(labels_of(values[0])[i], labels_of(values[1])[j])
    nodes = [reads_of(v) for v in values]
    side = 0 if len(walk(values[0])) >= len(walk(values[1])) else 1
    weights = {a for d in run.axes.labels(labels_of(values[side])) for a in d}
    streams = _streams(run, nodes, side)
    reads = [
        _read(run, node, role, token, weights, discriminating)
        for node, role, discriminating in streams
    ]
    start, rows = _all_positions(run, reads, token)
    first = reads[0]
    if any((r.batch, r.heads) != (first.batch, first.heads) for r in reads):
        raise LayoutError("keys and values have different heads")
    index = _stack_index(run, reads, streams)
    return Attention(
        eqn, (values[0], values[1]), side, token, token.size, tuple(reads), rows, index, start,
    )  # fmt: skip


def stored(run: Deferral, found: Attention, views: Sequence[View | None]) -> Attention:
    """An attention that reads caches before their update, with that update (in `views`). Raises LayoutError."""
    own = [_own_token(run, read, found.token) for read in found.reads]
    token = own[0]
    for other in own[1:]:
        run.axes.merge((token,), (other,))
    reads = []
    for read, after in zip(found.reads, views):
        before: Any = read.node.view
        later = () if after is None else tuple(w for w in after.writes if w not in before.writes)
        if DONE in later:
            raise LayoutError("an inner program updates it after attention has read it")
        node = dataclasses.replace(read.node, view=dataclasses.replace(before, writes=later))
        write = _relevant_write(run, node, token)
        if write is None:
            raise LayoutError("a cache is read that is not updated there in this call")
        reads.append(dataclasses.replace(read, write=write))
    start, rows = _all_positions(run, reads, token)
    if found.rows not in (0, rows):
        raise LayoutError("attention reads other new rows than are written afterwards")
    return dataclasses.replace(
        found, token=token, length=token.size, reads=tuple(reads), rows=rows, start=start
    )


def _own_token(run: Deferral, read: Read, token: Atom) -> Atom:
    """The token axis of the cache itself, where new rows were put behind it."""
    if read.write is None:
        return token
    grown = read.write.grown
    dim = run.axes.resolve((grown.parent,)) if grown is not None and grown.parent else ()
    if len(dim) != 1:
        raise LayoutError("the token axis is part of a merged axis")
    return dim[0]


def _all_positions(run: Deferral, reads: Sequence[Read], token: Atom) -> tuple[Any, int]:
    """Where the new rows of all streams go, and how many they are."""
    first, *rest = [_positions(run, read, token) for read in reads]
    if any((start is None) != (first[0] is None) for start, _ in rest):
        raise LayoutError("keys are read before they are updated and values after, or the reverse")
    if any(not same_start(run, start, first[0]) for start, _ in rest):
        raise LayoutError("keys and values are written at different positions")
    return first


def reads_of(x: Any) -> list[Node]:
    """The views of caches that `x` is made of."""
    found, todo, seen = [], [x], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or not is_rooted(node):
            continue
        seen.add(id(node))
        if node.view is not None:
            found.append(node)
        else:
            todo += [v for v in node.inputs if is_node(v)]
    return found


def _streams(
    run: Deferral, nodes: list[list[Node]], side: int
) -> list[tuple[Node, str, set[Atom]]]:
    """Each view that is read, its role, and the axes whose entry tells it from others of its cache."""
    roles: dict[int, str] = {}
    for s, found in enumerate(nodes):
        role = "key" if s == side else "value"
        for node in found:
            roles[id(node)] = role if roles.get(id(node), role) == role else "both"
    unique = {id(n): n for found in nodes for n in found}
    out = []
    for key, node in unique.items():
        others = [n for n in unique.values() if n is not node and n.view.cell is node.view.cell]
        telling: set[Atom] = set()
        for other in others:
            theirs = {run.axes.resolve((a,))[:1]: i for a, i in other.view.fixed}
            for atom, index in node.view.fixed:
                mine = run.axes.resolve((atom,))[:1]
                if mine in theirs and literal(theirs[mine]) != literal(index):
                    telling.add(atom)
        out.append((node, roles[key], telling))
    return out


def _read(
    run: Deferral, node: Node, role: str, token: Atom, weights: set[Atom], telling: set[Atom]
) -> Read:
    view = node.view
    assert view is not None
    cell = view.cell
    if view.turned is not None:
        raise LayoutError("it is read rolled, without new rows in the place of the oldest")
    here = {a for d in run.axes.labels(labels_of(node)) for a in d}
    if token not in here:
        raise LayoutError(f"{cell.name or 'a cache'} is read without its whole token axis")
    fixed = dict(view.fixed)
    lead: list[Dim] = []
    inner: list[Atom] = []
    part: list[tuple[int, int, int]] = []
    for axis, dim in enumerate(cell.rows):
        if not dim:
            lead.append(())
            continue
        atom = dim[0]
        if atom in fixed:
            if atom in telling:
                part.append((axis, literal(fixed[atom]) or 0, 1))
            continue
        sub = next((s for s in view.subs if s.parent is atom), None)
        if sub is not None:
            part.append((axis, sub.start, sub.size))
        atoms = run.axes.resolve((sub or atom,))
        if token in atoms or _is_grown(run, view.writes, token, atom):
            if token in atoms and len(atoms) != 1:
                raise LayoutError("the token axis is part of a merged axis")
            continue
        mine = tuple(a for a in atoms if a in weights)
        inner += [a for a in atoms if a not in weights]
        if mine:
            lead.append(mine)
    write = _relevant_write(run, node, token)
    lead = _batch_first(run, lead, write)
    batch = math.prod(a.size for a in lead[0]) if lead else 1
    flat = tuple(a for dim in lead for a in dim)
    return Read(node, flat, tuple(inner), batch, tuple(part), write, role)


def _batch_first(run: Deferral, lead: list[Dim], write: Write | None) -> list[Dim]:
    """The batch is the axis that has positions of its own; otherwise the cache's first."""
    own = [s.along for s in (write.starts if write else ()) if isinstance(s, Positions) and s.along]
    if not own:
        return lead
    assert write is not None
    dims = [run.axes.resolve(write.labels[d]) for d in own[0]]
    dims = [dim for dim in dims if dim]
    if len(dims) > 1 or (dims and dims[0] not in lead):
        raise LayoutError("positions of new rows differ along an axis that is not the batch")
    return dims + [dim for dim in lead if dim not in dims]


def _is_grown(run: Deferral, writes: tuple[Write, ...], token: Atom, atom: Atom) -> bool:
    """Whether `token` is an axis of the cache with new rows behind."""
    return any(
        w.grown is not None
        and w.grown.parent is not None
        and run.axes.resolve((w.grown,)) == (token,)
        and run.axes.resolve((w.grown.parent,)) == run.axes.resolve((atom,))
        for w in writes
    )


def _relevant_write(run: Deferral, node: Node, token: Atom) -> Write | None:
    view = node.view
    assert view is not None
    if view.done:
        raise LayoutError("it is read again after an inner program has updated it")
    found = [w for w in view.writes if _meets(run, w, node, token)]
    if len(found) > 1:
        raise LayoutError("a cache is updated more than once before it is read")
    return found[0] if found else None


def _meets(run: Deferral, write: Write, node: Node, token: Atom) -> bool:
    """Whether `write` touches what `node` reads."""
    view = node.view
    assert view is not None
    fixed = {run.axes.resolve((a,)): i for a, i in view.fixed}
    for atom, index in write.view.fixed:
        mine = fixed.get(run.axes.resolve((atom,)))
        if mine is not None and not _same_index(run, mine, index):
            return False
    for sub in write.view.subs:
        mine = next((s for s in view.subs if s.parent is sub.parent), None)
        if mine is not None and mine.start != sub.start:
            return False
    for dim, start, size in zip(write.labels, write.starts, write.sizes):
        atoms = run.axes.resolve(dim)
        if start is None or atoms in ((token,), ()):
            continue
        if atoms in fixed:
            if not _same_index(run, fixed[atoms], start):
                return False
            continue
        mine = next((s for s in view.subs if run.axes.resolve((s.parent,)) == atoms), None)
        at = literal(start)
        if mine is None or at is None:
            raise LayoutError("only a part of each row is updated")
        if mine.start >= at + size or mine.start + mine.size <= at:
            return False
        if mine.start < at or mine.start + mine.size > at + size:
            raise LayoutError("only a part of each row is updated")
    return True


def _same_index(run: Deferral, a: Any, b: Any) -> bool:
    if run.same(a, b):
        return True
    if literal(a) is not None and literal(b) is not None:
        return False
    raise LayoutError("it cannot be told whether an update and a read are of the same layer")


def _positions(run: Deferral, read: Read, token: Atom) -> tuple[Any, int]:
    """Where the new rows go, and how many they are."""
    write = read.write
    if write is None:
        return None, 0
    sizes = write.sizes
    for i, dim in enumerate(write.labels):
        atoms = run.axes.resolve(dim)
        if atoms == (token,):
            if write.kind != "rows":
                return write.kind, sizes[i]
            return 0 if write.starts[i] is None else write.starts[i], sizes[i]
    raise LayoutError("its update is not along the token axis")


def stream_key(read: Read) -> Stream:
    """The stream that is read."""
    part = tuple((axis + len(read.cell.stack), s, n) for axis, s, n in read.part)
    return Stream(read.cell.name, part, read.role, read.width, read.cell.dtype.name)


def same_start(run: Deferral, a: Any, b: Any) -> bool:
    if isinstance(a, Positions) and isinstance(b, Positions):
        return (len(a.along), a.contiguous, a.drops) == (
            len(b.along),
            b.contiguous,
            b.drops,
        ) and all(run.same(x, y) for x, y in zip(a.source, b.source))
    return run.same(a, b)


def _stack_index(
    run: Deferral, reads: list[Read], streams: list[tuple[Node, str, set[Atom]]]
) -> tuple[int, Any] | None:
    found: list[tuple[int, Any]] = []
    for node, _, telling in streams:
        view = node.view
        assert view is not None
        mine = [(a.size, i) for a, i in view.fixed if a not in telling]
        if len(mine) > 1:
            raise LayoutError("a cache is stacked along two axes")
        found.append(mine[0] if mine else (0, None))
    if any(size != found[0][0] for size, _ in found):
        raise LayoutError("keys and values are stacked differently")
    if found[0][0] == 0:
        return None
    if not all(run.same(i, found[0][1]) for _, i in found):
        raise LayoutError("keys and values are of different layers")
    return found[0]


def new_rows(run: Any, read: Read, token: Atom, value: jax.Array) -> jax.Array:
    """The new rows ``[B, K, T, D]`` of a stream, from what the program writes."""
    write, view = read.write, read.node.view
    assert view is not None
    assert write is not None
    fixed = {run.axes.resolve((a,)): i for a, i in view.fixed}
    shape: list[int] = []
    names: list[Any] = []
    for i, dim in enumerate(write.labels):
        atoms, n = run.axes.resolve(dim), value.shape[i]
        if atoms == (token,):
            shape.append(n)
            names.append(token)
        elif not atoms or (atoms in fixed and n == 1):
            shape.append(1)
            names.append(None)
        elif atoms in fixed:
            value = jax.lax.slice_in_dim(value, fixed[atoms], fixed[atoms] + 1, axis=i)
            shape.append(1)
            names.append(None)
        else:
            sub = next((s for s in view.subs if run.axes.resolve((s.parent,)) == atoms), None)
            if sub is not None:
                at = sub.start - (literal(write.starts[i]) or 0)
                value = jax.lax.slice_in_dim(value, at, at + sub.size, axis=i)
                atoms = run.axes.resolve((sub,))
            shape += [a.size for a in atoms]
            names += atoms
    value = value.reshape(shape)
    rest = [i for i, a in enumerate(names) if a is None]
    order = [names.index(a) for a in (*read.lead, token, *read.inner)]
    rows = value.transpose(*order, *rest)
    t = shape[names.index(token)]
    return rows.reshape(read.batch, read.heads, t, read.width)
