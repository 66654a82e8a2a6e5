"""Integers of 2 to 8 bits as operands of 8 bits, and sums that two digits of the other operand make together.

A code less half of its range, in the high bits of a byte: shifts and masks make four of them at once, and no scale or
zero point takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .fragments import Field, Plan, code_of, load_words
from .layout import COLUMN, ROW, ROWS, SCALAR, WGMMA, tiled

EIGHT = plgpu.Layout.WGMMA_8BIT
RADIX = 256  # of the digits


def excess(plan: Plan) -> tuple[int, int]:
    """What `expand_bytes` subtracts from a code, and what it multiplies the difference by."""
    return 2 ** (plan.bits - 1), 2 ** (8 - plan.bits)


def expand_bytes(
    codes: Sequence[Any], half: int, plan: Plan, pieces: range, *, row_bytes: int, interpret: bool
) -> list[jax.Array]:
    """64 bytes of every stream as A operands ``int8[64, 64]``, one for each piece, columns as `permute_bytes` has them.

    Args:
      codes: a tile ``uint8[64, row_bytes]`` of each stream in shared memory.
      half: which 64 bytes.
      pieces: which; each takes 8 registers.
    """
    if interpret:
        return [_bytes([ref[...] for ref in codes], half, plan.fields[i], plan) for i in pieces]

    @asm.inline(
        arg_types=[plgpu.RefType(tiled(jnp.uint8, row_bytes))] * plan.streams,
        return_type=[plgpu.ShapeDtypeStruct((ROWS, 64), jnp.int8, layout=EIGHT)] * len(pieces),
    )
    def run(ctx, *refs):
        words = load_words(refs, half, row_bytes)
        kind = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        out = []
        for i in pieces:
            made = [
                asm.bits(_signed([stream[r][t] for stream in words], plan.fields[i], plan), kind)
                for t in range(4)
                for r in range(2)
            ]
            out.append(asm.array(np.array(made, dtype=object), EIGHT, (ROWS, 64), is_signed=True))
        return out

    return run(*codes)


def _signed(words: list[Any], fields: tuple[Field, ...], plan: Plan) -> Any:
    """Four codes."""
    over = asm.const(0x80 * asm.ONES)
    for f in fields:
        place = f.up + 8 - plan.bits
        word, shift = words[f.stream], f.shift - place
        if shift:
            move = arith.shrui if shift > 0 else arith.shli
            word = move(word, asm.const(abs(shift)))
        mask = asm.const(((2**f.width - 1) << place) * asm.ONES)
        over = asm.word("lop3.b32 $0, $1, $2, $3, 0x6A;", word, mask, over)  # (word & mask) ^ over
    return over


def _bytes(streams: list[jax.Array], half: int, fields: tuple[Field, ...], plan: Plan) -> jax.Array:
    """`expand_bytes` in plain jnp, of one piece."""
    own = [permute_bytes(s[:, 64 * half : 64 * half + 64].astype(jnp.int32)) for s in streams]
    less, factor = excess(plan)
    return ((code_of(own, fields) - less) * factor).astype(jnp.int8)


def permute_bytes(x: jax.Array) -> jax.Array:
    """Blocks of 64 columns in the order in which `expand_bytes` gives the bytes of a block; whole blocks.

    Byte ``16 q + 4 t + b`` of a block is column ``16 t + 4 q + b``.
    """
    return x.reshape(*x.shape[:-1], -1, 4, 4, 4).swapaxes(-2, -3).reshape(x.shape)


def load_for_digits(ref: Any, first: Any, width: int, interpret: bool) -> jax.Array:
    """``ref[first : first + W]`` of a flat float32 array, for `add_digits`: each twice."""
    if interpret:
        return jnp.repeat(ref[pl.ds(first, width)], 2)

    @asm.inline(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((2 * width,), jnp.float32, layout=COLUMN),
    )
    def load(ctx, ref, first):
        f32 = ir.F32Type.get()
        own, registers = arith.addi(asm.scalar(first), asm.lanes()[2]), []
        for octet in range(width // 4):
            at = arith.extsi(asm.i64(), arith.addi(own, asm.const(4 * octet)))
            x = llvm.load(f32, asm.at(asm.pointer(ref), at, f32))
            registers.append(vector.broadcast(ir.VectorType.get((2,), f32), x))
        return asm.array(np.array(registers, dtype=object), COLUMN, (2 * width,))

    return load(ref, first)


def add_digits(
    total: jax.Array, sums: jax.Array, scale: jax.Array, columns: jax.Array, interpret: bool,
    less: Sequence[jax.Array] = (),
) -> jax.Array:  # fmt: skip
    """``total + (256 * high + low) * scale[:, None] * columns[None]`` in the even columns of a total.

    Args:
      total: ``f32[64, 2 W]``.
      sums: ``int32[64, 2 W]``, those of high digits in even columns, beside those of low ones.
      scale: ``[64]``.
      columns: from `load_for_digits`.
      less: ``[64]`` and what `load_for_digits` gives: their outer product is subtracted from ``256 * high + low``.
    """
    if interpret:
        x = jnp.repeat(RADIX * sums[:, ::2] + sums[:, 1::2], 2, axis=1).astype(jnp.float32)
        x = x - less[0][:, None] * less[1][None] if less else x
        return total + x * columns[None] * scale[:, None]

    @asm.inline(
        arg_types=(WGMMA, WGMMA, ROW, COLUMN, [ROW, COLUMN] if less else []),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=WGMMA),
    )
    def run(ctx, total, sums, scale, columns, less):
        fast: dict[str, Any] = {"fastmath": arith.FastMathFlags.contract}
        first = lambda x: [asm.extract(v, 0) for v in x.registers.flat]
        scales, zeros = first(scale), [arith.negf(v) for v in first(less[0])] if less else []
        of_zeros, f32 = first(less[1]) if less else [], ir.F32Type.get()
        old, new = total.registers.reshape(-1, 2), sums.registers.reshape(-1, 2)
        out = np.empty_like(old)
        for i, column in enumerate(first(columns)):
            for half in range(2):
                high, low = (asm.extract(new[i, half], digit) for digit in range(2))
                x = arith.sitofp(f32, arith.addi(arith.muli(high, asm.const(RADIX)), low))
                if less:
                    x = arith.addf(arith.mulf(zeros[half], of_zeros[i], **fast), x, **fast)
                product = arith.mulf(arith.mulf(x, column), scales[half], **fast)
                x = arith.addf(asm.extract(old[i, half], 0), product, **fast)
                out[i, half] = vector.broadcast(old[i, half].type, x)
        return asm.array(out, WGMMA, tuple(total.shape))

    return run(total, sums, scale, columns, list(less))
