"""Scores of a warp's tokens with its queries, and their weights; see `warps`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import Plan
from .halves import ONE, halves_of
from .layout import COLUMN, ROWS, SCALAR, WGMMA, tiled
from .queries import half, in_order
from .softmax import Scores, exp2, fma, less, over_warp
from .warps import QUERIES, array_of, by_row, decoded, load_codes, mma16

SLACK = 8.0  # by how much, to base 2, scores may be above what sums are relative to


def load_queries(
    rows: Any, first: Any, count: int, order: np.ndarray, scale: float, interpret: bool
) -> list[jax.Array]:
    """Rows ``first`` to ``first + count`` of ``[R, H]`` in global memory, times `scale`, for `multiply`: by 64 columns.

    Args:
      order: see `stage_rows`.
    """
    width = rows.shape[1]
    if interpret:
        own = in_order(rows[pl.ds(first, count)], order, scale)
        own = jnp.pad(own.reshape(count, -1, 64), ((0, QUERIES - count), (0, 0), (0, 0)))
        return [own[:, i] for i in range(width // 64)]
    shape = plgpu.ShapeDtypeStruct((ROWS, 32), jnp.float16, layout=WGMMA)
    at = [int(order[i]) for i in range(64)]

    @asm.inline(arg_types=(plgpu.RefType(), SCALAR), return_type=[shape] * (width // 64))
    def run(ctx, rows, first):
        element, (_, g, q) = asm.element(rows), asm.lanes()
        inside = less(g, asm.const(count))
        row = arith.addi(asm.scalar(first), arith.minui(g, asm.const(count - 1)))
        own = [arith.muli(arith.andi(q, asm.const(1)), asm.const(at[2])),
               arith.muli(arith.shrui(q, asm.const(1)), asm.const(at[4]))]  # fmt: skip
        start = arith.addi(arith.muli(row, asm.const(width)), arith.addi(*own))
        four, out = ir.VectorType.get((4,), element), []
        nbytes = 4 * jnp.dtype(jnp.float32).itemsize if element == ir.F32Type.get() else 8
        for chunk in range(width // 64):
            registers = np.empty((4, 2), dtype=object)
            for m in range(4):
                place = arith.extsi(
                    asm.i64(), arith.addi(start, asm.const(64 * chunk + at[16 * m]))
                )
                found = llvm.load(four, asm.at(asm.pointer(rows), place, element), alignment=nbytes)
                made = [half(asm.extract(found, i), scale, inside) for i in range(4)]
                for o in range(2):
                    pair = [made[at[8 * o + e]] for e in range(2)]
                    registers[m, o] = asm.vector_of(ir.VectorType.get((2,), ir.F16Type.get()), pair)
            out.append(asm.array(registers, WGMMA, (ROWS, 32)))
        return out

    return run(rows, first)


def multiply(a: jax.Array, queries: jax.Array, interpret: bool) -> jax.Array:
    """``f16[64, 64]`` with 64 columns of queries: ``f32[64, 8]``."""
    if interpret:
        return a.astype(jnp.float32) @ queries.astype(jnp.float32).T

    @asm.inline(
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA),
    )
    def run(ctx, a, queries):
        word = lambda v: asm.bits(v, asm.i32())
        rows, columns = a.registers.reshape(8, 2), queries.registers.reshape(4, 2)
        zero = arith.constant(ir.F32Type.get(), 0.0)
        sums = [zero] * 4
        for m in range(4):
            own = [word(rows[2 * m + o, r]) for o in range(2) for r in range(2)]
            sums = mma16(sums, own, [word(columns[m, o]) for o in range(2)])
        return array_of(sums)

    return run(a, queries)


def query_sums(queries: list[jax.Array], group: int, interpret: bool) -> list[jax.Array]:
    """Of `load_queries` for `multiply_rows`, over each group of columns: ``f32[8]``."""
    if interpret:
        flat = jnp.concatenate(queries, axis=1).astype(jnp.float32)
        parts = (flat[:, i : i + group].sum(-1) for i in range(0, flat.shape[1], group))
        return [jnp.broadcast_to(x, (4, QUERIES)) for x in parts]
    shape = plgpu.ShapeDtypeStruct((QUERIES,), jnp.float32, layout=COLUMN)
    groups = -(-64 * len(queries) // group)

    @asm.inline(arg_types=([WGMMA] * len(queries),), return_type=[shape] * groups)
    def run(ctx, queries):
        ones = [asm.const(asm.both(ONE))] * 4
        columns = [v for x in queries for v in x.registers.reshape(4, 2)]
        out = []
        for g in range(groups):
            sums = [arith.constant(ir.F32Type.get(), 0.0)] * 4
            for step in columns[g * group // 16 : (g + 1) * group // 16]:
                sums = mma16(sums, ones, [asm.bits(v, asm.i32()) for v in step])
            pair = asm.vector_of(ir.VectorType.get((2,), ir.F32Type.get()), sums[:2])
            out.append(asm.array(np.array([pair], dtype=object), COLUMN, (QUERIES,)))
        return out

    return run(queries)


def rows_order() -> np.ndarray:
    """`order` of `load_queries` for `multiply_rows`: of 16 columns, ``8 o + 2 q + e`` is ``4 q + 2 e + o``."""
    x = np.arange(64).reshape(4, 4, 2, 2)  # q, e, o
    return x.transpose(0, 3, 1, 2).reshape(64)


def multiply_rows(
    queries: list[jax.Array],
    sums: list[jax.Array],
    codes: Any,
    tables: list[Any],
    plan: Plan,
    *,
    tiles: int,
    row_bytes: int,
    group: int,
    groups: int,
    interpret: bool,
) -> Scores:
    """Scores of keys in rows, for each tile ``f32[64, 8]``. Products of a group's codes are scaled, not its codes.

    Args:
      queries: from `load_queries`, in `rows_order`.
      sums: from `query_sums`, where the plan has more tables than one.
      codes, tables, group, groups: as for `add_values`.
    """
    if interpret:
        found = decoded(
            codes[...].reshape(-1, row_bytes), [t[...] for t in tables], plan, group, groups
        )
        plain = lambda x: x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 4, 2).reshape(x.shape)
        flat = jnp.concatenate([plain(x) for x in queries], axis=1).astype(jnp.float32)
        return list((found.astype(jnp.float32) @ flat.T).reshape(tiles, ROWS, QUERIES))
    ref = plgpu.RefType(tiled(jnp.uint8, row_bytes)) if row_bytes >= 64 else plgpu.RefType()
    tile = plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)

    @asm.inline(
        arg_types=(
            [WGMMA] * len(queries),
            [COLUMN] * len(sums),
            ref,
            [plgpu.RefType()] * len(tables),
        ),
        return_type=[tile] * tiles,
    )
    def run(ctx, queries, sums, codes, tables):
        halves, f32 = halves_of(plan), ir.F32Type.get()
        fields = [halves.field(p) for p in range(plan.pieces)]
        columns = [v for x in queries for v in x.registers.reshape(4, 2)]
        out = []
        for t in range(tiles):
            words = load_codes(codes, t, 0, row_bytes, transposed=False)
            places = [[halves.places(w) for w in rows] for rows in words]
            entries = [_load_rows(table, t, groups) for table in tables]
            total: list[Any] = [None] * 2
            for g in range(groups):
                found = [arith.constant(f32, 0.0)] * 4
                for step in range(g * group // 16, min(len(columns), (g + 1) * group // 16)):
                    piece, column = divmod(step, row_bytes // 16)
                    own = [places[column][r][o] for o in range(2) for r in range(2)]
                    a = [halves.level(place, fields[piece]) for place in own]
                    found = mma16(found, a, [asm.bits(v, asm.i32()) for v in columns[step]])
                for r, x in enumerate(by_row(found)):
                    scale, *second = (spread(table[r][g]) for table in entries)
                    scale = halves.unit(scale)
                    if second and plan.has_zero:
                        x = fma(arith.negf(second[0]), sums[g].registers.flat[0], x)
                    x = arith.mulf(x, scale) if total[r] is None else fma(x, scale, total[r])
                    if second and not plan.has_zero:
                        x = fma(second[0], sums[g].registers.flat[0], x)
                    total[r] = x
            out.append(asm.array(np.array(total, dtype=object), WGMMA, (ROWS, QUERIES)))
        return out

    return run(queries, sums, codes, list(tables))


def _load_rows(table: Any, tile: int, groups: int) -> list[list[Any]]:
    """For a thread's two rows the entries of all groups, in float32."""
    warp, g, _ = asm.lanes()
    kind, f32 = asm.element(table), ir.F32Type.get()
    vector, out = ir.VectorType.get((groups,), kind), []
    for r in range(2):
        token = arith.addi(asm.first_row(warp, g), asm.const(ROWS * tile + 8 * r))
        place = asm.at(asm.pointer(table), arith.muli(token, asm.const(groups)), kind)
        alignment = math.gcd(16, groups * ir.FloatType(kind).width // 8)
        v = llvm.load(vector, place, alignment=alignment)
        v = v if kind == f32 else arith.extf(ir.VectorType.get((groups,), f32), v)
        out.append([asm.extract(v, i) for i in range(groups)])
    return out


def spread(x: Any) -> Any:
    """A number for both columns of a thread."""
    return asm.vector_of(ir.VectorType.get((2,), ir.F32Type.get()), [x, x])


def weigh_rows(
    scores: Scores, top: jax.Array, total: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, Scores]:
    """What sums are relative to, what those so far are to be multiplied by, the sum of weights, and weights.

    What sums are relative to is seldom raised: where a score is greater by more than `SLACK`. So weights are up to 256.

    Args:
      top: before.
      total: of a thread's own rows.
    """
    if interpret:
        rows = jnp.stack([x.reshape(4, 16, QUERIES) for x in scores])
        found = rows.max((0, 2))
        best = jnp.where(found > top + SLACK, found, top)
        weights = jnp.exp2(rows - best[:, None])
        old = jnp.exp2(top - best)
        return (
            best,
            old,
            total * old + weights.sum((0, 2)),
            [x.reshape(ROWS, QUERIES) for x in weights],
        )
    whole = plgpu.ShapeDtypeStruct((QUERIES,), jnp.float32, layout=COLUMN)
    tile = plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)

    @asm.inline(
        arg_types=([WGMMA] * len(scores), COLUMN, COLUMN),
        return_type=(whole, whole, whole, [tile] * len(scores)),
    )
    def run(ctx, scores, top, total):
        f32, pair = ir.F32Type.get(), ir.VectorType.get((2,), ir.F32Type.get())
        rows = [v for x in scores for v in x.registers.flat]
        (found,) = over_warp(arith.maxnumf, [[v] for v in rows])
        (top,), (total,), best = top.registers.flat, total.registers.flat, []
        for e in range(2):
            before = asm.extract(top, e)
            limit = arith.addf(before, arith.constant(f32, SLACK))
            grown = arith.cmpf(arith.CmpFPredicate.OGT, found[e], limit)
            best.append(arith.select(grown, found[e], before))
        best = asm.vector_of(pair, best)
        old = exp2(arith.subf(top, best))
        weights = [exp2(arith.subf(v, best)) for v in rows]
        total = fma(total, old, weights[0])
        for v in weights[1:]:
            total = arith.addf(total, v)
        column = lambda v: asm.array(np.array([v], dtype=object), COLUMN, (QUERIES,))
        tiles = [
            asm.array(np.array(weights[i : i + 2], dtype=object), WGMMA, (ROWS, QUERIES))
            for i in range(0, len(weights), 2)
        ]
        return column(best), column(old), column(total), tiles

    return run(scores, top, total)
