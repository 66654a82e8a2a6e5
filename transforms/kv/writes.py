"""How a program updates a cache: which rows, at which positions.

`dynamic_update_slice`, scatters (`.at[].set`, a vmapped update, positions for each row of the batch), concatenation
(a cache that grows, one that rolls) all become a `Write`; so do one-hot updates (`onehot.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from .axes import Atom
from .defer import Deferral, labels_of, literal, make
from .evaluate import concrete
from .expr import Node, View, Write, is_node, is_rooted, shape_of


@dataclasses.dataclass(frozen=True, eq=False)
class Positions:
    """Token positions that an index array gives.

    Attributes:
      source: the index array, and what of it is meant, for comparing two updates.
      along: the dimension of the cache that has a row of positions for each entry (the batch); empty for none.
      contiguous: they are a start and the rows after it.
      drops: rows outside the cache are dropped; otherwise the window is moved inside.
    """

    source: tuple[Any, ...]
    along: tuple[int, ...]
    contiguous: bool
    drops: bool
    compute: Any

    def __call__(self) -> jax.Array:
        """``int32[T]``, or ``int32[B, T]``."""
        return self.compute()


def view_of(x: Node) -> View:
    if x.view is None:
        raise LayoutError("it is updated after arithmetic on it")
    return x.view


def written(eqn: compat.Eqn, values: Any, x: Node, write: Write, labels: Any = None) -> Node:
    view = view_of(x)
    if view.turned is not None:
        return _filled(eqn, values, x, write, view.turned)
    view = dataclasses.replace(view, writes=(*view.writes, write))
    return make(eqn, values, 0, labels or x.labels, view)


def updated(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Node:
    """`dynamic_update_slice`."""
    x, update, *starts = values
    if not is_rooted(x):
        raise LayoutError("a part of it is written into another array")
    if is_rooted(update):
        return _written_back(run, eqn, values)
    where = [
        None if n == whole else start for n, whole, start in zip(shape_of(update), x.shape, starts)
    ]
    write = Write("rows", labels_of(x), update, shape_of(update), tuple(where), view_of(x))
    return written(eqn, values, x, write)


def _written_back(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Node:
    """A part that was taken out, updated, and is put back where it came from."""
    x, update, *starts = values
    base, part = view_of(x), view_of(update)
    if base.cell is not part.cell or part.writes[: len(base.writes)] != base.writes:
        raise LayoutError("a part of another cache is written into it")
    fixed = [pair for pair in part.fixed if pair not in base.fixed]
    for dim, theirs, start in zip(labels_of(x), labels_of(update), starts):
        dim, got = run.axes.resolve(dim), run.axes.resolve(theirs)
        if dim == got:
            continue
        sub = got[0] if len(got) == 1 else None
        if sub is not None and len(dim) == 1 and sub.parent is dim[0]:
            ok = literal(start) == sub.start
        else:
            index = next((i for a, i in fixed if len(dim) == 1 and a is dim[0]), None)
            ok = not got and index is not None and run.same(index, start)
        if not ok:
            raise LayoutError("a part of it is written back elsewhere")
    view = dataclasses.replace(base, writes=part.writes)
    return make(eqn, values, 0, x.labels, view)


def scattered(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Node:
    """`scatter`: whole rows at positions, one for all or one for each row of the batch."""
    x, indices, update = values
    if not is_rooted(x):
        raise LayoutError("it is an index or an update of another array")
    p, d = eqn.params, eqn.params["dimension_numbers"]
    columns = {dim: c for c, dim in enumerate(d.scatter_dims_to_operand_dims)}
    index_shape = shape_of(indices)[:-1]
    window = [i for i in range(x.ndim) if i not in d.inserted_window_dims]
    window = [i for i in window if i not in d.operand_batching_dims]
    window_axis = dict(zip(window, d.update_window_dims))
    batch_axes = [i for i in range(len(shape_of(update))) if i not in d.update_window_dims]
    index_axis = dict(enumerate(batch_axes))  # axis of the indices -> axis of the updates
    if is_rooted(update):
        return _scattered_back(run, eqn, values, columns, window)
    from .paged import page_written

    if (found := page_written(run, eqn, values)) is not None:
        return found

    source: dict[int, int | None] = {}  # dim of x -> axis of the update
    taken: dict[int, int] = {}  # axis of the indices -> dim of x that it runs along
    for dim, axis in zip(d.operand_batching_dims, d.scatter_indices_batching_dims):
        source[dim], taken[axis] = index_axis[axis], dim
    token: int | None = None
    for dim in range(x.ndim):
        if dim in source:
            continue
        whole = dim in window and shape_of(update)[window_axis[dim]] == x.shape[dim]
        if whole:
            source[dim] = window_axis[dim]
            continue
        column = columns.get(dim)
        axis = None if column is None else runs_along(indices, column, x.shape[dim], index_shape)
        if axis is not None and dim in d.inserted_window_dims:
            source[dim], taken[axis] = index_axis[axis], dim
        elif token is None:
            token = dim
        else:
            raise LayoutError("it is scattered along two axes")
    if token is None:
        raise LayoutError("it is overwritten whole")
    free = [a for a in range(len(index_shape)) if a not in taken]
    rows = shape_of(update)[window_axis[token]] if token in window else None
    if len(free) > 1 or (free and rows not in (None, 1)):
        raise LayoutError("its positions have more than one axis")
    source[token] = window_axis[token] if rows is not None and not free else None
    if free:
        source[token] = index_axis[free[0]]
    drops = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    column = columns.get(token, 0)
    batch = sorted(taken)
    order = [*batch, *free]

    def positions() -> jax.Array:
        index = run.array(indices)[..., column].transpose(order)
        if not free:
            index = index[..., None] + jnp.arange(rows or 1, dtype=index.dtype)
        return index.astype(jnp.int32)

    def value() -> jax.Array:
        y = run.array(update)
        if free and rows == 1:
            y = jnp.squeeze(y, window_axis[token])
        gone = window_axis[token] if free and rows == 1 else None
        kept = [i for i in range(len(shape_of(update))) if i != gone]
        axes = [kept.index(s) for s in map(source.get, range(x.ndim)) if s is not None]
        y = y.transpose(axes)
        return jnp.expand_dims(y, token) if source[token] is None else y

    where: list[Any] = [None] * x.ndim
    where[token] = Positions(
        (indices, column, tuple(order), rows),
        tuple(taken[a] for a in batch),
        not free,
        drops,
        positions,
    )
    sizes = [1 if s is None else shape_of(update)[s] for s in map(source.get, range(x.ndim))]
    write = Write("rows", labels_of(x), value, tuple(sizes), tuple(where), view_of(x))
    return written(eqn, values, x, write)


def _scattered_back(run: Any, eqn: Any, values: Any, columns: dict[int, int], window: Any) -> Node:
    """``cache.at[i].set(part)`` with a part that was taken out at `i`."""
    x, indices, update = values
    base, part = view_of(x), view_of(update)
    if base.cell is not part.cell or part.writes[: len(base.writes)] != base.writes:
        raise LayoutError("a part of another cache is written into it")
    fixed = dict(part.fixed)
    for dim in range(x.ndim):
        if dim in window and dim not in columns:
            continue
        atoms = run.axes.resolve(labels_of(x)[dim])
        index = fixed.get(atoms[0]) if len(atoms) == 1 else None
        column = _column(indices, columns[dim])
        if index is None or not run.same(index, column):
            raise LayoutError("a part of it is written back elsewhere")
    return make(eqn, values, 0, x.labels, dataclasses.replace(base, writes=part.writes))


def _column(indices: Any, column: int) -> Any:
    """One index of a scatter that has no index axes, where it is known."""
    value = concrete(indices)
    if value is not None and value.ndim == 1:
        return int(value[column])
    from .defer import Scalar

    if shape_of(indices) != (1,):
        raise LayoutError("it is written back at more than one index")
    return Scalar(indices)


def runs_along(indices: Any, column: int, size: int, shape: tuple[int, ...]) -> int | None:
    """The axis of the index array along which a column counts 0, 1, ... `size` - 1."""
    if is_node(indices) and indices.op == "concatenate":
        parts, at = [], 0
        for part in indices.inputs:
            width = shape_of(part)[-1]
            if at <= column < at + width:
                parts = [part]
            at += width
        value = concrete(parts[0])
        value = None if value is None else np.broadcast_to(value, (*shape, value.shape[-1]))[..., 0]
    else:
        value = concrete(indices)
        value = None if value is None else value[..., column]
    if value is None:
        return None
    for axis, n in enumerate(shape):
        count = np.arange(n).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        if n == size and np.array_equal(value, np.broadcast_to(count, shape)):
            return axis
    return None


def concatenated(run: Deferral, eqn: compat.Eqn, values: list[Any], axis: int) -> Node:
    """A cache that grows (``concat([cache, new])``) or rolls (``concat([cache[n:], new])``)."""
    x = values[0]
    if not is_rooted(x) or len(values) != 2:
        raise LayoutError("something is put before it")
    rows, view = shape_of(values[1])[axis], view_of(x)
    dim = run.axes.resolve(labels_of(x)[axis])
    if len(dim) != 1 and x.shape[axis] != 1:
        raise LayoutError("it is concatenated along a merged axis")
    labels = list(labels_of(x))
    starts = tuple(rows if i == axis else None for i in range(x.ndim))
    sub = next((s for s in view.subs if dim and s is dim[0]), None)
    if sub is not None and sub.parent is not None:
        if sub.start != rows or sub.parent.size != sub.size + rows:
            raise LayoutError("it is shifted by another length than it grows by")
        labels[axis] = (sub.parent,)
        rest = dataclasses.replace(view, subs=tuple(s for s in view.subs if s is not sub))
        write = Write("roll", tuple(labels), values[1], shape_of(values[1]), starts, rest)
        done = dataclasses.replace(rest, writes=(*rest.writes, write))
        return make(eqn, values, 0, tuple(labels), done)
    grown = Atom(x.shape[axis] + rows, parent=dim[0] if dim else None)
    labels[axis] = (grown,)
    write = Write("grow", tuple(labels), values[1], shape_of(values[1]), starts, view, grown)
    return written(eqn, values, x, write, tuple(labels))


def turned(run: Deferral, eqn: compat.Eqn, values: list[Any], axis: int) -> Node | None:
    """``concat([cache[n:], cache[:n]])``: a rotation, of which a write of n rows at the end makes a rolling buffer."""
    if len(values) != 2 or not all(is_rooted(v) and v.view is not None for v in values):
        return None
    pieces = [_piece(v, axis) for v in values]
    if any(p is None for p in pieces):
        return None
    (high, by, above, rest), (low, start, size, other) = pieces  # pyright: ignore
    if high is not low or (start, size) != (0, by) or by + above != high.size:
        return None
    if not _same_view(rest, other):
        return None
    labels = list(labels_of(values[0]))
    labels[axis] = (Atom(high.size),)
    view = dataclasses.replace(rest, turned=(high, by))
    return make(eqn, values, 0, tuple(labels), view)


def _piece(x: Node, axis: int) -> tuple[Atom, int, int, View] | None:
    """The axis of which a slice was taken, its start and size, and the view without it."""
    view = view_of(x)
    for sub in view.subs:
        if labels_of(x)[axis] == (sub,) and sub.parent is not None:
            rest = tuple(s for s in view.subs if s is not sub)
            return sub.parent, sub.start, sub.size, dataclasses.replace(view, subs=rest)
    if view.fixed and x.shape[axis] == 1 and (start := literal(view.fixed[-1][1])) is not None:
        rest = dataclasses.replace(view, fixed=view.fixed[:-1])
        return view.fixed[-1][0], start, 1, rest
    return None


def _same_view(a: View, b: View) -> bool:
    alike = lambda x, y: len(x) == len(y) and all(p is q for p, q in zip(x, y))
    fixed = [tuple(p for pair in v.fixed for p in pair) for v in (a, b)]
    return (
        a.cell is b.cell and alike(a.subs, b.subs) and alike(a.writes, b.writes) and alike(*fixed)
    )


def _filled(eqn: compat.Eqn, values: Any, x: Node, write: Write, turn: tuple[Atom, int]) -> Node:
    """New rows in the place of those that a rotation brought from the beginning to the end."""
    view, (parent, by) = view_of(x), turn
    dims = [i for i, s in enumerate(write.starts) if s is not None]
    at = _constant(write.starts[dims[0]]) if len(dims) == 1 else None
    fits = at == parent.size - by and x.shape[dims[0]] == parent.size
    if write.kind != "rows" or not fits or write.sizes[dims[0]] != by:
        raise LayoutError(f"it is rolled by {by} rows, and other rows than those are written")
    labels = list(labels_of(x))
    labels[dims[0]] = (parent,)
    starts = tuple(by if i == dims[0] else None for i in range(x.ndim))
    view = dataclasses.replace(view, turned=None)
    write = Write("roll", tuple(labels), write.value, write.sizes, starts, view)
    view = dataclasses.replace(view, writes=(*view.writes, write))
    return make(eqn, values, 0, tuple(labels), view)


def _constant(start: Any) -> int | None:
    """Where rows are written, if it is known and the same for the whole batch."""
    if isinstance(start, Positions):
        value = concrete(start.source[0])
        known = value is not None and value.ndim == 1 and start.contiguous
        return int(value[start.source[1]]) if value is not None and known else None
    value = concrete(start)
    return int(value) if value is not None and value.ndim == 0 else None
