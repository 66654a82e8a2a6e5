"""Packed rows as the transposed register operand of WGMMA: rows of the operand are elements, columns are tokens.

A transposing matrix load gives a thread two bytes of two neighbouring tokens in one register, a token in each half: the
same words that `fragments` takes apart, with rows of the operand in the place of columns.
"""

from __future__ import annotations

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
from .fragments import MAKERS, Plan, level_of
from .layout import ROWS, WGMMA, tiled


def zero_shift(plan: Plan, dtype: Any) -> int:
    """What codes that have a zero are less by, as `expand_transposed` gives them."""
    return 128 if plan.bits == 8 and dtype == jnp.bfloat16 else 0


def expand_transposed(
    codes: Any,
    scales: Any,
    plan: Plan,
    *,
    group: int,
    dtype: Any,
    row_bytes: int,
    interpret: bool,
) -> list[jax.Array]:
    """A tile of 64 tokens as A operands ``[64, 64]``, one for each 64 bytes of a row and each piece, in this order.

    Args:
      codes: ``uint8[64, row_bytes]`` in shared memory.
      scales: ``[groups * 64]``, tokens innermost, from `spread_scales`.
      group: elements that a scale covers.

    Returns:
      Codes less `plan.middle`, or less `zero_shift` where there are zeros, times their scale. Row ``16 w + g + 8 r`` is
      byte ``16 w + 2 g + r`` of the 64.
    """
    chunks, piece = row_bytes // 64, row_bytes
    if interpret:
        return _plain(codes[...], scales[...], plan, group, dtype, chunks, piece)

    @asm.inline(
        arg_types=(plgpu.RefType(tiled(jnp.uint8, row_bytes)), plgpu.RefType()),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, ROWS), dtype, layout=WGMMA)]
        * (chunks * plan.pieces),
    )
    def run(ctx, codes, scales):
        maker = MAKERS[plan.kind](plan, jnp.dtype(dtype))
        warp, _, q = asm.lanes()
        base = asm.pointer(scales)
        out = []
        for chunk in range(chunks):
            words = _load_transposed(codes, chunk, row_bytes)
            registers = [np.empty((8, 2), dtype=object) for _ in range(plan.pieces)]
            for p in range(plan.pieces):
                element = arith.addi(
                    arith.muli(warp, asm.const(16)), asm.const(p * piece + 64 * chunk)
                )
                start = arith.muli(arith.divui(element, asm.const(group)), asm.const(ROWS))
                start = arith.addi(start, arith.muli(q, asm.const(2)))
                for octet in range(8):
                    place = arith.muli(arith.addi(start, asm.const(8 * octet)), asm.const(2))
                    place = asm.at(base, place, ir.IntegerType.get_signless(8))
                    scale = llvm.load(asm.i32(), place)
                    for r in range(2):
                        x = maker.pairs([words[octet]])[p][r]
                        if plan.has_zero and not zero_shift(plan, jnp.dtype(dtype)):
                            x = maker.sub(x, maker.magic)
                        registers[p][octet, r] = asm.bits(maker.mul(x, scale), maker.vector)
            out += [asm.array(r, WGMMA, (ROWS, ROWS)) for r in registers]
        return out

    return run(codes, scales)


def _load_transposed(ref: Any, chunk: int, row_bytes: int) -> list[Any]:
    """For each 8 tokens a word: bytes ``16 w + 2 g`` and the next of tokens 2 q and 2 q + 1."""
    thread = arith.index_cast(asm.i32(), asm.thread())
    warp, _, _ = asm.lanes()
    lane = arith.andi(thread, asm.const(31))
    column = arith.addi(warp, asm.const(4 * chunk))
    base = llvm.ptrtoint(asm.i32(), asm.pointer(ref))
    out = []
    for half in range(2):
        token = arith.addi(lane, asm.const(32 * half))
        turn = arith.andi(token, asm.const(7))
        if row_bytes == 64:
            turn = arith.shrui(turn, asm.const(1))
        place = arith.muli(arith.xori(column, turn), asm.const(16))
        place = arith.addi(base, arith.addi(arith.muli(token, asm.const(row_bytes)), place))
        out += mgpu.utils.inline_ptx(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            place,
            result_types=[asm.i32()] * 4,
            has_side_effects=True,
            convergent=True,
        )
    return out


