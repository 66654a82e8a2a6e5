"""What integer codes are too much, as an operand that meets sums of x over groups.

``sum((code - zero) * scale * x)`` is ``sum((code - middle) * scale * x)`` and, for each group, ``(middle - zero) *
scale`` times the sum of x: a product with 1 column for each group instead of an operation for each code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .layout import ROWS, SCALAR, WGMMA, in_two, permute_columns

RUN = 8  # entries that a load takes, where rows are multiples


def expand_less(
    tables: Sequence[Any],
    n_groups: int,
    row: Any,
    column: Any,
    middle: int,
    kept: int,
    *,
    interpret: bool,
    halves: Sequence[int] = (0, 1),
) -> list[jax.Array]:
    """``(kept - zero) * scale`` as two bfloat16, high and low, ``[64, 64]``: columns as in `permute_columns`.

    Args:
      tables: scales and, if there are any, zeros ``[N, n_groups]``.
      row, column: the first ones. Past the last group come numbers of other groups.
      middle: the zero where there is no table.
      kept: what is subtracted from codes before.
      halves: which; each takes 16 registers.
    """
    if interpret:
        columns = jnp.minimum(column + permute_columns(jnp.arange(64)[None])[0], n_groups - 1)
        take = lambda t: jnp.take(t[pl.ds(row, ROWS), :].reshape(ROWS, n_groups), columns, axis=1)
        scale, *zero = (take(t).astype(jnp.float32) for t in tables)
        less = scale * (kept - (zero[0] if zero else float(middle)))
        both = in_two(less)
        return [both[half].astype(jnp.bfloat16) for half in halves]
    operand = plgpu.ShapeDtypeStruct((ROWS, 64), jnp.bfloat16, layout=WGMMA)
    signed = [asm.is_signed(t.dtype) for t in tables]
    sizes = [jnp.dtype(t.dtype).itemsize for t in tables]

    @asm.inline(
        arg_types=([plgpu.RefType()] * len(tables), SCALAR, SCALAR),
        return_type=[operand] * len(halves),
    )
    def run(ctx, refs, row, column):
        warp, g, q = asm.lanes()
        own = arith.addi(asm.scalar(column), arith.muli(q, asm.const(16)))
        first = arith.addi(asm.scalar(row), asm.first_row(warp, g))
        start = arith.extsi(asm.i64(), arith.muli(first, asm.const(n_groups)))
        number = lambda x: arith.constant(ir.F32Type.get(), float(x))
        bases = [arith.addi(start, asm.const64(8 * half * n_groups)) for half in range(2)]
        # all loads first: they take as long as one
        loaded = [
            [_load(ref, base, own, n_groups, size) for ref, size in zip(refs, sizes)]
            for base in bases
        ]
        made = [np.empty((8, 2), dtype=object) for _ in range(2)]
        for r, rows in enumerate(loaded):
            for octet in range(8):
                t, o = divmod(octet, 2)
                pair = []
                for e in range(2):
                    scale, *zero = (
                        _float32(row(4 * t + 2 * e + o), s) for row, s in zip(rows, signed)
                    )
                    less = arith.subf(number(kept), zero[0] if zero else number(middle))
                    pair.append(arith.mulf(less, scale))
                for out, x in zip(made, _in_two(pair)):
                    out[octet, r] = x
        return [asm.array(made[half], WGMMA, (ROWS, 64)) for half in halves]

    return run(list(tables), row, column)


def _load(ref: Any, base: Any, own: Any, n_groups: int, size: int) -> Callable[[int], Any]:
    """Loads the 16 entries of a row from a thread's own on, and gives the i-th of them."""
    element, pointer = asm.element(ref), asm.pointer(ref)
    run = RUN if n_groups % RUN == 0 else 1
    kind, found = ir.VectorType.get((run,), element), []
    for i in range(0, 16, run):
        at = arith.minui(arith.addi(own, asm.const(i)), asm.const(n_groups - run))
        place = asm.at(pointer, arith.addi(base, arith.extsi(asm.i64(), at)), element)
        found.append(llvm.load(kind, place, alignment=min(16, run * size)))
    return lambda i: asm.extract(found[i // run], i % run)


def _float32(x: Any, signed: bool | None) -> Any:
    f32 = ir.F32Type.get()
    if x.type == f32:
        return x
    if signed is None:
        return arith.extf(f32, x)
    return (arith.sitofp if signed else arith.uitofp)(f32, x)


def _in_two(pair: list[Any]) -> list[Any]:
    """Two float32 numbers as two pairs of bfloat16, whose sum they are."""
    f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
    kind = ir.VectorType.get((2,), bf16)
    high = [arith.truncf(bf16, x) for x in pair]
    low = [arith.truncf(bf16, arith.subf(x, arith.extf(f32, h))) for x, h in zip(pair, high)]
    return [vector.from_elements(kind, half) for half in (high, low)]
