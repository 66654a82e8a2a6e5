"""Packed rows as the transposed register operand of WGMMA: rows of the operand are elements, columns are tokens.

A transposing matrix load gives a thread two bytes of two neighbouring tokens in one register, a token in each half: the
same words that `fragments` takes apart, with rows of the operand in the place of columns.
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
from .halves import halves_of
from .layout import ROWS, WGMMA, tiled


def expand_transposed(
    codes: Any, scales: Any, plan: Plan, *, group: int, row_bytes: int, interpret: bool
) -> list[jax.Array]:
    """A tile of 64 tokens as A operands ``f16[64, 64]``, one for each 64 elements of a row, in their order.

    Args:
      codes: ``uint8[64, row_bytes]`` in shared memory, `tiled`; flat where rows are less than 64 bytes.
      scales: from `spread_scales`.
      group: elements that a scale covers.

    Returns:
      Row ``16 w + g + 8 r`` is element ``16 w + 2 g + r`` of the 64.
    """
    tiles = plan.pieces * row_bytes // 64
    if interpret:
        return _plain(codes[...].reshape(ROWS, -1), scales[...], plan, group, tiles)
    at_once = max(1, 64 // row_bytes)  # pieces of a row in one operand
    ref = plgpu.RefType(tiled(jnp.uint8, row_bytes)) if at_once == 1 else plgpu.RefType()

    @asm.inline(
        arg_types=(ref, plgpu.RefType()),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, ROWS), jnp.float16, layout=WGMMA)] * tiles,
    )
    def run(ctx, codes, scales):
        halves, (warp, _, q) = halves_of(plan), asm.lanes()
        base, out = asm.pointer(scales), {}
        for chunk in range(max(1, row_bytes // 64)):
            words = list(map(halves.places, _load_transposed(codes, chunk, row_bytes)))
            for p in range(0, plan.pieces, at_once):
                tile = (p * row_bytes + 64 * chunk) // 64
                element = arith.addi(arith.muli(warp, asm.const(16)), asm.const(64 * tile))
                own = arith.divui(element, asm.const(group))
                field = halves.field(p if at_once == 1 else _piece(warp, p, at_once))
                registers = np.empty((8, 2), dtype=object)
                for octet in range(8):
                    terms = _terms(base, own, octet, q, plan.terms)
                    for r in range(2):
                        level = halves.level(words[octet][r], field)
                        registers[octet, r] = halves.scaled(level, *terms)
                out[tile] = asm.array(registers, WGMMA, (ROWS, ROWS))
        return [out[tile] for tile in range(tiles)]

    return run(codes, scales)


def _piece(warp: Any, first: int, at_once: int) -> Any:
    """The piece that a warp takes of the `at_once` from `first` on."""
    return arith.addi(arith.divui(warp, asm.const(4 // at_once)), asm.const(first))


def _terms(base: Any, group: Any, octet: int, q: Any, terms: int) -> tuple[Any, Any]:
    """The scales of a thread's two tokens of 8, and the rests or None."""
    pair = arith.addi(arith.muli(group, asm.const(ROWS // 2)), asm.const(4 * octet))
    start = arith.muli(arith.addi(pair, q), asm.const(4 * terms))
    place = asm.at(base, start, ir.IntegerType.get_signless(8))
    if terms == 1:
        return llvm.load(asm.i32(), place), None
    both = llvm.load(ir.VectorType.get((2,), asm.i32()), place, alignment=8)
    return asm.extract(both, 0), asm.extract(both, 1)


def _load_transposed(ref: Any, chunk: int, row_bytes: int) -> list[Any]:
    """For each 8 tokens a word: two bytes of tokens 2 q and 2 q + 1, from byte 2 g of a warp's 16 on.

    Those are the w-th 16 of 64 bytes; where rows are shorter, warps begin anew.
    """
    thread = arith.index_cast(asm.i32(), asm.thread())
    warp, _, _ = asm.lanes()
    lane = arith.andi(thread, asm.const(31))
    column = arith.addi(warp, asm.const(4 * chunk))
    if row_bytes < 64:
        column = arith.andi(column, asm.const(row_bytes // 16 - 1))
    base = llvm.ptrtoint(asm.i32(), asm.pointer(ref))
    out = []
    for half in range(2):
        token = arith.addi(lane, asm.const(32 * half))
        turn = arith.andi(token, asm.const(7))
        if row_bytes == 64:
            turn = arith.shrui(turn, asm.const(1))
        chunk_at = column if row_bytes < 64 else arith.xori(column, turn)
        place = arith.muli(chunk_at, asm.const(16))
        place = arith.addi(base, arith.addi(arith.muli(token, asm.const(row_bytes)), place))
        out += load_matrices(place)
    return out


def load_matrices(place: Any, *, transposed: bool = True) -> list[Any]:
    """Four matrices of 8 rows of 16 bytes.

    Args:
      place: in lane 8 i + j the address of row j of the i-th.
      transposed: in pairs of bytes.
    """
    turn = ".trans" if transposed else ""
    found = mgpu.utils.inline_ptx(
        f"ldmatrix.sync.aligned.m8n8.x4{turn}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        place,
        result_types=[asm.i32()] * 4,
        has_side_effects=True,
        convergent=True,
    )
    return list(found)


def _plain(codes: jax.Array, scales: jax.Array, plan: Plan, group: int, tiles: int) -> Any:
    pieces = [(codes.astype(jnp.int32) >> f.shift) & (2**f.width - 1) for (f,) in plan.fields]
    terms = scales.reshape(-1, ROWS // 2, plan.terms, 2).transpose(2, 0, 1, 3)
    per_row = [jnp.repeat(t.reshape(-1, ROWS), group, axis=0) for t in terms]
    code = jnp.concatenate(pieces, axis=1).T
    level = level_of(code, plan) * per_row[0].astype(jnp.float32)
    level += per_row[1].astype(jnp.float32) if plan.terms == 2 else 0
    level = level.astype(jnp.float16)
    ordered = level.reshape(tiles, 4, 8, 2, ROWS).swapaxes(2, 3).reshape(tiles, ROWS, ROWS)
    return list(ordered)


def spread_scales(to: Any, tables: Any, plan: Plan, groups: int, interpret: bool) -> None:
    """Flat tables ``[64 * groups]``, groups innermost, as pairs of tokens with all that they need.

    Args:
      to: ``f16[groups * 32 * terms * 2]``: for a group and two tokens their scales, then their rests where there are
        any: means, or zeros times ``-scale``.
      tables: of the plan, in shared memory.
    """
    if interpret:
        scale, *rest = (t[...].astype(jnp.float32).reshape(32, 2, groups) for t in tables)
        rest = [-scale * t if plan.has_zero else t for t in rest]
        to[...] = jnp.stack([scale, *rest]).transpose(3, 1, 0, 2).reshape(-1).astype(to.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(), [plgpu.RefType()] * len(tables)))
    def run(ctx, to, tables):
        f16, halves = ir.F16Type.get(), halves_of(plan)
        thread = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(127))
        last = asm.const(32 * groups - 1)
        for j in range(-(-32 * groups // 128)):
            i = arith.minui(arith.addi(thread, asm.const(128 * j)), last)
            pair, group = (op(i, asm.const(groups)) for op in (arith.divui, arith.remui))
            first = arith.addi(arith.muli(pair, asm.const(2 * groups)), group)
            terms = []
            for table in tables:
                places = (first, arith.addi(first, asm.const(groups)))
                found = [_load_half(table, p) for p in places]
                terms.append(
                    asm.bits(asm.vector_of(ir.VectorType.get((2,), f16), found), asm.i32())
                )
            if len(terms) == 2:
                terms[1] = halves.rest(*terms)
            terms[0] = halves.scale(terms[0])
            place = arith.addi(arith.muli(group, asm.const(32)), pair)
            place = arith.muli(place, asm.const(2 * len(terms)))
            kind = ir.VectorType.get((len(terms),), asm.i32())
            place = asm.at(asm.pointer(to), place, f16)
            llvm.store(asm.vector_of(kind, terms), place, alignment=4 * len(terms))

    run(to, list(tables))


def _load_half(table: Any, i: Any) -> Any:
    kind, f16, f32 = asm.element(table), ir.F16Type.get(), ir.F32Type.get()
    x = llvm.load(kind, asm.at(asm.pointer(table), i, kind))
    if kind == f16:
        return x
    return arith.truncf(f16, x if kind == f32 else arith.extf(f32, x))
