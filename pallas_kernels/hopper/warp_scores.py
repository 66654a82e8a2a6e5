"""Scores of a warp's tokens with its queries, and their weights; see `warps`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import Plan
from .in_place import operands_of, unit_of
from .layout import COLUMN, ROWS, SCALAR, WGMMA, tiled
from .queries import clipped, in_order
from .softmax import Scores, exp2, fma, less, over_warp
from .warps import QUERIES, by_row, decoded, load_codes, mma16, no_sums

SLACK = 2.0  # by how much, to base 2, scores may be above what sums are relative to: weights times scales are float16


def load_queries(
    rows: Any,
    first: Any,
    count: int,
    order: np.ndarray,
    scale: float,
    units: Sequence[float],
    interpret: bool,
) -> list[jax.Array]:
    """Rows ``first`` to ``first + count`` of ``[R, H]`` in global memory, times `scale`: by 64 columns.

    Args:
      order: see `stage_rows`.
      units: of each 16 columns, what they are multiplied by too; not in the interpreter.
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
                factor = scale * units[4 * chunk + m]
                made = [clipped(asm.extract(found, i), factor, inside) for i in range(4)]
                for o in range(2):  # as words: LLVM would keep halves apart
                    word = asm.word(
                        "cvt.rn.f16x2.f32 $0, $1, $2;", *(made[at[8 * o + e]] for e in (1, 0))
                    )
                    registers[m, o] = asm.bits(word, ir.VectorType.get((2,), ir.F16Type.get()))
            out.append(asm.array(registers, WGMMA, (ROWS, 32)))
        return out

    return run(rows, first)


