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
    """Writes columns `first` to ``first + R`` of a tile ``f32[64, W]`` to ``to[R, 64]``, transposed; R is 16 n.

    Args:
      to: 16-bit floats in shared memory, `tiled`.
    """
    rows = to.shape[0]
    if interpret:
        to[...] = tile[:, first : first + rows].T.astype(to.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(tiled(to.dtype)), WGMMA))
    def run(ctx, to, tile):
        registers = tile.registers.reshape(-1, 2)
        pair = ir.VectorType.get((2,), asm.element(to))
        warp = asm.lanes()[0]
        lane = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))
        row, matrix = arith.andi(lane, asm.const(7)), arith.shrui(lane, asm.const(3))
        chunk = arith.addi(arith.muli(warp, asm.const(2)), arith.andi(matrix, asm.const(1)))
        chunk = arith.muli(arith.xori(chunk, row), asm.const(16))
        own = arith.addi(row, arith.muli(arith.shrui(matrix, asm.const(1)), asm.const(8)))
        base = llvm.ptrtoint(asm.i32(), asm.pointer(to))
        base = arith.addi(base, arith.addi(arith.muli(own, asm.const(128)), chunk))
        for octet in range(0, rows // 8, 2):
            four = registers[first // 8 + octet : first // 8 + octet + 2].flat
            words = [asm.bits(arith.truncf(pair, v), asm.i32()) for v in four]
            place = arith.addi(base, asm.const(1024 * octet))
            mgpu.utils.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
                place, *words, has_side_effects=True, convergent=True,
            )  # fmt: skip

    run(to, tile)
