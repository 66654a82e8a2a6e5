"""Where a weight is used as a weight: matmuls, table lookups, convolutions.

A matmul that contracts exactly the encoded axes runs on the packed kernel, whichever side the weight is on and
however it was transposed, reshaped or batched on the way. Otherwise the weight is decoded and the record says
why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stowax.pallas_kernels import kernel_name, matmul
from stowax.pallas_kernels.codecs import LayoutError, Packed

from . import compat
from .interpret import Interpreter, rule
from .program import is_packed


@rule("dot_general")
def _dot_general(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    side = 1 if is_packed(values[1]) else 0
    w, x = values[side], values[1 - side]
    x = run.array(x, eqn, "the other operand of the matmul is packed too")
    contract, batch = eqn.params["dimension_numbers"]
    inner = _atoms(w, contract[side])
    rows = _rows(w, _others(w.ndim, contract[side], batch[side]))
    reason = ""
    if not contracts_encoded(w, contract[side]):
        reason = "the matmul does not contract the axes it is encoded along"
    elif compat.is_sharded(eqn):
        reason = "the matmul has explicit shardings"
    if reason:
        run.note(w, eqn, "matmul", "decode", reason=reason, inner=inner, rows=rows)
        return _on_decoded(eqn, [w, x] if side == 0 else [x, w])
    how = ""
    if run.recorder:
        folded = jax.eval_shape(lambda x: fold_inputs(x, w, side, (contract, batch)), x)
        how = kernel_name(folded, w.folded(batch[side]))
    run.note(w, eqn, "matmul", how, inner=inner, rows=rows)
    aval: Any = eqn.outvars[0].aval
    call = _packed_dot(
        side,
        eqn.params["dimension_numbers"],
        eqn.params["precision"],
        eqn.params["preferred_element_type"],
        aval.shape,
        aval.dtype,
    )
    return [call(x, w)]


@functools.cache
def _packed_dot(side: int, numbers: Any, precision: Any, preferred: Any, shape: Any, dtype: Any):
    """A matmul site as one `jax.jit`: equal sites of a program are traced once."""

    def packed_dot(x: jax.Array, w: Packed) -> jax.Array:
        stored = w.folded(numbers[1][side])
        folded = fold_inputs(x, w, side, numbers)
        y = matmul(folded, stored, precision=precision, preferred_element_type=preferred)
        return unfold_outputs(y, x, w, side, numbers, shape).astype(dtype)

    return jax.jit(packed_dot)


def _on_decoded(eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """`eqn` on the decoded weight, which is decoded again for the backward pass instead of kept."""
    decode = lambda v: v.decode() if is_packed(v) else v
    return jax.checkpoint(lambda *args: compat.bind(eqn, [decode(a) for a in args]))(*values)


def contracts_encoded(w: Packed, dims: Iterable[int]) -> bool:
    """Whether contracting `dims` of `w` contracts its encoded axes and nothing else."""
    sizes, view = w.view.sizes, w.view
    encoded = {a for a in range(len(sizes)) if view.is_inner(a) and sizes[a] != 1}
    return set(_atoms(w, dims)) == encoded


def _atoms(w: Packed, dims: Iterable[int]) -> list[int]:
    return [a for dim in dims for a in w.view.sized(dim)]


def _rows(w: Packed, dims: Iterable[int]) -> list[int]:
    """Like `_atoms`, with those of size 1: a matrix with one output is a matrix."""
    return [a for dim in dims for a in w.view.dims[dim]]


def fold_inputs(x: jax.Array, w: Packed, side: int, numbers: Any) -> jax.Array:
    """`x` as ``[B, M, K]``, K in the order in which `w` (operand `side` of the dot) is encoded."""
    contract, batch = numbers[0][1 - side], numbers[1][1 - side]
    free = _others(x.ndim, contract, batch)
    atoms = _atoms(w, numbers[0][side])
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (batch, free)]
    x = x.transpose(*batch, *free, *contract)
    x = x.reshape(*sizes, *(w.view.sizes[a] for a in atoms))
    order = sorted(range(len(atoms)), key=lambda i: atoms[i])
    return x.transpose(0, 1, *(2 + i for i in order)).reshape(*sizes, -1)


def unfold_outputs(
    y: jax.Array, x: jax.Array, w: Packed, side: int, numbers: Any, shape: tuple[int, ...]
) -> jax.Array:
    """``[B, M, N]`` as the result of the original `dot_general`."""
    view, (contract, batch) = w.view, numbers
    x_free = _others(x.ndim, contract[1 - side], batch[1 - side])
    w_free = _others(w.ndim, contract[side], batch[side])
    front = {a for dim in batch[side] for a in view.dims[dim]}
    rows = [a for a in range(len(view.lead)) if a not in front]
    y = y.reshape(
        *(x.shape[i] for i in batch[1 - side]),
        *(x.shape[i] for i in x_free),
        *(view.lead[a] for a in rows),
    )
    split = len(batch[side]) + len(x_free)
    from_x = list(range(len(batch[side]), split))
    from_w = [split + rows.index(a) for dim in w_free for a in view.dims[dim] if a in rows]
    order = [*range(len(batch[side])), *(from_x + from_w if side == 1 else from_w + from_x)]
    rest = [i for i in range(y.ndim) if i not in order]  # stored axes of size 1
    return y.transpose(*order, *rest).reshape(shape)


def _others(ndim: int, *taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if all(i not in axes for axes in taken))


@rule("gather")
def _gather(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Rows of a table: the packed rows are gathered, and only they are ever decoded."""
    w, indices = values
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not is_packed(w):
        return run.decode(eqn, values, "it is an index")
    cut = {i for i in range(w.ndim) if sizes[i] != w.shape[i]}
    simple = (
        len(dims.start_index_map) == 1
        and not dims.operand_batching_dims
        and cut <= set(dims.start_index_map)
        and sizes[dims.start_index_map[0]] == 1
    )
    if not simple:
        return run.decode(eqn, values, "the gather takes more than whole rows along one axis")
    axis = dims.start_index_map[0]
    try:
        w.view.drop(axis)
    except LayoutError as error:
        return run.decode(eqn, values, str(error))
    whole = _atoms(w, _others(w.ndim, (axis,)))
    run.note(w, eqn, "gather", "gather packed rows", inner=whole, rows=_rows(w, (axis,)))
    index = indices[..., 0]
    rows = w.rows(axis, index, 0)
    if axis not in dims.collapsed_slice_dims:
        kept = rows.shape
        at = index.ndim + axis
        shape = (*kept[:at], 1, *kept[at:])
        rows = rows.expand(shape, [i for i in range(len(shape)) if i != at])
    out_aval: Any = eqn.outvars[0].aval
    out_dims = out_aval.ndim
    from_index = iter(range(index.ndim))
    from_rows = iter(range(index.ndim, out_dims))
    order = [next(from_rows if i in dims.offset_dims else from_index) for i in range(out_dims)]
    rows = rows.transpose(order)
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return [rows]
    valid = (index >= 0) & (index < w.shape[axis])
    spread = [i for i in range(out_dims) if i not in dims.offset_dims]
    valid = lax.broadcast_in_dim(valid, rows.shape, spread)
    fill = eqn.params["fill_value"]
    return [jnp.where(valid, rows.decode(), jnp.nan if fill is None else fill)]


@rule("conv_general_dilated")
def _conv(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    x, w = values
    if not is_packed(w):
        return run.decode(eqn, values, "it is the image of a convolution")
    x = run.array(x, eqn, "the image of the convolution is packed too")
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    inner = _atoms(w, _others(w.ndim, (out_axis,)))
    run.note(w, eqn, "conv", "xla: decode + conv", inner=inner, rows=_rows(w, (out_axis,)))
    return _on_decoded(eqn, [x, w])


@rule("ragged_dot_general")
def _ragged_dot(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    x, w, *sizes = values
    if not is_packed(w):
        return run.decode(eqn, values, "it is the ragged side of a grouped matmul")
    x = run.array(x, eqn, "the other operand of the matmul is packed too")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), _ = numbers.dot_dimension_numbers
    rows = _others(w.ndim, contract, numbers.rhs_group_dimensions)
    inner = _atoms(w, contract)
    run.note(w, eqn, "matmul", "xla: decode + ragged dot", inner=inner, rows=_rows(w, rows))
    return _on_decoded(eqn, [x, w, *sizes])
