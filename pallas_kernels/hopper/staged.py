"""Results that leave through shared memory."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .layout import WGMMA, tiled


def stage_transposed(to: Any, tile: jax.Array, first: int, interpret: bool) -> None:
    """Writes columns `first` to ``first + R`` of a tile ``f32[64, W]`` to ``to[R, 64]``, transposed.

    Args:
      to: floats in shared memory, `tiled`; R is a multiple of 16 for those of 16 bits, of 8 for float32.
    """
    rows = to.shape[0]
    if interpret:
        to[...] = tile[:, first : first + rows].T.astype(to.dtype)
        return

    stage = _stage_halves if to.dtype.itemsize == 2 else _stage_words

    @asm.inline(arg_types=(plgpu.RefType(tiled(to.dtype)), WGMMA))
    def run(ctx, to, tile):
        registers = tile.registers.reshape(-1, 2)[first // 8 : (first + rows) // 8]
        stage(to, registers)

    run(to, tile)


def _stage_halves(to: Any, registers: Any) -> None:
    """Matrices of 8 x 8, four at once."""
    pair = ir.VectorType.get((2,), asm.element(to))
    warp = asm.lanes()[0]
    lane = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))
    row, matrix = arith.andi(lane, asm.const(7)), arith.shrui(lane, asm.const(3))
    chunk = arith.addi(arith.muli(warp, asm.const(2)), arith.andi(matrix, asm.const(1)))
    chunk = arith.muli(arith.xori(chunk, row), asm.const(16))
    own = arith.addi(row, arith.muli(arith.shrui(matrix, asm.const(1)), asm.const(8)))
    base = llvm.ptrtoint(asm.i32(), asm.pointer(to))
    base = arith.addi(base, arith.addi(arith.muli(own, asm.const(128)), chunk))
    for octet in range(0, len(registers), 2):
        words = [
            asm.bits(arith.truncf(pair, v), asm.i32()) for v in registers[octet : octet + 2].flat
        ]
        place = arith.addi(base, asm.const(1024 * octet))
        mgpu.utils.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
            place, *words, has_side_effects=True, convergent=True,
        )  # fmt: skip


def _stage_words(to: Any, registers: Any) -> None:
    """Word by word, without a bank conflict: of 8 rows and 64 columns there are two tiles, of 32 columns each."""
    warp, g, q = asm.lanes()
    base = llvm.ptrtoint(asm.i32(), asm.pointer(to))
    base = arith.addi(base, arith.muli(arith.shrui(warp, asm.const(1)), asm.const(1024)))
    column = arith.addi(arith.muli(arith.andi(warp, asm.const(1)), asm.const(16)), g)
    for half in range(2):
        own = arith.addi(column, asm.const(8 * half))
        chunk, rest = arith.shrui(own, asm.const(2)), arith.andi(own, asm.const(3))
        for e in range(2):
            row = arith.addi(arith.muli(q, asm.const(2)), asm.const(e))
            place = arith.addi(base, arith.muli(row, asm.const(128)))
            place = arith.addi(place, arith.muli(arith.xori(chunk, row), asm.const(16)))
            place = arith.addi(place, arith.muli(rest, asm.const(4)))
            for octet, pair in enumerate(registers[:, half]):
                word = asm.bits(asm.extract(pair, e), asm.i32())
                at = arith.addi(place, asm.const(2048 * octet))
                mgpu.utils.inline_ptx("st.shared.b32 [$0], $1;", at, word, has_side_effects=True)