def _plain(
    codes: jax.Array, scales: jax.Array, plan: Plan, group: int, dtype: Any, chunks: int, piece: int
) -> list[jax.Array]:
    scales = scales.reshape(-1, ROWS)  # [groups, tokens]
    out = []
    for chunk in range(chunks):
        own = codes[:, 64 * chunk : 64 * chunk + 64].astype(jnp.int32)
        rows = own.reshape(ROWS, 4, 8, 2).transpose(1, 3, 2, 0).reshape(64, ROWS)
        for p, fields in enumerate(plan.fields):
            code = sum(((rows >> f.shift) & (2**f.width - 1)) << f.up for f in fields)
            level = level_of(jnp.asarray(code), plan)
            if plan.has_zero:
                level = level - zero_shift(plan, dtype)
            warps = [(p * piece + 64 * chunk + 16 * w) // group for w in range(4)]
            scale = jnp.concatenate(
                [jnp.broadcast_to(scales[g : g + 1], (16, ROWS)) for g in warps]
            )
            out.append((level * scale.astype(jnp.float32)).astype(dtype))
    return out


def spread_scales(to: Any, table: Any, groups: int, interpret: bool) -> None:
    """A flat table ``[64 * groups]``, groups innermost, as `to` ``[groups * 64]``, tokens innermost, of its dtype."""
    if interpret:
        to[...] = table[...].reshape(ROWS, groups).T.reshape(-1).astype(to.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def run(ctx, to, table):
        source, target = asm.element(table), asm.element(to)
        thread = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(127))
        for j in range(-(-groups * ROWS // 128)):
            i = arith.addi(thread, asm.const(128 * j))
            if groups == 1:
                i = arith.andi(i, asm.const(63))
            token, g = arith.andi(i, asm.const(63)), arith.shrui(i, asm.const(6))
            entry = arith.addi(arith.muli(token, asm.const(groups)), g)
            x = llvm.load(source, asm.at(asm.pointer(table), entry, source))
            f32 = ir.F32Type.get()
            x = x if source == f32 else arith.extf(f32, x)
            llvm.store(arith.truncf(target, x), asm.at(asm.pointer(to), i, target))

    run(to, table)


def store_weights(to: Any, weights: jax.Array, interpret: bool) -> None:
    """Weights ``f32[64 tokens, W]`` as the swizzled tile ``[W, 64]`` in shared memory, of its dtype."""
    if interpret:
        to[...] = weights.T.astype(to.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(tiled(to.dtype)), WGMMA))
    def run(ctx, to, weights):
        element, byte = asm.element(to), ir.IntegerType.get_signless(8)
        warp, g, q = asm.lanes()
        registers = weights.registers.reshape(-1, 2)
        for octet in range(len(registers)):
            for r in range(2):
                for e in range(2):
                    head = arith.addi(arith.muli(q, asm.const(2)), asm.const(e))
                    column = arith.addi(arith.muli(warp, asm.const(2)), asm.const(r))
                    place = arith.muli(arith.xori(column, head), asm.const(16))
                    row = arith.muli(head, asm.const(128))
                    place = arith.addi(arith.addi(row, place), arith.muli(g, asm.const(2)))
                    place = arith.addi(place, asm.const(1024 * octet))
                    x = arith.truncf(element, asm.extract(registers[octet, r], e))
                    llvm.store(x, asm.at(asm.pointer(to), place, byte))

    run(to, weights)


def over_rows(op: str, x: jax.Array, scratch: Any, interpret: bool) -> jax.Array:
    """The "max" or "sum" of ``f32[64, W]`` over its rows, in every row.

    Args:
      scratch: ``f32[4, W]`` in shared memory. A barrier stands between one call's reads and the next one's writes.
    """
    if interpret:
        found = (jnp.max if op == "max" else jnp.sum)(x, axis=0, keepdims=True)
        return jnp.broadcast_to(found, x.shape)
    width = x.shape[1]

    @asm.inline(
        arg_types=(WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def run(ctx, x, scratch):
        join = arith.maximumf if op == "max" else arith.addf
        f32, base = ir.F32Type.get(), asm.pointer(scratch)
        warp, g, q = asm.lanes()
        first = arith.cmpi(arith.CmpIPredicate.eq, g, asm.const(0))
        registers = x.registers.reshape(-1, 2)
        columns = [arith.addi(arith.muli(q, asm.const(2)), asm.const(8 * o + e))
                   for o in range(len(registers)) for e in range(2)]  # fmt: skip
        for i, column in enumerate(columns):
            v = join(*(asm.extract(registers[i // 2, r], i % 2) for r in range(2)))
            for distance in (4, 8, 16):
                v = join(v, mgpu.utils.shfl_bfly(v, distance))
            place = arith.addi(arith.muli(warp, asm.const(width)), column)
            place = llvm.ptrtoint(asm.i32(), asm.at(base, place, f32))
            mgpu.utils.inline_ptx("@$2 st.shared.f32 [$0], $1;", place, v, first)
        mgpu.utils.warpgroup_barrier()
        found = []
        for column in columns:
            places = [arith.addi(column, asm.const(w * width)) for w in range(4)]
            values = [llvm.load(f32, asm.at(base, p, f32)) for p in places]
            found.append(join(join(values[0], values[1]), join(values[2], values[3])))
        pair = ir.VectorType.get((2,), f32)
        out = np.empty(registers.shape, dtype=object)
        for o in range(len(registers)):
            out[o, :] = asm.vector_of(pair, found[2 * o : 2 * o + 2])
        return asm.array(out, WGMMA, tuple(x.shape))

    return run(x, scratch)


def store_first(out: Any, x: jax.Array, row: Any, column: Any, n: int, interpret: bool) -> None:
    """The first row of ``f32[64, W]``, its first `n` columns, to ``out[row + i, column]``."""
    if interpret:
        out[pl.ds(row, n), column] = x[0, :n]
        return
    scalar = plgpu.Layout.WG_SPLAT(())

    @asm.inline(arg_types=(plgpu.RefType(), WGMMA, scalar, scalar))
    def run(ctx, ref, x, row, column):
        base, f32 = asm.pointer(ref), ir.F32Type.get()
        warp, g, q = asm.lanes()
        first = arith.cmpi(arith.CmpIPredicate.eq, asm.first_row(warp, g), asm.const(0))
        registers = x.registers.reshape(-1, 2)
        stride = asm.const(ir.MemRefType(ref.type).shape[1])
        for octet in range(len(registers)):
            for e in range(2):
                i = arith.addi(arith.muli(q, asm.const(2)), asm.const(8 * octet + e))
                inside = arith.andi(first, arith.cmpi(arith.CmpIPredicate.slt, i, asm.const(n)))
                place = arith.muli(arith.addi(asm.scalar(row), i), stride)
                place = arith.extsi(asm.i64(), arith.addi(place, asm.scalar(column)))
                place = llvm.ptrtoint(asm.i64(), asm.at(base, place, f32))
                value = asm.extract(registers[octet, 0], e)
                mgpu.utils.inline_ptx("@$2 st.global.f32 [$0], $1;", place, value, inside)

    run(out, x, row, column)
