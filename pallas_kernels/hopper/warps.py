"""Attention of a few queries by single warps, which wait for each other at the end alone.

A warp takes runs of 16 tokens, one of each tile of a step, and up to 8 queries. Scores are products of 16 tokens with
the queries, weights go from their registers into the operand of the next product by a transposing move, and that is of
16 elements of the values with the tokens. Every sum is a warp's own until `join_warps`.

`COLUMN` arrays hold a warp's own numbers here, ``f32[8]`` in each warp; in the interpreter they are ``f32[4, 8]``.
`runs`: see `softmax`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from . import asm
from .fragments import Plan, level_of
from .halves import ONE, halves_of
from .layout import COLUMN, ROWS, SCALAR, WGMMA, tiled
from .queries import half
from .softmax import Scores, exp2, fma, in_order, less, over_warp
from .transposed import load_matrices

QUERIES = 8
SLACK = 8.0  # by how much, to base 2, scores may be above the greatest that sums are relative to
EVERYONE = 15  # a barrier of all warps of a block


def warp_column(x: float, interpret: bool) -> jax.Array:
    if interpret:
        return jnp.full((4, QUERIES), x, jnp.float32)
    return plgpu.layout_cast(jnp.full((QUERIES,), x, jnp.float32), COLUMN)


def load_queries(
    rows: Any, first: Any, count: int, order: np.ndarray, scale: float, interpret: bool
) -> list[jax.Array]:
    """Rows ``first`` to ``first + count`` of ``[R, H]`` in global memory, times `scale`, for `multiply`: by 64 columns.

    Args:
      order: see `stage_rows`.
    """
    width = rows.shape[1]
    if interpret:
        own = (rows[pl.ds(first, count)].astype(jnp.float32) * scale).astype(jnp.float16)
        axes = [6 - int(order[1 << bit]).bit_length() for bit in reversed(range(6))]
        own = own.reshape(-1, *[2] * 6).transpose(0, *(1 + axis for axis in axes))
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
            sums = _mma(sums, own, [word(columns[m, o]) for o in range(2)])
        return _of_sums(sums)

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
                sums = _mma(sums, ones, [asm.bits(v, asm.i32()) for v in step])
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
        found = _plain(
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
            words = _load_codes(codes, t, 0, row_bytes, transposed=False)
            places = [[halves.places(w) for w in rows] for rows in words]
            entries = [_load_rows(table, t, groups) for table in tables]
            total: list[Any] = [None] * 2
            for g in range(groups):
                found = [arith.constant(f32, 0.0)] * 4
                for step in range(g * group // 16, min(len(columns), (g + 1) * group // 16)):
                    piece, column = divmod(step, row_bytes // 16)
                    level = lambda r, o: halves.level(places[column][r][o], fields[piece])
                    a = [level(r, o) for o in range(2) for r in range(2)]
                    found = _mma(found, a, [asm.bits(v, asm.i32()) for v in columns[step]])
                own = _sums_by_row(found)
                for r in range(2):
                    scale, *second = (_spread(table[r][g]) for table in entries)
                    scale = halves.unit(scale)
                    x = own[r]
                    if second and plan.has_zero:
                        x = fma(arith.negf(second[0]), sums[g].registers.flat[0], x)
                    x = arith.mulf(x, scale) if total[r] is None else fma(x, scale, total[r])
                    if second and not plan.has_zero:
                        x = fma(second[0], sums[g].registers.flat[0], x)
                    total[r] = x
            out.append(asm.array(np.array(total, dtype=object), WGMMA, (ROWS, QUERIES)))
        return out

    return run(queries, sums, codes, list(tables))


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


def add_values(
    outs: list[jax.Array],
    old: jax.Array,
    weights: Scores,
    codes: Any,
    tables: list[Any],
    plan: Plan,
    *,
    runs: int,
    row_bytes: int,
    group: int,
    groups: int,
    interpret: bool,
) -> list[jax.Array]:
    """``outs * old`` and the values of all tiles times their weights.

    Args:
      outs: for each 16 elements of a row ``f32[64, 8]``; row ``16 w + g + 8 r`` is what warp w has of element 2 g + r.
      codes: ``uint8[64 tiles, row_bytes]`` in shared memory, `tiled`; flat where rows are less than 64 bytes.
      tables: of the plan, in shared memory, flat ``[64 tiles * groups]``.
      group, groups: elements that a scale covers, and scales of a row.
    """
    tiles = len(weights)
    if interpret:
        found = _plain(
            codes[...].reshape(-1, row_bytes), [t[...] for t in tables], plan, group, groups
        )
        own = _weighted(found, weights, runs)
        return [x * jnp.repeat(old, 16, axis=0) + y for x, y in zip(outs, own)]
    ref = plgpu.RefType(tiled(jnp.uint8, row_bytes)) if row_bytes >= 64 else plgpu.RefType()

    @asm.inline(
        arg_types=(
            [WGMMA] * len(outs),
            COLUMN,
            [WGMMA] * tiles,
            ref,
            [plgpu.RefType()] * len(tables),
        ),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)]
        * len(outs),
    )
    def run(ctx, outs, old, weights, codes, tables):
        halves = halves_of(plan)
        sums = _rescaled([_sums(x) for x in outs], old.registers.flat[0])
        columns = max(1, row_bytes // 16)
        fields = [halves.field(p) for p in range(plan.pieces)]
        for t, x in enumerate(weights):
            b = [_moved(v) for v in x.registers.flat]
            words = _load_codes(codes, t, runs, row_bytes)
            terms = _terms(tables, halves, t, runs, groups)
            for column in range(columns):
                places = [halves.places(words[column][r]) for r in range(2)]
                for p, field in enumerate(fields):
                    first = p * row_bytes + 16 * column
                    own = terms[min(first // group, groups - 1)]
                    a = [
                        asm.bits(
                            halves.scaled(halves.level(places[r][i], field), *own[r]), asm.i32()
                        )
                        for r in range(2)
                        for i in range(2)
                    ]
                    sums[first // 16] = _mma(sums[first // 16], a, b)
        return list(map(_of_sums, sums))

    return run(outs, old, weights, codes, list(tables))


def join_scratch(warpgroups: int, width: int, interpret: bool) -> list[Any]:
    """What `join_warps` needs."""
    if interpret:
        return [plgpu.SMEM((warpgroups, 2 + width, QUERIES), jnp.float32)] * 2
    warps, blocks = 4 * warpgroups, width // 32
    return [plgpu.SMEM((n,), jnp.float32) for n in (2 * warps * QUERIES, warps * blocks * 128)]


def join_warps(
    outs: list[jax.Array],
    top: jax.Array,
    total: jax.Array,
    scratch: list[Any],
    out: Any,
    logs: Any,
    row: Any,
    count: int,
    warpgroups: int,
) -> None:
    """What all warps of a block found, to rows ``row`` to ``row + count`` of ``out[R, H]``, and logarithms to `logs`."""
    width, never = 16 * len(outs), -1e30

    @asm.inline(
        arg_types=(
            [WGMMA] * len(outs),
            COLUMN,
            COLUMN,
            [plgpu.RefType()] * 2,
            plgpu.RefType(),
            plgpu.RefType(),
            SCALAR,
        )  # fmt: skip
    )
    def run(ctx, outs, top, total, scratch, out, logs, row):
        f32, pair = ir.F32Type.get(), ir.VectorType.get((2,), ir.F32Type.get())
        number = lambda x: arith.constant(f32, x)
        small, large = map(asm.pointer, scratch)
        row, (_, g, q) = asm.scalar(row), asm.lanes()
        thread = arith.index_cast(asm.i32(), asm.thread())
        warp, lane = arith.shrui(thread, asm.const(5)), arith.andi(thread, asm.const(31))
        warps, (top,), (total,) = 4 * warpgroups, top.registers.flat, total.registers.flat
        (whole,) = over_warp(arith.addf, [[total]])
        first = arith.cmpi(arith.CmpIPredicate.eq, g, asm.const(0))
        own = arith.muli(q, asm.const(2))
        at = arith.addi(arith.muli(warp, asm.const(QUERIES)), own)
        for i, v in enumerate(([asm.extract(top, e) for e in range(2)], whole)):
            place = asm.at(small, arith.addi(at, asm.const(i * warps * QUERIES)), f32)
            mgpu.utils.inline_ptx(
                "@$3 st.shared.v2.f32 [$0], {$1, $2};",
                llvm.ptrtoint(asm.i32(), place), *v, first, has_side_effects=True,
            )  # fmt: skip
        _barrier(warps)
        load = lambda i: llvm.load(
            pair, asm.at(small, arith.addi(own, asm.const(i * QUERIES)), f32), alignment=8
        )
        tops = [load(w) for w in range(warps)]
        best = tops[0]
        for v in tops[1:]:
            best = arith.maxnumf(best, v)
        whole = None
        for w, v in enumerate(tops):
            share = arith.mulf(load(warps + w), exp2(arith.subf(v, best)))
            whole = share if whole is None else arith.addf(whole, share)
        factor, log = exp2(arith.subf(top, best)), []
        each = []
        for e in range(2):
            x = asm.extract(whole, e)
            none = arith.cmpf(arith.CmpFPredicate.OEQ, x, number(0.0))
            kept = arith.select(none, number(1.0), x)
            each.append(arith.select(none, number(0.0), arith.divf(number(1.0), kept)))
            found = mgpu.utils.inline_ptx("lg2.approx.f32 $0, $1;", kept, result_types=f32)
            found = arith.addf(found, asm.extract(best, e))
            log.append(arith.select(none, number(never), found))
        factor = arith.mulf(factor, asm.vector_of(pair, each))
        writes = arith.andi(first, arith.cmpi(arith.CmpIPredicate.eq, warp, asm.const(0)))
        for e in range(2):
            head = arith.addi(own, asm.const(e))
            inside = arith.andi(writes, less(head, asm.const(count)))
            _store(logs, arith.extsi(asm.i64(), arith.addi(row, head)), log[e], inside)
        rounds = 2
        blocks = len(outs) // rounds
        pairs = blocks * 64  # of a warp in a round
        for i in range(rounds):
            if i:
                _barrier(warps)
            mine = arith.addi(arith.muli(warp, asm.const(pairs)), lane)
            for j, x in enumerate(outs[i * blocks : (i + 1) * blocks]):
                for r, v in enumerate(x.registers.flat):
                    place = arith.addi(mine, asm.const(32 * (2 * j + r)))
                    llvm.store(arith.mulf(v, factor), asm.at(large, place, pair), alignment=8)
            _barrier(warps)
            for start in range(0, pairs, 32 * warps):
                index = arith.addi(thread, asm.const(start))
                there = less(index, asm.const(pairs))
                index = arith.minui(index, asm.const(pairs - 1))
                v = None
                for w in range(warps):
                    place = asm.at(large, arith.addi(index, asm.const(w * pairs)), pair)
                    x = llvm.load(pair, place, alignment=8)
                    v = x if v is None else arith.addf(v, x)
                element = arith.addi(
                    arith.addi(
                        asm.const(16 * i * blocks),
                        arith.muli(arith.shrui(index, asm.const(6)), asm.const(16)),
                    ),
                    arith.addi(
                        arith.andi(arith.shrui(index, asm.const(5)), asm.const(1)),
                        arith.andi(arith.shrui(index, asm.const(1)), asm.const(14)),
                    ),
                )
                for e in range(2):
                    head = arith.addi(
                        arith.muli(arith.andi(index, asm.const(3)), asm.const(2)), asm.const(e)
                    )
                    line = arith.muli(arith.addi(row, head), asm.const(width))
                    place = arith.extsi(asm.i64(), arith.addi(line, element))
                    _store(
                        out,
                        place,
                        asm.extract(v, e),
                        arith.andi(there, less(head, asm.const(count))),
                    )

    run(outs, top, total, scratch, out, logs, row)


def release(slot: Any, interpret: bool) -> None:
    """The first warp of a warpgroup waits until the others have come here too; those go on.

    Args:
      slot: of all rings' slots, the one that they have read: it has a barrier of its own, since a warp may be ahead.
    """
    if interpret:
        return

    @asm.inline(arg_types=(SCALAR,))
    def run(ctx, slot):
        warp = asm.lanes()[0]
        barrier = arith.addi(asm.scalar(slot), asm.const(1))
        first = arith.cmpi(arith.CmpIPredicate.eq, warp, asm.const(0))
        branch = scf.IfOp(first, [], has_else=True)
        for block, what in ((branch.then_block, "sync"), (branch.else_block, "arrive")):
            with ir.InsertionPoint(block):
                mgpu.utils.inline_ptx(
                    f"bar.{what} $0, 128;", barrier, has_side_effects=True, convergent=True
                )
                scf.yield_([])

    run(slot)


def _barrier(warps: int) -> None:
    mgpu.utils.inline_ptx(
        f"bar.sync {EVERYONE}, {32 * warps};", has_side_effects=True, convergent=True
    )


def _store(ref: Any, at: Any, x: Any, inside: Any) -> None:
    place = llvm.ptrtoint(asm.i64(), asm.at(asm.pointer(ref), at, ir.F32Type.get()))
    mgpu.utils.inline_ptx("@$2 st.global.f32 [$0], $1;", place, x, inside, has_side_effects=True)


def _mma(sums: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """A product of ``[16, 16]`` and ``[16, 8]``, in the registers of a warp."""
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    f32 = ir.F32Type.get()
    return list(mgpu.utils.inline_ptx(code, *a, *b, *sums, result_types=[f32] * 4, convergent=True))


def _sums(x: Any) -> list[Any]:
    return [asm.extract(v, e) for v in x.registers.flat for e in range(2)]


def _of_sums(sums: list[Any]) -> Any:
    return asm.array(np.array(_sums_by_row(sums), dtype=object), WGMMA, (ROWS, QUERIES))


def _rescaled(sums: list[list[Any]], old: Any) -> list[list[Any]]:
    """Times a factor of each column, if any of a warp's is not 1."""
    f32, factors = ir.F32Type.get(), [asm.extract(old, e) for e in range(2)]
    one = arith.constant(f32, 1.0)
    other = arith.ori(*(arith.cmpf(arith.CmpFPredicate.UNE, x, one) for x in factors))
    code = (
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.u32 $0, 1, 0, p; }"
    )
    flag = arith.extui(asm.i32(), other)
    found = mgpu.utils.inline_ptx(code, flag, result_types=asm.i32(), convergent=True)
    any_ = arith.cmpi(arith.CmpIPredicate.ne, found, asm.const(0))
    flat = [x for four in sums for x in four]
    branch = scf.IfOp(any_, [f32] * len(flat), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([arith.mulf(x, factors[i % 2]) for i, x in enumerate(flat)])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(flat)
    results = list(branch.results)
    return [results[i : i + 4] for i in range(0, len(results), 4)]


def _moved(v: Any) -> Any:
    """Weights of a token and two queries, as those of a query and two tokens: in float16."""
    packed = asm.bits(arith.truncf(ir.VectorType.get((2,), ir.F16Type.get()), v), asm.i32())
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return mgpu.utils.inline_ptx(code, packed, result_types=asm.i32(), convergent=True)


def _load_codes(
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


def _terms(tables: list[Any], halves: Any, tile: int, runs: int, groups: int) -> list[list[Any]]:
    """For each group, and the first and second rows of the 8, scale and rest of a thread's two tokens."""
    found = [_load_entries(table, tile, runs, groups) for table in tables]
    out = []
    for g in range(groups):
        own = []
        for r in range(2):
            tokens = (r, 2 + r) if runs else (2 * r, 2 * r + 1)
            scale, *second = (_pair(*(entries[t][g] for t in tokens)) for entries in found)
            rest = halves.rest(scale, *second) if second else None
            own.append((halves.scale(scale), rest))
        out.append(own)
    return out


def _load_entries(table: Any, tile: int, runs: int, groups: int) -> list[list[tuple[Any, int]]]:
    """Of a thread's four tokens the entries of all groups: a word of float16, and which half of it."""
    warp, _, q = asm.lanes()
    kind, f16 = asm.element(table), ir.F16Type.get()
    together = 4 if runs else 2  # tokens that follow each other
    first = arith.muli(warp, asm.const(16 * max(1, runs)))
    first = arith.addi(first, arith.muli(q, asm.const(together)))
    vector, out = ir.VectorType.get((together * groups,), kind), []
    alignment = math.gcd(16, together * groups * ir.FloatType(kind).width // 8)
    for token in (16 * tile,) if runs else (ROWS * tile, ROWS * tile + 8):
        at = arith.muli(arith.addi(first, asm.const(token)), asm.const(groups))
        v = llvm.load(vector, asm.at(asm.pointer(table), at, kind), alignment=alignment)
        if kind != f16:
            wide = ir.VectorType.get((together * groups,), ir.F32Type.get())
            v = v if kind == ir.F32Type.get() else arith.extf(wide, v)
            v = arith.truncf(ir.VectorType.get((together * groups,), f16), v)
        words = asm.bits(v, ir.VectorType.get((together * groups // 2,), asm.i32()))
        entries = [(asm.extract(words, i // 2), i % 2) for i in range(together * groups)]
        out += [entries[i : i + groups] for i in range(0, len(entries), groups)]
    return out


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


def _spread(x: Any) -> Any:
    """A number for both columns of a thread."""
    return asm.vector_of(ir.VectorType.get((2,), ir.F32Type.get()), [x, x])


def _sums_by_row(sums: list[Any]) -> list[Any]:
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    return [asm.vector_of(pair, sums[i : i + 2]) for i in (0, 2)]


def _pair(a: tuple[Any, int], b: tuple[Any, int]) -> Any:
    """Two entries of `_load_entries` in a word."""
    chosen = (0x7600 if b[1] else 0x5400) | (0x32 if a[1] else 0x10)
    return asm.word("prmt.b32 $0, $1, $2, $3;", a[0], b[0], asm.const(chosen))


def _plain(
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


def _weighted(values: jax.Array, weights: Scores, runs: int) -> list[jax.Array]:
    """Of each warp and 16 elements, in the order of `add_values`."""
    width = values.shape[1]
    shares = in_order(weights, runs).astype(jnp.float16).astype(jnp.float32).T
    if runs:
        of_warp = lambda x: x.reshape(4, -1, x.shape[1])
    else:
        of_warp = lambda x: (
            x.reshape(-1, 4, 16, x.shape[1]).swapaxes(0, 1).reshape(4, -1, x.shape[1])
        )
    found = jnp.einsum("wth,wtn->whn", of_warp(values.astype(jnp.float32)), of_warp(shares))
    found = found.reshape(4, width // 16, 8, 2, QUERIES).transpose(1, 0, 3, 2, 4)
    return list(found.reshape(width // 16, ROWS, QUERIES))
