"""Codes as float16, two in a word, taken from where they lie.

A code anywhere in the low ten bits of a half goes over the mantissa of 1024 by one logical operation, without a shift;
one multiply-add undoes its place and takes the middle off, exactly. Levels that mirror each other are an odd polynomial
of that, so that looking them up costs the arithmetic units nothing that integers need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from . import asm
from .fragments import Plan
from .polynomial import odd_polynomial

ONE, MAGIC = 0x3C00, 0x6400  # the bits of 1 and 1024
THIRDS = (-10.0, -3.0, 3.0, 10.0)  # float16 whose low bytes are 0


class Field(NamedTuple):
    """How a code is taken from a word: ``(word & mask | magic) * factor + offset``, in halves."""

    mask: Any
    magic: Any
    factor: Any
    offset: Any


class Halves:
    """Makes levels of the codes of a plan of one stream."""

    def __init__(self, plan: Plan):
        self.plan, odd = plan, plan.kind == "odd"
        self.lift = int(odd)  # makes room for the half between the two middle codes
        self.middle = 2 ** (plan.bits - 1) if odd else 0 if plan.has_zero else plan.middle
        self.down, self.coefficients = odd_polynomial(plan.levels) if odd else (0, ())

    def places(self, word: Any) -> list[Any]:
        """The word with bytes 0 and 2 in the place of a field, and with bytes 1 and 3 there."""
        first = arith.shli(word, asm.const(self.lift)) if self.lift else word
        return [first, arith.shrui(word, asm.const(8 - self.lift))]

    def field(self, piece: int | Any) -> Any:
        """The field of a piece of the row, also of one that is known in the kernel only."""
        bits, code = self.plan.bits, asm.both(2**self.plan.bits - 1)
        half = asm.both(1) << self.lift >> 1 if self.lift else 0
        if isinstance(piece, int):
            shift = self.lift + bits * piece
            offset = -(2.0 ** (10 - shift) + self.middle) / 2**self.down
            return Field(
                asm.const(code << shift), asm.const(asm.both(MAGIC) | half << bits * piece),
                self.constant(2.0 ** -(shift + self.down)), self.constant(offset),
            )  # fmt: skip
        up = arith.muli(piece, asm.const(bits))
        mask = arith.shli(asm.const(code << self.lift), up)
        magic = asm.const(asm.both(MAGIC))
        magic = arith.ori(magic, arith.shli(asm.const(half), up)) if half else magic
        first = asm.both(ONE - ((self.lift + self.down) << 10))
        factor = arith.subi(asm.const(first), arith.muli(up, asm.const(asm.both(1 << 10))))
        offset = self.fma(
            factor, self.constant(-1024.0), self.constant(-self.middle / 2**self.down)
        )
        return Field(mask, magic, factor, offset)

    def level(self, place: Any, field: Any) -> Any:
        """Two codes less `middle`, or less nothing where there are zeros, or their levels."""
        x = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", place, field.mask, field.magic)
        u = self.fma(x, field.factor, field.offset)
        if not self.coefficients:
            return u
        *rest, value = map(self.constant, self.coefficients)
        square = self.mul(u, u) if rest else None
        for c in reversed(rest):
            value = self.fma(value, square, c)
        return self.mul(u, value)

    def offset(self, piece: int | None = None) -> Any:
        """What means multiply: 1."""
        return asm.const(asm.both(ONE))

    def scale(self, scale: Any) -> Any:
        """What the stored scale of two tokens or channels is to what `level` gives."""
        return scale

    def unit(self, scale: Any) -> Any:
        """The same of float32."""
        return scale

    def rest(self, scale: Any, second: Any) -> Any:
        """What scaled levels lack: the mean, or zeros times ``-scale``."""
        if not self.plan.has_zero:
            return second
        return asm.word("neg.f16x2 $0, $1;", self.mul(scale, second))

    def scaled(self, level: Any, scale: Any, rest: Any) -> Any:
        """An element of a fragment's registers."""
        x = self.mul(level, scale) if rest is None else self.fma(level, scale, rest)
        return asm.bits(x, ir.VectorType.get((2,), ir.F16Type.get()))

    def constant(self, x: float) -> Any:
        return asm.const(asm.both(int(np.float16(x).view(np.uint16))))

    def mul(self, a: Any, b: Any) -> Any:
        return asm.word("mul.rn.f16x2 $0, $1, $2;", a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return asm.word("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)


class FourLevels(Halves):
    """Four levels that mirror each other, by their high bytes: one is about 10 thirds of the other, as 10 is of 3.

    A byte permutation looks two of them up; the polynomial would be four operations in its place.
    """

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.step = (3 * plan.levels[2] + 10 * plan.levels[3]) / (3**2 + 10**2)
        self.table = asm.const(
            sum(int(np.float16(x).view(np.uint16)) >> 8 << 8 * i for i, x in enumerate(THIRDS))
        )

    def places(self, word: Any) -> list[Any]:
        """Bytes 0 and 2 as the low ones, and bytes 1 and 3."""
        return [asm.word("prmt.b32 $0, $1, $1, $2;", word, asm.const(s)) for s in (0x3120, 0x2031)]

    def field(self, piece: int | Any) -> Any:
        """By how much a place is shifted to the right for its code to begin at bit 4 of a byte."""
        if isinstance(piece, int):
            return 2 * piece - 4
        return arith.subi(arith.muli(piece, asm.const(2)), asm.const(4))

    def level(self, place: Any, field: Any) -> Any:
        """Two of -10, -3, 3 and 10."""
        if not isinstance(field, int):
            place = asm.word("shf.r.wrap.b32 $0, $1, $1, $2;", place, field)
        elif field:
            move = arith.shrui if field > 0 else arith.shli
            place = move(place, asm.const(abs(field)))
        chosen = asm.word(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", place, asm.const(0x3030), asm.const(0x0404)
        )
        return asm.word("prmt.b32 $0, $1, $2, $3;", self.table, asm.const(0), chosen)

    def scale(self, scale: Any) -> Any:
        return self.mul(scale, self.constant(self.step))

    def unit(self, scale: Any) -> Any:
        kind = ir.VectorType(scale.type)
        step = vector.broadcast(kind, arith.constant(kind.element_type, self.step))
        return arith.mulf(scale, step)


def halves_of(plan: Plan) -> Halves:
    return FourLevels(plan) if plan.kind == "odd" and plan.bits == 2 else Halves(plan)
