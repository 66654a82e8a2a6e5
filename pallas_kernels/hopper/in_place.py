"""Integer codes as an operand of float16 products, without arithmetic: what single warps multiply (see `warps`).

A code in the low byte of a half is a float16 below the smallest normal number, ``code * 2**(shift - 24)``, which
products take exactly. So a code is cut out by one logical operation. The other operand or the sum makes up for its
place (`unit_of`), and a product with a constant for its middle or zero (`InPlace.offset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import LOWEST, SIGN, Plan, code_unit, place
from .halves import Halves, halves_of


def unit_of(plan: Plan, piece: int = 0) -> float:
    """What a code, or a level, of a piece is to what a product takes for it."""
    return code_unit(plan, piece, jnp.float16) if plan.kind == "int" else 1.0


def unit_at(plan: Plan, piece: int | Any) -> Any:
    """`unit_of` as a register, also of a piece that is known in the kernel only; None where that is 1."""
    if plan.kind != "int":
        return None
    if isinstance(piece, int):
        return arith.constant(ir.F32Type.get(), unit_of(plan, piece))
    down = arith.muli(piece, asm.const(plan.bits << 23))
    return asm.bits(arith.subi(asm.const((127 + LOWEST["float16"]) << 23), down), ir.F32Type.get())


class InPlace:
    """Takes the codes of a plan of one stream out of words, two at a time; the same names as in `Halves`."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.less = 1 if plan.has_zero else plan.middle

    def places(self, word: Any) -> list[Any]:
        return [place(word, 0), place(word, 1)]

    def field(self, piece: int | Any) -> Any:
        """The mask of a piece."""
        mask = asm.both(2**self.plan.bits - 1)
        if isinstance(piece, int):
            return asm.const(mask << self.plan.bits * piece)
        return arith.shli(asm.const(mask), arith.muli(piece, asm.const(self.plan.bits)))

    def level(self, place: Any, field: Any) -> Any:
        return arith.andi(place, field)

    def offset(self, piece: int | None = None) -> Any:
        """What codes are too much, as they have it: minus the middle, or minus 1, which zeros multiply.

        Args:
          piece: None for the number itself.
        """
        if piece is None:
            return asm.const(asm.both(int(np.float16(-self.less).view(np.uint16))))
        return asm.const(asm.both(SIGN | self.less << self.plan.bits * piece))

    def scale(self, scale: Any) -> Any:
        return scale

    def unit(self, scale: Any) -> Any:
        return scale


def operands_of(plan: Plan) -> InPlace | Halves:
    """What makes levels for single warps."""
    return InPlace(plan) if plan.kind == "int" else halves_of(plan)


def offset_scratch(plan: Plan) -> Any:
    return plgpu.SMEM((4 * plan.pieces,), jnp.int32)


def write_offsets(scratch: Any, plan: Plan, pieces: Sequence[int | None], interpret: bool) -> None:
    """`InPlace.offset` of some pieces to `offset_scratch`, for `load_offset`."""
    if interpret:
        return

    @asm.inline(arg_types=(plgpu.RefType(),))
    def run(ctx, scratch):
        made, start = operands_of(plan), llvm.ptrtoint(asm.i32(), asm.pointer(scratch))
        for i, piece in enumerate(pieces):
            place = arith.addi(start, asm.const(16 * i))
            code = "st.shared.v4.b32 [$0], {$1, $1, $1, $1};"
            mgpu.utils.inline_ptx(code, place, made.offset(piece), has_side_effects=True)

    run(scratch)


def load_offset(scratch: Any, i: int) -> list[Any]:
    """The i-th as an operand: four equal words, which a thread wrote itself.

    Of a constant ptxas would make four copies for each product.
    """
    place = arith.addi(llvm.ptrtoint(asm.i32(), asm.pointer(scratch)), asm.const(16 * i))
    code = "ld.volatile.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    kinds = [asm.i32()] * 4
    return list(mgpu.utils.inline_ptx(code, place, result_types=kinds, has_side_effects=True))


def scaled(share: Any, scale: Any) -> Any:
    """Two halves times two."""
    return asm.word("mul.rn.f16x2 $0, $1, $2;", share, scale)


def second_operand(plan: Plan, share: Any, own: Any, second: list[Any]) -> Any:
    """What meets `InPlace.offset`: a share with its scale, that times the zero, or the share times the mean.

    Args:
      own: the share with its scale.
      second: the entries of the second table, if there is one.
    """
    if not second:
        return own
    return scaled(own if plan.has_zero else share, *second)
