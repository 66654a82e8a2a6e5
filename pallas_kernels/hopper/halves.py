"""Codes as float16, two in a word, taken from where they lie.

A code anywhere in the low ten bits of a half goes over the mantissa of 1024 by one logical operation, without a shift;
one multiply-add undoes its place and takes the middle off, exactly. Levels that mirror each other are an odd polynomial
of that, so that looking them up costs the arithmetic units nothing that integers need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from . import asm
from .fragments import Plan
from .polynomial import odd_polynomial

ONE, MAGIC = 0x3C00, 0x6400  # the bits of 1 and 1024


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
        """The word with bytes 0 and 2 in the place of a `Field`, and with bytes 1 and 3 there."""
        first = arith.shli(word, asm.const(self.lift)) if self.lift else word
        return [first, arith.shrui(word, asm.const(8 - self.lift))]

    def field(self, piece: int | Any) -> Field:
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

    def level(self, word: Any, field: Field) -> Any:
        """Two codes less `middle`, or less nothing where there are zeros, or their levels."""
        x = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", word, field.mask, field.magic)
        u = self.fma(x, field.factor, field.offset)
        if not self.coefficients:
            return u
        *rest, value = map(self.constant, self.coefficients)
        square = self.mul(u, u) if rest else None
        for c in reversed(rest):
            value = self.fma(value, square, c)
        return self.mul(u, value)

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
