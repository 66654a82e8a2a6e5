"""Attention of a few queries by single warps, which wait for each other at the end alone: what its parts share.

A warp takes runs of 16 tokens, one of each tile of a step, and up to 8 queries. Scores are products of 16 tokens with
the queries (`warp_scores`), weights go from their registers into the operand of the next product by a transposing move,
and that is of 16 elements of the values with the tokens (`warp_values`). Every sum is a warp's own until the end
(`warp_join`).

`COLUMN` arrays hold a warp's own numbers here, ``f32[8]`` in each warp; in the interpreter they are ``f32[4, 8]``.
`runs`: see `softmax`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import Plan, level_of
from .layout import COLUMN, ROWS, SCALAR, WGMMA
from .transposed import load_matrices

QUERIES = 8


def warp_column(x: float, interpret: bool) -> jax.Array:
    if interpret:
        return jnp.full((4, QUERIES), x, jnp.float32)
    return plgpu.layout_cast(jnp.full((QUERIES,), x, jnp.float32), COLUMN)


def release(slot: Any, interpret: bool) -> None:
    """The first warp of a warpgroup waits until the others have come here too; those go on.

    Args:
      slot: of all rings' slots, the one that they have read, below 14: it has a barrier of its own, since a warp may
        be ahead.
    """
    if interpret:
        return

    @asm.inline(arg_types=(SCALAR,))
    def run(ctx, slot):
        warp = asm.lanes()[0]
        barrier = arith.addi(asm.scalar(slot), asm.const(1))
        first = arith.cmpi(arith.CmpIPredicate.eq, warp, asm.const(0))

        def bar(what: str) -> list[Any]:
            code = f"bar.{what} $0, 128;"
            mgpu.utils.inline_ptx(code, barrier, has_side_effects=True, convergent=True)
            return []

        asm.either(first, [], lambda: bar("sync"), lambda: bar("arrive"))

    run(slot)


def mma16(sums: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """A product of ``[16, 16]`` and ``[16, 8]``, in the registers of a warp."""
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    f32 = ir.F32Type.get()
    return list(mgpu.utils.inline_ptx(code, *a, *b, *sums, result_types=[f32] * 4, convergent=True))


def no_sums() -> list[Any]:
    return [arith.constant(ir.F32Type.get(), 0.0)] * 4


def sums_of(x: Any) -> list[Any]:
    return [asm.extract(v, e) for v in x.registers.flat for e in range(2)]


def array_of(sums: list[Any]) -> Any:
    return asm.array(np.array(by_row(sums), dtype=object), WGMMA, (ROWS, QUERIES))


def by_row(sums: list[Any]) -> list[Any]:
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    return [asm.vector_of(pair, sums[i : i + 2]) for i in (0, 2)]


def load_codes(
    ref: Any, tile: int, runs: int, row_bytes: int, *, transposed: bool = True
) -> list[list[Any]]:
    """For each 16 bytes of a row, and the first and second 8 tokens: bytes 2 g and 2 g + 1 of tokens 2 q and 2 q + 1.

    Where not `transposed`: bytes 4 q to 4 q + 3 of token g.
    """
    warp = asm.lanes()[0]
    lane = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))
    j, r = arith.andi(lane, asm.const(7)), arith.andi(arith.shrui(lane, asm.const(3)), asm.const(1))
    if runs:
        token = arith.addi(arith.muli(warp, asm.const(16 * runs)), arith.addi(arith.addi(j, j), r))
    else:
        token = arith.addi(
            arith.muli(warp, asm.const(16)), arith.addi(j, arith.muli(r, asm.const(8)))
        )
    columns = row_bytes // 16
    chunk = arith.minui(arith.shrui(lane, asm.const(4)), asm.const(columns - 1))
    if row_bytes >= 64:  # the swizzle
        turn = token if row_bytes == 128 else arith.shrui(token, asm.const(1))
        chunk = arith.xori(chunk, arith.andi(turn, asm.const(columns - 1)))
    start = arith.addi(
        llvm.ptrtoint(asm.i32(), asm.pointer(ref)), arith.muli(token, asm.const(row_bytes))
    )
    step, out = (16 if runs else ROWS) * row_bytes * tile, []
    for column in range(0, columns, 2):
        own = arith.xori(chunk, asm.const(column)) if column else chunk
        place = arith.addi(start, arith.muli(own, asm.const(16)))
        words = load_matrices(arith.addi(place, asm.const(step)), transposed=transposed)
        out += [words[:2], words[2:]]
    return out[:columns]


def decoded(
    codes: jax.Array, tables: list[jax.Array], plan: Plan, group: int, groups: int
) -> jax.Array:
    """``f16[tokens, H]``."""
    pieces = [(codes.astype(jnp.int32) >> f.shift) & (2**f.width - 1) for (f,) in plan.fields]
    spread = lambda t: jnp.repeat(t.reshape(-1, groups).astype(jnp.float32), group, axis=1)
    level = level_of(jnp.concatenate(pieces, axis=1), plan)
    scale, *second = (spread(t)[:, : level.shape[1]] for t in tables)
    x = level * scale
    if second:
        x += -scale * second[0] if plan.has_zero else second[0]
    return x.astype(jnp.float16)
