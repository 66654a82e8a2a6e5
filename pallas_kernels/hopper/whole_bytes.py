"""Operands of 8 bits that are multiplied as they are, and sums that take both scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .layout import ROW, ROWS, SCALAR, WGMMA, tiled
from .transposed import load_matrices

LINE = 128  # bytes of a row


def load_bytes(codes: Any, dtype: Any, interpret: bool) -> jax.Array:
    """A tile ``uint8[64, 128]`` in shared memory as the A operand of WGMMA.

    Args:
      dtype: int8, where code 128 is the integer 0, an 8-bit float, whose bits codes are, or uint8, the codes.
    """
    flip = 0x80 if dtype == jnp.int8 else 0
    if interpret:
        return lax.bitcast_convert_type(codes[...] ^ jnp.uint8(flip), dtype)

    @asm.inline(
        arg_types=(plgpu.RefType(tiled(jnp.uint8)),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, LINE), dtype, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def run(ctx, ref):
        warp = asm.lanes()[0]
        lane = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))
        turn = arith.andi(lane, asm.const(7))  # the swizzle
        row = arith.addi(arith.muli(warp, asm.const(16)), arith.andi(lane, asm.const(15)))
        base = llvm.ptrtoint(asm.i32(), asm.pointer(ref))
        base = arith.addi(base, arith.muli(row, asm.const(LINE)))
        half = arith.shrui(lane, asm.const(4))
        element = ir.IntegerType.get_signless(8)
        if jnp.issubdtype(dtype, jnp.floating):
            kinds = {"float8_e4m3fn": ir.Float8E4M3FNType, "float8_e5m2": ir.Float8E5M2Type}
            element = kinds[jnp.dtype(dtype).name].get()
        kind = ir.VectorType.get((4,), element)
        registers = []
        for i in range(LINE // 32):  # 32 columns: both halves of the rows of 16, then 16 columns on
            chunk = arith.xori(arith.addi(half, asm.const(2 * i)), turn)
            place = arith.addi(base, arith.muli(chunk, asm.const(16)))
            for word in load_matrices(place, transposed=False):
                word = arith.xori(word, asm.const(flip * asm.ONES)) if flip else word
                registers.append(asm.bits(word, kind))
        signed = asm.is_signed(dtype)
        layout = plgpu.Layout.WGMMA_8BIT
        return asm.array(np.array(registers, dtype=object), layout, (ROWS, LINE), is_signed=signed)

    return run(codes)


def scale_sums(
    total: jax.Array, rows: jax.Array, columns: Any, first: Any, last: int, interpret: bool
) -> jax.Array:
    """``total * rows[:, None] * columns[first : first + W]`` in float32.

    Args:
      total: int32 or float32 ``[64, W]``.
      rows: ``[64]``, float.
      columns: float32 in global memory, flat; those from `last` on, an even number, are not read.
    """
    if interpret:
        own = columns[pl.ds(first, total.shape[1])]
        return total.astype(jnp.float32) * rows.astype(jnp.float32)[:, None] * own[None]

    @asm.inline(
        arg_types=(WGMMA, ROW, plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=WGMMA),
    )
    def run(ctx, total, rows, columns, first):
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        q = asm.lanes()[2]
        own = arith.addi(asm.scalar(first), arith.muli(q, asm.const(2)))
        widths = [_in_float32(v, f32) for v in rows.registers.flat]
        scales = [vector.shuffle(v, v, [0, 0]) for v in widths]
        registers = total.registers.reshape(-1, 2)
        out = np.empty_like(registers)
        for octet in range(len(registers)):
            at = arith.minui(arith.addi(own, asm.const(8 * octet)), asm.const(last - 2))
            place = asm.at(asm.pointer(columns), arith.extsi(asm.i64(), at), f32)
            column = llvm.load(pair, place, alignment=8)
            for half in range(2):
                x = registers[octet, half]
                if isinstance(ir.VectorType(x.type).element_type, ir.IntegerType):
                    x = arith.sitofp(pair, x)
                out[octet, half] = arith.mulf(arith.mulf(x, scales[half]), column)
        return asm.array(out, WGMMA, tuple(total.shape))

    return run(total, rows, columns, first)


def _in_float32(x: Any, f32: Any) -> Any:
    kind = ir.VectorType(x.type)
    return x if kind.element_type == f32 else arith.extf(ir.VectorType.get(kind.shape, f32), x)
