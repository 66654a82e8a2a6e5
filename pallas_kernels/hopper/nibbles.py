"""4-bit codes as operands of 8 bits: the integer scale of a group goes onto four codes in a register at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from . import asm
from .layout import ROW, ROWS
from .whole_bytes import LINE


def expand_nibbles(
    codes: jax.Array, piece: int, scales: Sequence[jax.Array], interpret: bool
) -> jax.Array:
    """A nibble of each byte as the A operand ``int8[64, 128]``: ``scale * (code - 8)``.

    Args:
      codes: ``uint8[64, 128]`` from `load_bytes`.
      piece: 0 for the low nibbles, 1 for the high ones.
      scales: for 1, 2 or 4 equal parts of the columns, int8 ``[64]`` from -15 to 16; none is 16 for all.
    """
    if interpret:
        level = ((codes >> (4 * piece)) & 15).astype(jnp.int32) - 8
        spread = [jnp.repeat(s[:, None], LINE // len(scales), axis=1) for s in scales]
        return (level * (jnp.concatenate(spread, axis=1) if spread else 16)).astype(jnp.int8)

    @asm.inline(
        arg_types=(plgpu.Layout.WGMMA_8BIT, [ROW] * len(scales)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, LINE), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def run(ctx, codes, scales):
        kind = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        words = [asm.bits(v, asm.i32()) for v in codes.registers.flat]
        parts = [[_factors(v) for v in s.registers.flat] for s in scales]
        out = []
        for i, word in enumerate(words):  # rows take turns
            own = parts[i * len(parts) // len(words)][i % 2] if parts else None
            out.append(asm.bits(_levels(word, piece, own), kind))
        layout = plgpu.Layout.WGMMA_8BIT
        return asm.array(np.array(out, dtype=object), layout, (ROWS, LINE), is_signed=True)

    return run(codes, list(scales))


def _factors(scale: Any) -> tuple[Any, Any]:
    """The scale, and 128 less 8 times it in each byte."""
    s = arith.extsi(asm.i32(), asm.extract(scale, 0))
    return s, arith.addi(arith.muli(s, asm.const(-8 * asm.ONES)), asm.const(128 * asm.ONES))


def _levels(word: Any, piece: int, factors: tuple[Any, Any] | None) -> Any:
    """Four bytes at once: every one of them stays in 0 to 255 until its sign bit is changed."""
    if factors is None:
        word = word if piece else arith.shli(word, asm.const(4))
        word = arith.andi(word, asm.const(0xF0 * asm.ONES))
    else:
        word = arith.shrui(word, asm.const(4)) if piece else word
        word = arith.andi(word, asm.const(0x0F * asm.ONES))
        word = arith.addi(arith.muli(word, factors[0]), factors[1])
    return arith.xori(word, asm.const(0x80 * asm.ONES))
