"""Sums of the values of a warp's tokens with their weights; see `warps`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import Plan
from .halves import halves_of
from .layout import COLUMN, ROWS, WGMMA, tiled
from .softmax import Scores, in_order
from .warps import QUERIES, array_of, decoded, load_codes, mma16, sums_of


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
        found = decoded(
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
        sums = _rescaled([sums_of(x) for x in outs], old.registers.flat[0])
        columns = max(1, row_bytes // 16)
        fields = [halves.field(p) for p in range(plan.pieces)]
        for t, x in enumerate(weights):
            b = [_moved(v) for v in x.registers.flat]
            words = load_codes(codes, t, runs, row_bytes)
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
                    sums[first // 16] = mma16(sums[first // 16], a, b)
        return list(map(array_of, sums))

    return run(outs, old, weights, codes, list(tables))


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
    rescaled = lambda: [arith.mulf(x, factors[i % 2]) for i, x in enumerate(flat)]
    results = asm.either(any_, [f32] * len(flat), rescaled, lambda: flat)
    return [results[i : i + 4] for i in range(0, len(results), 4)]


def _moved(v: Any) -> Any:
    """Weights of a token and two queries, as those of a query and two tokens: in float16."""
    packed = asm.bits(arith.truncf(ir.VectorType.get((2,), ir.F16Type.get()), v), asm.i32())
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return mgpu.utils.inline_ptx(code, packed, result_types=asm.i32(), convergent=True)


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


def _pair(a: tuple[Any, int], b: tuple[Any, int]) -> Any:
    """Two entries of `_load_entries` in a word."""
    chosen = (0x7600 if b[1] else 0x5400) | (0x32 if a[1] else 0x10)
    return asm.word("prmt.b32 $0, $1, $2, $3;", a[0], b[0], asm.const(chosen))


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
