"""Codes as float16, two in a word, taken from where they lie.

A code anywhere in the low ten bits of a half goes over the mantissa of 1024 by one logical operation, without a shift;
one multiply-add undoes its place and takes the middle off, exactly. Levels are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from . import asm
from .fragments import Plan
from .lookup import levels_of

ONE, MAGIC = 0x3C00, 0x6400  # the bits of 1 and 1024


class Field(NamedTuple):
    """How a code is taken from a word: ``(word & mask | MAGIC) * factor + offset``, in halves."""

    mask: Any
    factor: Any
    offset: Any


class Halves:
    """Makes numbers of the codes of a plan of one stream."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.middle = 0 if plan.has_zero else plan.middle

    def fields(self, pieces: Sequence[int | Any]) -> Any:
        """Where pieces of a row are in a word, for `levels`; a piece may be known in the kernel only."""
        return list(map(self._field, pieces))

    def _field(self, piece: int | Any) -> Field:
        bits, code = self.plan.bits, asm.both(2**self.plan.bits - 1)
        if isinstance(piece, int):
            shift = bits * piece
            offset = self.constant(-(2.0 ** (10 - shift) + self.middle))
            return Field(asm.const(code << shift), self.constant(2.0**-shift), offset)
        up = arith.muli(piece, asm.const(bits))
        mask = arith.shli(asm.const(code), up)
        factor = arith.muli(up, asm.const(asm.both(1 << 10)))
        factor = arith.subi(asm.const(asm.both(ONE)), factor)
        offset = self.fma(factor, self.constant(-1024.0), self.constant(-self.middle))
        return Field(mask, factor, offset)

    def levels(self, word: Any, fields: Any) -> list[list[Any]]:
        """For each piece two registers, of bytes 0 and 2 of a word and of 1 and 3: codes less `middle`, or levels."""
        places = word, arith.shrui(word, asm.const(8))
        return [[self._number(place, field) for place in places] for field in fields]

    def _number(self, place: Any, field: Field) -> Any:
        magic = asm.const(asm.both(MAGIC))
        x = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", place, field.mask, magic)
        return self.fma(x, field.factor, field.offset)

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


class _Levels(Halves):
    """Levels that are looked up."""

    def __init__(self, plan: Plan, lookup: Any):
        super().__init__(plan)
        self.table = levels_of(plan, lookup)

    def fields(self, pieces: Sequence[int | Any]) -> Any:
        return self.table.fields(pieces)

    def levels(self, word: Any, fields: Any) -> list[list[Any]]:
        return self.table.levels(word, fields)


def halves_of(plan: Plan, *lookup: Any) -> Halves:
    """`lookup`: the plan's table, where it has one."""
    return _Levels(plan, *lookup) if lookup else Halves(plan)
