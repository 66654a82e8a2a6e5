"""Paged pools: rows of a cache in pages, found by a block table.

A pool ``[P, page, K, D]`` and a table ``[B, n]`` are a cache ``[B, n * page, K, D]``: what is written to page
``table[b, i]`` at `r` has position ``i * page + r`` in row b. So a write through the table is a write of rows at those
positions, and a read of ``pool[table]`` is a read of the whole cache. Each row of the batch keeps tokens of its own:
pages that several rows share, or that change hands, are not followed.
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
from .axes import Atom, Dim, Labels
from .defer import Deferral, labels_of, make
from .evaluate import Along, Coord, Evaluation, along, concrete, moved
from .expr import Cell, Node, Write, shape_of
from .writes import Positions, view_of, written

_CLIPS = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


@dataclasses.dataclass(frozen=True, eq=False)
class Pages:
    """How a pool is a cache.

    Attributes:
      table: the block table ``[B, n]``.
      pool, page: the axes of the pool: pages, and rows of a page.
      batch, index, token: the axes of the cache: B, n, and the tokens ``n * page``.
    """

    table: Any
    pool: Atom
    page: Atom
    batch: Atom
    index: Atom
    token: Atom

    def labels(self, labels: Labels) -> Labels:
        """Axes of the pool as axes of the cache."""
        names: dict[Atom, Dim] = {self.pool: (self.batch,), self.page: (self.token,)}
        return tuple(names.get(dim[0], dim) if len(dim) == 1 else dim for dim in labels)


def pages_of(run: Deferral, cell: Cell, table: Any, pool: Dim, page: Dim) -> Pages:
    """The pages of a cell; a pool has one table."""
    if len(pool) != 1 or len(page) != 1:
        raise LayoutError("a paged pool has merged axes")
    if cell.pages is None:
        batch, n = shape_of(table)
        parts = Atom(n), page[0]
        token = Atom(n * page[0].size)
        run.axes.join(parts, token)
        cell.pages = Pages(table, pool[0], page[0], Atom(batch), parts[0], token)
    known: Pages = cell.pages
    if not run.same(known.table, table):
        raise LayoutError("a paged pool is written through one table and read through another")
    if (known.pool, known.page) != (pool[0], page[0]):
        raise LayoutError("a paged pool is read along another axis than it is written")
    return known


def looked_up(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Node | None:
    """``pool[table]``."""
    x, indices = values
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = shape_of(indices)
    cut = tuple(i for i in range(x.ndim) if sizes[i] != x.shape[i])
    plain = len(shape) == 3 and shape[2] == 1 and not d.operand_batching_dims
    if x.view is None or not plain or not cut == d.collapsed_slice_dims == d.start_index_map:
        return None
    where: list[Coord] = [along(i, n, 2) for i, n in enumerate(shape[:2])]
    table, coords = bare(run, indices, [*where, None])
    direct = all(c is None or isinstance(c, Along) for c in coords)
    if len(shape_of(table)) != 2 or not direct or list(coords) != where:
        return None
    axis = cut[0]
    cell: Cell = x.view.cell
    pages = pages_of(run, cell, table, *_pool_axes(run, cell, x, axis))
    rest = iter(dim for i, dim in enumerate(labels_of(x)) if i != axis)
    front = iter(((pages.batch,), (pages.index,)))
    labels = tuple(next(rest if i in d.offset_dims else front) for i in range(x.ndim + 1))
    return make(eqn, values, 0, labels, x.view)


def _pool_axes(run: Deferral, cell: Cell, x: Node, axis: int) -> tuple[Dim, Dim]:
    """The axes of pages and of their rows: known from a write, or else neighbours."""
    labels = run.axes.labels(labels_of(x))
    page = labels[axis + 1] if axis + 1 < x.ndim else ()
    return labels[axis], (cell.pages.page,) if cell.pages is not None else page


def page_written(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> Node | None:
    """``pool.at[table[b, i], r].set(new)``."""
    x, indices, update = values
    d = eqn.params["dimension_numbers"]
    dims = tuple(d.inserted_window_dims)
    if (
        len(dims) != 2
        or set(d.scatter_dims_to_operand_dims) != set(dims)
        or d.operand_batching_dims
    ):
        return None
    window = [i for i in range(x.ndim) if i not in dims]
    if any(shape_of(update)[a] != x.shape[i] for i, a in zip(window, d.update_window_dims)):
        return None
    columns = {dim: c for c, dim in enumerate(d.scatter_dims_to_operand_dims)}
    for pool, page in (dims, dims[::-1]):
        found = _lookup(run, indices, columns[pool])
        if found is not None:
            return _row_write(run, eqn, values, found, (pool, page), (columns[pool], columns[page]))
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """``table[b, i]`` in an index array.

    Attributes:
      table: the block table.
      batch: the axis of the index array along which b counts.
      index, column, coords: where i is: a column of an array, and the axes of the index array that its axes are.
      clips: whether i is moved inside of the table; otherwise what is outside is dropped.
    """

    table: Any
    batch: int
    index: Any
    column: int
    coords: tuple[Coord, ...]
    clips: bool


def _lookup(run: Deferral, indices: Any, column: int) -> Lookup | None:
    """The lookup that a column of indices comes from."""
    node = run.made_by(indices)
    rank = len(shape_of(indices)) - 1
    if node is None or node.op != "concatenate" or column >= len(node.inputs):
        return None
    if any(shape_of(v)[-1] != 1 for v in node.inputs):
        return None
    coords = [along(i, n, rank) for i, n in enumerate(shape_of(indices)[:-1])]
    found, coords = bare(run, node.inputs[column], [*coords, None])
    node = run.made_by(found)
    if node is None or node.op != "gather" or len(shape_of(node.inputs[0])) != 2:
        return None
    table, index = node.inputs
    p: Any = node.eqn.params  # pyright: ignore
    d, clips = p["dimension_numbers"], p["mode"] in _CLIPS
    if d.operand_batching_dims or tuple(p["slice_sizes"])[1] != 1 or 1 in d.offset_dims[1:]:
        return None
    outer = [c for i, c in enumerate(coords) if i not in d.offset_dims]
    if (
        d.start_index_map == d.collapsed_slice_dims == (1,)
        and p["slice_sizes"][0] == shape_of(table)[0]
    ):
        row = coords[d.offset_dims[0]]
        at = 0
    elif d.collapsed_slice_dims == (0, 1) and sorted(d.start_index_map) == [0, 1]:
        at = d.start_index_map.index(1)
        row = _row_count(run, index, 1 - at, outer, shape_of(table)[0])
    else:
        return None
    if not isinstance(row, Along) or row.size != shape_of(table)[0]:
        return None
    return Lookup(table, row.dim, index, at, tuple(outer), clips)


def _row_count(run: Deferral, index: Any, column: int, coords: Any, rows: int) -> Coord:
    """The axis along which a column of an index array counts the rows of the table."""
    from .writes import runs_along

    axis = runs_along(index, column, rows, shape_of(index)[:-1])
    return None if axis is None else coords[axis]


def _row_write(
    run: Deferral, eqn: compat.Eqn, values: list[Any], found: Lookup, dims: Any, columns: Any
) -> Node:
    x, indices, update = values
    d, shape = eqn.params["dimension_numbers"], shape_of(indices)[:-1]
    pool, page = dims
    free = [a for a in range(len(shape)) if a != found.batch and shape[a] != 1]
    if len(free) > 1:
        raise LayoutError("its positions have more than one axis")
    labels = run.axes.labels(labels_of(x))
    pages = pages_of(run, view_of(x).cell, found.table, labels[pool], labels[page])
    n, size = shape_of(found.table)[1], x.shape[page]
    drops = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP

    def positions() -> jax.Array:
        index = run.array(found.index)[..., found.column]
        i = Evaluation(len(shape), run.array).leaf(index, found.coords)
        at = run.array(indices)
        p, r = at[..., columns[0]], at[..., columns[1]]
        if found.clips:
            i = jnp.clip(i, 0, n - 1)
        if not drops:
            r = jnp.clip(r, 0, size - 1)
        inside = (i >= 0) & (i < n) & (r >= 0) & (r < size) & (p < x.shape[pool])
        position = jnp.where(inside, i * size + r, n * size).astype(jnp.int32)
        return jnp.moveaxis(position, found.batch, 0).reshape(shape[found.batch], -1)

    batch_axes = [i for i in range(len(shape_of(update))) if i not in d.update_window_dims]
    source: dict[int, int] = dict(
        zip((i for i in range(x.ndim) if i not in dims), d.update_window_dims)
    )
    source[pool] = batch_axes[found.batch]
    if free:
        source[page] = batch_axes[free[0]]
    gone = [a for a in batch_axes if a not in source.values()]

    def value() -> jax.Array:
        order = [source[i] for i in range(x.ndim) if i in source]
        y = run.array(update).transpose(*order, *gone).reshape([shape_of(update)[a] for a in order])
        return y if free else jnp.expand_dims(y, page)

    starts: list[Any] = [None] * x.ndim
    starts[page] = Positions((indices, *columns), (pool,), False, True, positions)
    sizes = [shape_of(update)[source[i]] if i in source else 1 for i in range(x.ndim)]
    write = Write("rows", pages.labels(labels), value, tuple(sizes), tuple(starts), view_of(x))
    return written(eqn, values, x, write)


def bare(run: Deferral, x: Any, coords: list[Coord]) -> tuple[Any, list[Coord]]:
    """An index before it was laid out, and before negative ones were counted from the end."""
    node = run.made_by(x)
    if node is None:
        return x, coords
    inner = moved(node, coords)
    if inner is not None:
        return bare(run, node.inputs[0], inner)
    if node.op == "convert_element_type":
        return bare(run, node.inputs[0], coords)
    if node.op == "select_n" and len(node.inputs) == 3 and _is_negative(run, *node.inputs[:2]):
        return bare(run, node.inputs[1], coords)
    return x, coords


def _is_negative(run: Deferral, mask: Any, x: Any) -> bool:
    """``mask`` is ``x < 0``."""
    node = run.made_by(mask)
    if node is None or node.op != "lt" or not run.same(node.inputs[0], x):
        return False
    zero = concrete(node.inputs[1])
    return zero is not None and not np.any(zero)
