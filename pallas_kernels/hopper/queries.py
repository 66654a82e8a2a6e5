"""A few rows of activations as the shared-memory operand of WGMMA: scaled, in float16, columns in a given order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .layout import SCALAR, tiled

LARGEST = 65504.0  # of float16


def stage_rows(
    to: Any, rows: Any, first: Any, count: int, order: np.ndarray, scale: float, interpret: bool
) -> None:
    """Rows ``first`` to ``first + count`` of ``[R, H]`` in global memory, times `scale`, by a warpgroup.

    Numbers beyond those of float16 become its greatest; what is left of `to` becomes 0. A barrier comes after that.

    Args:
      to: ``f16[pieces, W, C]`` in shared memory, `tiled`; piece i has the columns from i C on. C is a multiple of 64.
      order: of each 64 columns: which of them comes where. It permutes the bits of a column's number.
    """
    pieces, width, columns = to.shape
    if interpret:
        own = in_order(rows[pl.ds(first, count)], order, scale)
        own = own.reshape(count, pieces, columns).swapaxes(0, 1)
        to[...] = jnp.pad(own, ((0, 0), (0, width - count), (0, 0)))
        return
    places = [int(order[1 << bit]) for bit in range(6)]

    @asm.inline(arg_types=(plgpu.RefType(tiled(jnp.float16)), plgpu.RefType(), SCALAR))
    def run(ctx, to, rows, first):
        thread = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(127))
        base, element = asm.pointer(rows), asm.element(rows)
        chunks = columns // 8  # of 16 bytes, in a row of `to`
        count_all = pieces * width * chunks
        for start in range(0, count_all, 128):
            i = arith.minui(arith.addi(thread, asm.const(start)), asm.const(count_all - 1))
            chunk, line = arith.remui(i, asm.const(chunks)), arith.divui(i, asm.const(chunks))
            piece, row = arith.divui(line, asm.const(width)), arith.remui(line, asm.const(width))
            inside = arith.cmpi(arith.CmpIPredicate.ult, row, asm.const(count))
            own = arith.addi(asm.scalar(first), arith.minui(row, asm.const(count - 1)))
            column = arith.addi(
                arith.muli(piece, asm.const(columns)),
                arith.muli(arith.shrui(chunk, asm.const(3)), asm.const(64)),
            )
            for bit in range(3):
                set_ = arith.andi(arith.shrui(chunk, asm.const(bit)), asm.const(1))
                column = arith.addi(column, arith.muli(set_, asm.const(places[3 + bit])))
            at = arith.addi(arith.muli(own, asm.const(pieces * columns)), column)
            found = []
            for j in range(8):
                step = sum(places[bit] for bit in range(3) if j >> bit & 1)
                place = arith.extsi(asm.i64(), arith.addi(at, asm.const(step)))
                found.append(llvm.load(element, asm.at(base, place, element)))
            made = [half(x, scale, inside) for x in found]
            tile = arith.addi(
                arith.muli(arith.divui(line, asm.const(8)), asm.const(columns // 64)),
                arith.shrui(chunk, asm.const(3)),
            )
            turn = arith.andi(line, asm.const(7))
            inner = arith.xori(arith.andi(chunk, asm.const(7)), turn)
            place = arith.addi(
                arith.muli(tile, asm.const(1024)),
                arith.addi(arith.muli(turn, asm.const(128)), arith.muli(inner, asm.const(16))),
            )
            place = asm.at(asm.pointer(to), place, ir.IntegerType.get_signless(8))
            llvm.store(
                asm.vector_of(ir.VectorType.get((8,), ir.F16Type.get()), made), place, alignment=16
            )

    run(to, rows, first)


def in_order(rows: jax.Array, order: np.ndarray, scale: float) -> jax.Array:
    """What `stage_rows` makes of ``[R, H]``, in plain jnp: ``f16[R, H]``."""
    own = jnp.clip(rows.astype(jnp.float32) * scale, -LARGEST, LARGEST).astype(jnp.float16)
    axes = [6 - int(order[1 << bit]).bit_length() for bit in reversed(range(6))]
    own = own.reshape(-1, *[2] * 6).transpose(0, *(1 + axis for axis in axes))
    return own.reshape(rows.shape)


def half(x: Any, scale: float, inside: Any) -> Any:
    return arith.truncf(ir.F16Type.get(), clipped(x, scale, inside))


def clipped(x: Any, scale: float, inside: Any) -> Any:
    """A scaled number, in float32, within those of float16; 0 where not `inside`."""
    f32 = ir.F32Type.get()
    number = lambda v: arith.constant(f32, v)
    x = x if x.type == f32 else arith.extf(f32, x)
    x = arith.select(inside, arith.mulf(x, number(scale)), number(0.0))
    return arith.minimumf(arith.maximumf(x, number(-LARGEST)), number(LARGEST))