def query_sums(
    queries: list[jax.Array], plan: Plan, *, row_bytes: int, group: int, interpret: bool
) -> list[jax.Array]:
    """Of `load_queries` for `multiply_rows`: over each group of columns ``f32[8]``, times `InPlace.offset`."""
    if interpret:
        return []
    shape = plgpu.ShapeDtypeStruct((QUERIES,), jnp.float32, layout=COLUMN)
    groups = -(-64 * len(queries) // group)

    @asm.inline(arg_types=([WGMMA] * len(queries),), return_type=[shape] * groups)
    def run(ctx, queries):
        made = operands_of(plan)
        columns = columns_of(queries)
        out = []
        for g in range(groups):
            sums = no_sums()
            for step in range(g * group // 16, min(len(columns), (g + 1) * group // 16)):
                offset = made.offset(16 * step // row_bytes)
                sums = mma16(sums, [offset] * 4, columns[step])
            pair = asm.vector_of(ir.VectorType.get((2,), ir.F32Type.get()), sums[:2])
            out.append(asm.array(np.array([pair], dtype=object), COLUMN, (QUERIES,)))
        return out

    return run(queries)


def columns_of(queries: list[Any]) -> list[list[Any]]:
    """For each 16 columns the words of a thread."""
    return [
        [asm.bits(v, asm.i32()) for v in pair]
        for x in queries
        for pair in x.registers.reshape(4, 2)
    ]


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
      queries: from `load_queries`, in `rows_order`, with the units of pieces over that of the first.
      sums: from `query_sums`.
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
        made, columns = operands_of(plan), columns_of(queries)
        fields = [made.field(p) for p in range(plan.pieces)]
        out = []
        for t in range(tiles):
            words = load_codes(codes, t, 0, row_bytes, transposed=False)
            places = [[made.places(w) for w in rows] for rows in words]
            entries = [_load_rows(table, t, groups) for table in tables]
            total: list[Any] = [None] * 2
            for g in range(groups):
                (less,) = sums[g].registers.flat
                found = no_sums() if len(tables) > 1 else 2 * [asm.extract(less, e) for e in (0, 1)]
                for step in range(g * group // 16, min(len(columns), (g + 1) * group // 16)):
                    piece, column = divmod(step, row_bytes // 16)
                    own = [places[column][r][o] for o in range(2) for r in range(2)]
                    a = [made.level(place, fields[piece]) for place in own]
                    found = mma16(found, a, columns[step])
                for r, x in enumerate(by_row(found)):
                    scale, *second = (spread(table[r][g]) for table in entries)
                    scale = made.unit(scale)
                    if plan.has_zero:
                        x = fma(second[0], less, x)
                    x = arith.mulf(x, scale) if total[r] is None else fma(x, scale, total[r])
                    if second and not plan.has_zero:
                        x = fma(second[0], less, x)
                    total[r] = x
            if (unit := unit_of(plan)) != 1:
                total = [
                    arith.mulf(x, spread(arith.constant(ir.F32Type.get(), unit))) for x in total
                ]
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
    scores: Scores, top: jax.Array, total: jax.Array, outs: list[jax.Array], interpret: bool
) -> tuple[jax.Array, jax.Array, list[jax.Array], Scores]:
    """What sums are relative to, the sum of weights, other sums so far, and weights.

    What sums are relative to is seldom raised: where a score is greater by more than `SLACK`. Else threads ask each
    other for nothing more.

    Args:
      top: before.
      total: of a thread's own rows.
      outs: see `add_values`.
    """
    if interpret:
        rows = jnp.stack([x.reshape(4, 16, QUERIES) for x in scores])
        found = rows.max((0, 2))
        best = jnp.where(found > top + SLACK, found, top)
        old, weights = jnp.exp2(top - best), jnp.exp2(rows - best[:, None])
        outs = [x * jnp.repeat(old, 16, axis=0) for x in outs]
        weighed = [w.reshape(ROWS, QUERIES) for w in weights]
        return best, total * old + weights.sum((0, 2)), outs, weighed
    tile = plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)
    whole = plgpu.ShapeDtypeStruct((QUERIES,), jnp.float32, layout=COLUMN)

    @asm.inline(
        arg_types=([WGMMA] * len(scores), COLUMN, COLUMN, [WGMMA] * len(outs)),
        return_type=(whole, whole, [tile] * len(outs), [tile] * len(scores)),
    )
    def run(ctx, scores, top, total, outs):
        rows = [v for x in scores for v in x.registers.flat]
        sums = [v for x in outs for v in x.registers.flat]
        top, total, *sums = _raised(rows, top.registers.flat[0], [total.registers.flat[0], *sums])
        weights = [exp2(arith.subf(v, top)) for v in rows]
        for v in weights:
            total = arith.addf(total, v)
        return (
            *(asm.array(np.array([v], dtype=object), COLUMN, (QUERIES,)) for v in (top, total)),
            *(_in_tiles(words) for words in (sums, weights)),
        )

    return run(scores, top, total, outs)


def _raised(rows: list[Any], top: Any, sums: list[Any]) -> list[Any]:
    """`top` and the sums relative to it, raised where a thread of the warp has a score that asks for it."""
    f32, pair = ir.F32Type.get(), top.type
    own = functools.reduce(arith.maxnumf, rows)
    limit = arith.addf(top, spread(arith.constant(f32, SLACK)))
    above = arith.cmpf(arith.CmpFPredicate.OGT, own, limit)

    def raised() -> list[Any]:
        ((low, high),) = over_warp(arith.maxnumf, [[own]])
        found = asm.vector_of(pair, [low, high])
        grown = arith.cmpf(arith.CmpFPredicate.OGT, found, limit)
        best = arith.select(grown, found, top)
        old = exp2(arith.subf(top, best))
        return [best, *(arith.mulf(x, old) for x in sums)]

    any_ = _of_any(arith.ori(asm.extract(above, 0), asm.extract(above, 1)))
    return asm.either(any_, [pair] * (1 + len(sums)), raised, lambda: [top, *sums])


def _of_any(condition: Any) -> Any:
    """Whether it holds in a thread of the warp."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.u32 $0, 1, 0, p; }"
    )
    flag = arith.extui(asm.i32(), condition)
    found = mgpu.utils.inline_ptx(code, flag, result_types=asm.i32(), convergent=True)
    return arith.cmpi(arith.CmpIPredicate.ne, found, asm.const(0))


def _in_tiles(words: list[Any]) -> list[Any]:
    return [
        asm.array(np.array(words[i : i + 2], dtype=object), WGMMA, (ROWS, QUERIES))
        for i in range(0, len(words), 2)
    ]
