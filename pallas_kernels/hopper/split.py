"""Rows of 16-bit floats in two digits of 8 bits, put into shared memory by the warpgroup that multiplies them.

Of every unit of columns a row is rounded to 16 bits, relative to its largest element there. A warp takes lines of 128
columns of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .layout import SCALAR, sync, tiled
from .signed_bytes import RADIX, permute_bytes

LARGEST = 127 * RADIX + 127  # of what two digits make
TINY = 1e-30  # what is below it everywhere in a unit counts as 0
LINE = 128  # columns that a warp takes
WARPS = 4
TOGETHER = 4  # lines that a warp has in flight


@dataclasses.dataclass(frozen=True)
class Split:
    """How rows are split.

    Attributes:
      rows, block: of x, and those that there is room for.
      pieces, piece: equal parts of a row, and columns of one.
      stages: of `LINE` columns of every piece.
      unit: columns that have a scale: 64 or 128.
      factor: by which the other operand's numbers are too large.
      terms: facts of a unit: a scale over `factor` and, where it is 2, the sum of the digits' numbers times it.
    """

    rows: int
    block: int
    pieces: int
    piece: int
    stages: int
    unit: int
    factor: int
    terms: int

    @property
    def units(self) -> int:
        """Of a stage's columns of a piece."""
        return LINE // self.unit

    @property
    def facts(self) -> int:
        """Numbers in all."""
        return self.stages * self.pieces * self.units * self.terms * self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the digits: the high one of each row before its low one, columns as `permute_bytes` has them."""
        return self.stages, self.pieces, 2 * self.block, LINE

    def fact(self, stage: Any, piece: Any, unit: Any) -> Any:
        """Where a unit's facts begin, each of them for all rows."""
        place = (stage * self.pieces + piece) * self.units + unit
        return place * (self.terms * self.block)

    def __call__(
        self, x: Any, digits: Any, facts: Any, row: Any, last: Any, first: Any, interpret: bool
    ) -> None:
        """Fills `digits` and `facts`; the warpgroup may multiply them then.

        Args:
          x: 16-bit floats in global memory, ``[rows, K]``.
          digits, facts: the warpgroup's own, ``int8[shape]`` and ``f32[facts]`` of shared memory.
          row, last: the first row, and the last that there is.
          first: stage of the row of x.
        """
        run = self._plainly if interpret else self._by_warps
        count = self.stages * self.pieces * self.rows
        steps = count if interpret else -(-count // (WARPS * TOGETHER))
        lax.fori_loop(0, steps, lambda i, _: run(i, x, digits, facts, row, last, first), None)
        if not interpret:
            plgpu.commit_smem()
        sync(interpret)

    def _plainly(
        self, i: Any, x: Any, digits: Any, facts: Any, row: Any, last: Any, first: Any
    ) -> None:
        r, place = lax.rem(i, self.rows), lax.div(i, self.rows)
        piece, stage = lax.rem(place, self.pieces), lax.div(place, self.pieces)
        column = (first + stage) * LINE + jnp.arange(LINE)
        own = x[jnp.minimum(row + r, last)].astype(jnp.float32)
        found = jnp.take(own, piece * self.piece + jnp.minimum(column, self.piece - 1))
        found = jnp.where(column < self.piece, found, 0).reshape(self.units, self.unit)
        top = jnp.max(jnp.abs(found), axis=1)
        number = jnp.round(found * (LARGEST / jnp.where(top < TINY, 1.0, top))[:, None])
        high = jnp.floor((number + RADIX // 2) / RADIX)
        for digit, values in enumerate((high, number - RADIX * high)):
            digits[stage, piece, 2 * r + digit] = permute_bytes(values.reshape(LINE)).astype(
                jnp.int8
            )
        known = top / (LARGEST * self.factor), number.sum(1) * self.factor
        for unit in range(self.units):
            for term in range(self.terms):
                facts[self.fact(stage, piece, unit) + term * self.block + r] = known[term][unit]

    def _by_warps(
        self, i: Any, x: Any, digits: Any, facts: Any, row: Any, last: Any, first: Any
    ) -> None:
        @asm.inline(
            arg_types=(
                plgpu.RefType(),
                plgpu.RefType(tiled(jnp.int8, 64)),
                plgpu.RefType(),
                *[SCALAR] * 4,
            )
        )
        def run(ctx, x, digits, facts, step, row, last, first):
            thread = arith.index_cast(asm.i32(), asm.thread())
            lane = arith.andi(thread, asm.const(31))
            warp = arith.andi(arith.shrui(thread, asm.const(5)), asm.const(WARPS - 1))
            start = arith.addi(arith.muli(asm.scalar(step), asm.const(WARPS * TOGETHER)), warp)
            lines = [self._line(arith.addi(start, asm.const(WARPS * j))) for j in range(TOGETHER)]
            at = asm.scalar(row), asm.scalar(last), asm.scalar(first), lane
            values = [self._load(x, *line, *at) for line in lines]
            for (r, place), own in zip(lines, values):
                numbers, *known = self._numbers(own)
                self._store_digits(digits, numbers, lane, r, place)
                self._store_facts(facts, known, lane, r, place)

        run(x, digits, facts, i, row, last, first)

    def _line(self, i: Any) -> tuple[Any, Any]:
        """The row, and the place among stages and pieces, of the i-th `LINE` columns; the last ones are done again."""
        i = arith.minui(i, asm.const(self.stages * self.pieces * self.rows - 1))
        return arith.remui(i, asm.const(self.rows)), arith.divui(i, asm.const(self.rows))

    def _load(
        self, x: Any, r: Any, place: Any, row: Any, last: Any, first: Any, lane: Any
    ) -> list[Any]:
        """Four neighbours in float32, 0 behind the end of a piece."""
        c, kind, f32 = asm.const, asm.element(x), ir.F32Type.get()
        stage = arith.addi(first, arith.divui(place, c(self.pieces)))
        column = arith.addi(arith.muli(stage, c(LINE)), arith.muli(lane, c(4)))
        inside = arith.cmpi(arith.CmpIPredicate.ult, column, c(self.piece))
        piece = arith.muli(arith.remui(place, c(self.pieces)), c(self.piece))
        column = arith.addi(piece, arith.minui(column, c(self.piece - 4)))
        own = arith.extsi(asm.i64(), arith.minui(arith.addi(row, r), last))
        own = arith.muli(own, asm.const64(ir.MemRefType(x.type).shape[1]))
        pointer = asm.at(asm.pointer(x), arith.addi(own, arith.extsi(asm.i64(), column)), kind)
        four = llvm.load(ir.VectorType.get((4,), kind), pointer, alignment=8)
        return [
            arith.select(inside, arith.extf(f32, asm.extract(four, j)), _number(0))
            for j in range(4)
        ]

    def _numbers(self, values: list[Any]) -> tuple[list[Any], Any, Any]:
        """Four integers of 16 bits, the scale of the unit, and the sum of all its integers."""
        f32 = ir.F32Type.get()
        sizes = [arith.andi(asm.bits(v, asm.i32()), asm.const(0x7FFFFFFF)) for v in values]
        top = self._over_unit(arith.maxui, _folded(arith.maxui, sizes))
        top = asm.bits(top, f32)
        small = arith.cmpf(arith.CmpFPredicate.OLT, top, _number(TINY))
        inverse = asm.bits(
            asm.word(
                "rcp.approx.ftz.f32 $0, $1;",
                asm.bits(arith.select(small, _number(1), top), asm.i32()),
            ),
            f32,
        )
        inverse = arith.mulf(inverse, _number(LARGEST))
        rounded = [asm.word("cvt.rni.s32.f32 $0, $1;", arith.mulf(v, inverse)) for v in values]
        scale = arith.mulf(top, _number(1 / (LARGEST * self.factor)))
        if self.terms == 1:
            return rounded, scale, None
        total = self._over_unit(arith.addi, _folded(arith.addi, rounded))
        return rounded, scale, arith.mulf(arith.sitofp(f32, total), _number(self.factor))

    def _over_unit(self, add: Any, x: Any) -> Any:
        """What all threads of a unit have."""
        step = self.unit // 8
        while step:
            x = add(x, asm.word("shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", x, asm.const(step)))
            step //= 2
        return x

    def _store_digits(self, digits: Any, numbers: list[Any], lane: Any, r: Any, place: Any) -> None:
        """Writes a word of each digit; `place` is of the stage and piece."""
        c = asm.const
        more = [arith.addi(n, c(RADIX // 2)) for n in numbers]
        low, high = _packed(numbers, 0x0040), _packed(more, 0x0051)
        t, q = arith.andi(lane, c(3)), arith.andi(arith.shrui(lane, c(2)), c(3))
        line = arith.addi(
            arith.muli(place, c(self.block // 4)), arith.shrui(r, c(2))
        )  # 8 rows of digits
        line = arith.addi(arith.muli(line, c(2)), arith.shrui(lane, c(4)))  # 64 columns of them
        inner = arith.andi(r, c(3))
        start = arith.addi(arith.muli(line, c(8 * 64)), arith.muli(inner, c(2 * 64)))
        start = arith.addi(start, arith.muli(arith.xori(t, inner), c(16)))  # the swizzle
        start = arith.addi(start, arith.muli(q, c(4)))
        for digit, word in enumerate((high, low)):
            to = _shared(digits, arith.addi(start, c(64 * digit)))
            mgpu.utils.inline_ptx("st.shared.b32 [$0], $1;", to, word, has_side_effects=True)

    def _store_facts(self, facts: Any, known: list[Any], lane: Any, r: Any, place: Any) -> None:
        """By one thread of a unit."""
        c, threads = asm.const, self.unit // 4
        unit = arith.addi(arith.muli(place, c(self.units)), arith.divui(lane, c(threads)))
        at = arith.addi(arith.muli(unit, c(self.terms * self.block)), r)
        leads = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, c(threads)), c(0))
        for term, fact in enumerate(known[: self.terms]):
            to = _shared(facts, arith.muli(arith.addi(at, c(term * self.block)), c(4)))
            word = asm.bits(fact, asm.i32())
            mgpu.utils.inline_ptx(
                "@$2 st.shared.b32 [$0], $1;", to, word, leads, has_side_effects=True
            )


def _number(x: float) -> Any:
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, float(x)))


def _shared(ref: Any, offset: Any) -> Any:
    return arith.addi(llvm.ptrtoint(asm.i32(), asm.pointer(ref)), offset)


def _folded(add: Any, values: list[Any]) -> Any:
    return add(add(values[0], values[1]), add(values[2], values[3]))


def _packed(values: list[Any], pick: int) -> Any:
    """A byte of each of four words."""
    permute = lambda a, b, s: asm.word("prmt.b32 $0, $1, $2, $3;", a, b, asm.const(s))
    a, b, c, d = values
    return permute(permute(a, b, pick), permute(c, d, pick), 0x5410)
