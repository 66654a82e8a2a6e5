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
from .in_place import load_offset, operands_of, scaled, second_operand
from .layout import ROWS, WGMMA, tiled
from .softmax import Scores, in_order
from .warps import QUERIES, array_of, decoded, load_codes, mma16, sums_of


def add_values(
    outs: list[jax.Array],
    weights: Scores,
    codes: Any,
    tables: list[Any],
    offsets: Any,
    plan: Plan,
    *,
    runs: int,
    row_bytes: int,
    group: int,
    groups: int,
    interpret: bool,
) -> list[jax.Array]:
    """`outs` and the values of all tiles times their weights, which scales multiply, not codes.

    Args:
      outs: for each 16 elements of a row ``f32[64, 8]``; row ``16 w + g + 8 r`` is what warp w has of element 2 g + r,
        over `unit_of` its piece; the interpreter has the elements.
      codes: ``uint8[64 tiles, row_bytes]`` in shared memory, `tiled`; flat where rows are less than 64 bytes.
      tables: of the plan, in shared memory, flat ``[64 tiles * groups]``.
      offsets: from `write_offsets`, for all pieces.
      group, groups: elements that a scale covers, and scales of a row.
    """
    tiles = len(weights)
    if interpret:
        found = decoded(
            codes[...].reshape(-1, row_bytes), [t[...] for t in tables], plan, group, groups
        )
        own = _weighted(found, weights, runs)
        return [x + y for x, y in zip(outs, own)]
    ref = plgpu.RefType(tiled(jnp.uint8, row_bytes)) if row_bytes >= 64 else plgpu.RefType()

    @asm.inline(
        arg_types=(
            [WGMMA] * len(outs),
            [WGMMA] * tiles,
            ref,
            [plgpu.RefType()] * len(tables),
            plgpu.RefType(),
        ),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)]
        * len(outs),
    )
    def run(ctx, outs, weights, codes, tables, offsets):
        made, sums = operands_of(plan), [sums_of(x) for x in outs]
        fields = [made.field(p) for p in range(plan.pieces)]
        for t, x in enumerate(weights):
            words = load_codes(codes, t, runs, row_bytes)
            shares = _shares(list(map(_moved, x.registers.flat)), tables, plan, t, runs, groups)
            for column in range(max(1, row_bytes // 16)):
                places = [made.places(words[column][r]) for r in range(2)]
                for p, field in enumerate(fields):
                    first = p * row_bytes + 16 * column
                    own, _ = shares[min(first // group, groups - 1)]
                    a = [made.level(places[r][i], field) for r in range(2) for i in range(2)]
                    sums[first // 16] = mma16(sums[first // 16], a, own)
            for p in range(plan.pieces):
                offset = load_offset(offsets, p)
                for i in range(p * row_bytes // 16, (p + 1) * row_bytes // 16):
                    sums[i] = mma16(sums[i], offset, shares[min(16 * i // group, groups - 1)][1])
        return list(map(array_of, sums))

    return run(outs, weights, codes, list(tables), offsets)


def _moved(v: Any) -> Any:
    """Weights of a token and two queries, as those of a query and two tokens: in float16."""
    packed = asm.bits(arith.truncf(ir.VectorType.get((2,), ir.F16Type.get()), v), asm.i32())
    code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return mgpu.utils.inline_ptx(code, packed, result_types=asm.i32(), convergent=True)


def _shares(
    weights: list[Any], tables: list[Any], plan: Plan, tile: int, runs: int, groups: int
) -> list[tuple[list[Any], list[Any]]]:
    """For each group the weights of a thread's tokens with their scales, and what meets `InPlace.offset`."""
    found = [_load_entries(table, tile, runs, groups) for table in tables]
    made, out = operands_of(plan), []
    for g in range(groups):
        own, rest = [], []
        for r, weight in enumerate(weights):
            tokens = (r, 2 + r) if runs else (2 * r, 2 * r + 1)
            scale, *second = (_pair(*(entries[t][g] for t in tokens)) for entries in found)
            own.append(scaled(weight, made.scale(scale)))
            rest.append(second_operand(plan, weight, own[-1], second))
        out.append((own, rest))
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
