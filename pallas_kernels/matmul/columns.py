"""What the Hopper kernel for few rows copies of x: columns in the order of its codes, and sums of groups.

XLA takes three kernels for both, of more than a microsecond each; a Triton one does it at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import hopper, triton
from ..op import Op, one_by_one

WIDTH = 1024  # columns that a program takes, a group at least
BLOCK = 64  # of an operand's columns, in their own order


def columns_of(
    x: jax.Array, *, pieces: int, unit: float, group: int | None = None
) -> tuple[jax.Array, ...]:
    """``x[B, M, K]`` times `unit`, piece by piece, as ``[B * pieces, M, K / pieces]``, M padded to a multiple of 8.

    Args:
      pieces: equal parts of a row, each of blocks of 64 columns, which are put in the order of `permute_columns`.
      group: columns of a sum; None for no sums.

    Returns:
      Also, where there is a `group`, sums over each of the original x as two numbers, high and low,
      ``[2 B, M, groups]``: M padded as well, groups with zeros to a multiple of 64, in the same order.
    """
    return COLUMNS(x, pieces=pieces, unit=unit, group=group)


def is_summed(group: int) -> bool:
    """Whether the kernel makes sums of such groups."""
    return group & (group - 1) == 0 and group <= 2**13


def plain(x: jax.Array, *, pieces: int, unit: float, group: int | None) -> tuple[jax.Array, ...]:
    """What `columns_of` is."""
    b, m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -m % 8), (0, 0)))
    columns = hopper.permute_columns((x * unit).reshape(b, -1, pieces, k // pieces))
    columns = columns.swapaxes(1, 2).reshape(b * pieces, -1, k // pieces)
    if group is None:
        return (columns,)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -k % group)))
    sums = x.reshape(*x.shape[:2], -1, group).astype(jnp.float32).sum(-1)
    pair = hopper.permute_columns(jnp.stack(hopper.in_two(sums), 1).astype(x.dtype))
    return columns, pair.reshape(2 * b, x.shape[1], -1)


def kernel(
    x: jax.Array, *, pieces: int, unit: float, group: int | None, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """The same, a program for some columns of a row."""
    b, m, k = x.shape
    rows, width, reach = m + -m % 8, WIDTH, k
    shapes = [(b * pieces, rows, k // pieces)]
    if group is not None:
        width, reach = max(width, group), k + -k % (BLOCK * group)
        shapes.append((2 * b, rows, reach // group))
    out = triton.call(
        functools.partial(_body, x.shape, pieces, unit, width, group),
        grid=(b, rows, pl.cdiv(reach, width)),
        out=[jax.ShapeDtypeStruct((math.prod(shape),), x.dtype) for shape in shapes],
        aliases={},
        warps=4,
        interpret=interpret,
    )(x.reshape(-1))
    return tuple(flat.reshape(shape) for flat, shape in zip(out, shapes))


def _body(
    shape: tuple[int, ...],
    pieces: int,
    unit: float,
    width: int,
    group: int | None,
    x: Any,
    columns: Any,
    *sums: Any,
) -> None:
    (_, m, k), (entry, row, chunk) = shape, map(pl.program_id, range(3))
    rows, piece, start = m + -m % 8, k // pieces, (entry * m + row) * k
    c = chunk * width + lax.iota(jnp.int32, width)
    load = lambda at: triton.load(x.at[start + at], (c < k) & (row < m))
    # the bits of a column's place in a block: t t o q q e, from q q t t e o
    source = (c & -BLOCK) + _moved(c, (1, 16), (2, 32), (4, 4), (5, 8), (0, 2), (3, 1))
    to = ((entry * pieces + c // piece) * rows + row) * piece + c % piece
    scaled = load(source).astype(jnp.float32) * unit
    triton.store(columns.at[to], scaled.astype(columns.dtype), c < k)
    if group is None:
        return
    total = load(c).astype(jnp.float32).reshape(width // group, group).sum(1)
    high = total.astype(columns.dtype)
    j = chunk * (width // group) + lax.iota(jnp.int32, width // group)
    place = (j & -BLOCK) + _moved(j, (4, 2), (5, 4), (2, 16), (3, 32), (1, 1), (0, 8))
    groups = (k + -k % (BLOCK * group)) // group
    for half, part in enumerate((high, (total - high.astype(jnp.float32)).astype(high.dtype))):
        first = ((2 * entry + half) * rows + row) * groups
        triton.store(sums[0].at[first + place], part, j < groups)


def _moved(x: jax.Array, *bits: tuple[int, int]) -> jax.Array:
    """For each ``(i, value)``: bit i of x counts `value`."""
    return sum((((x >> i) & 1) * value for i, value in bits), jnp.zeros_like(x))


def refusal(x: Any, group: int | None) -> str:
    """Why the kernel can't take these; "" where it can."""
    if group is not None and not is_summed(group):
        return f"groups of {group}"
    if x.size >= 2**30 or x.shape[1] > 2**15:  # a grid's second axis is below 2**16
        return f"{x.shape[1]:,} rows, {x.size:,} elements"
    return triton.refusal()


def _on_cuda(x: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    return plain(x, **options) if refusal(x, options["group"]) else kernel(x, **options)


COLUMNS = Op(
    "matmul_columns", plain, {"cuda": _on_cuda}, one_by_one, stable=False, context=triton.lowering
)
