"""Levels of several codes at once, from a table in shared memory.

The table has an entry for every byte of codes, and of every entry as many copies as fill a line: lanes of a warp read
different banks, whatever their codes are. One dot product of bytes makes the address of an entry, of codes that lie two
bytes apart, as the halves of a register of two 16-bit floats do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, gpu, llvm

from . import asm

ENTRIES = 256
LINE = 128  # bytes of an entry's copies
WARPGROUP = 128  # threads


def lookup_bytes(plan: Any) -> int:
    """Bytes of shared memory that a block needs for the levels of a plan."""
    return ENTRIES * LINE if plan.kind == "levels" else 0


def lookup_scratch(plan: Any, interpret: bool) -> dict[str, Any]:
    """The table as scratch, ``lookup``; nothing where there is none."""
    words = 0 if interpret else lookup_bytes(plan) // 4
    return {"lookup": plgpu.SMEM((words,), jnp.int32)} if words else {}


def fill_lookup(lookup: Any, plan: Any, dtype: Any, warpgroups: int) -> None:
    """Writes the levels, by all the threads of a block, which then wait for each other; nothing where it is None."""
    if lookup is None:
        return
    words_of = {2: _words_of_four, 4: _words_of_sixteen}[plan.bits]

    @asm.inline(arg_types=(plgpu.RefType(),))
    def run(ctx, lookup):
        thread = arith.index_cast(asm.i32(), asm.thread())
        chunk = arith.muli(arith.andi(thread, asm.const(7)), asm.const(16))
        start = arith.addi(_address(lookup), chunk)
        first, rows = arith.shrui(thread, asm.const(3)), warpgroups * WARPGROUP // 8
        for done in range(0, ENTRIES, rows):
            entry = arith.andi(arith.addi(first, asm.const(done)), asm.const(ENTRIES - 1))
            place = arith.addi(start, arith.muli(entry, asm.const(LINE)))
            words = words_of(entry, plan.levels, dtype)
            mgpu.utils.inline_ptx(
                "st.shared.v4.b32 [$0], {$1, $2, $1, $2};",
                place, words[0], words[-1], has_side_effects=True,
            )  # fmt: skip
        gpu.barrier()

    run(lookup)


def levels_of(plan: Any, lookup: Any) -> Sixteen | Four:
    """What looks up the levels of a plan, in a kernel's code."""
    return {2: Four, 4: Sixteen}[plan.bits](lookup)


class Sixteen:
    """A byte is two codes of 4 bits; an entry is a word, and each lane has a copy."""

    def __init__(self, lookup: Any):
        self.own = arith.addi(_address(lookup), arith.muli(_lane(), asm.const(4)))

    def fields(self, pieces: Sequence[int | Any]) -> Any:
        """Where pieces of a row are in a byte, for `levels`; a piece may be known in the kernel only."""
        return [_less(4, 4, piece) for piece in pieces]

    def levels(self, word: Any, fields: Any) -> list[list[Any]]:
        """For each piece two registers: the levels of bytes 0 and 2 of a word, and of bytes 1 and 3."""
        codes = [arith.andi(_left(word, n), asm.const(0xF0F0F0F0)) for n in fields]
        return [[asm.word(LOAD, _entry(self.own, c, 4, o)) for o in range(2)] for c in codes]


class Four:
    """A byte is four codes of 2 bits, those of pieces i and i + 2 of two bytes; an entry is two words.

    A load of 8 bytes is made for half a warp at a time, so 16 copies are enough. Where a piece is alone, the other half
    of the lanes has its codes in the place of piece i + 2, and so the second word and banks of its own.
    """

    def __init__(self, lookup: Any):
        self.upper = arith.shrui(_lane(), asm.const(4))
        copy = arith.muli(arith.andi(_lane(), asm.const(15)), asm.const(8))
        self.own = arith.addi(_address(lookup), copy)

    def fields(self, pieces: Sequence[int | Any]) -> Any:
        """As `Sixteen` has them; several pieces are those of one or two i and of i + 2."""
        if len(pieces) > 1:
            return [_less(2, 2, piece) for piece in pieces[: len(pieces) // 2]]
        up = arith.muli(self.upper, asm.const(4))
        (piece,) = pieces
        piece = asm.const(piece) if isinstance(piece, int) else piece
        left = arith.addi(up, _less(2, 2, piece))
        mask, own = arith.shli(asm.const(0x0C0C0C0C), up), arith.addi(self.own, up)
        return left, mask, own

    def levels(self, word: Any, fields: Any) -> list[list[Any]]:
        """As `Sixteen` has them."""
        if isinstance(fields, tuple):
            left, mask, own = fields
            codes = arith.andi(_left(word, left), mask)
            return [[asm.word(LOAD, _entry(own, codes, 2, o)) for o in range(2)]]
        codes = [arith.andi(_left(word, n), asm.const(0xCCCCCCCC)) for n in fields]
        found = [[_load_two(_entry(self.own, c, 2, o)) for o in range(2)] for c in codes]
        return [[two[i] for two in of_bytes] for i in range(2) for of_bytes in found]


LOAD = "ld.shared.b32 $0, [$1];"


def _load_two(place: Any) -> list[Any]:
    code = "ld.shared.v2.b32 {$0, $1}, [$2];"
    return list(mgpu.utils.inline_ptx(code, place, result_types=[asm.i32()] * 2))


def _entry(own: Any, codes: Any, lowest: int, byte: int) -> Any:
    """The address for the codes of bytes `byte` and ``byte + 2``, which begin at bit `lowest`."""
    strides = asm.const(LINE >> lowest << 8 * byte | LINE << 8 * (byte + 2))
    return asm.word("dp4a.u32.u32 $0, $1, $2, $3;", codes, strides, own)


def _less(a: int, b: int, x: int | Any) -> int | Any:
    """``a - b * x``."""
    if isinstance(x, int):
        return a - b * x
    return arith.subi(asm.const(a), arith.muli(x, asm.const(b)))


def _left(word: Any, n: int | Any) -> Any:
    """A word shifted to the left; what comes in from the other side is of no use."""
    if not isinstance(n, int):
        return asm.word("shf.l.wrap.b32 $0, $1, $1, $2;", word, n)
    move = arith.shli if n > 0 else arith.shrui
    return move(word, asm.const(abs(n))) if n else word


def _lane() -> Any:
    return arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))


def _address(lookup: Any) -> Any:
    return llvm.ptrtoint(asm.i32(), asm.pointer(lookup))


def _permuted(a: Any, b: Any, selector: Any) -> Any:
    return asm.word("prmt.b32 $0, $1, $2, $3;", a, b, selector)


def _bytes_of(levels: tuple[float, ...], dtype: Any, shift: int) -> list[Any]:
    """Words of the levels' low bytes, or of their high ones."""
    table = np.asarray(levels, dtype).view(np.uint16) >> shift & 0xFF
    return [
        asm.const(int.from_bytes(bytes(four.tolist()), "little")) for four in table.reshape(-1, 4)
    ]


def _words_of_sixteen(entry: Any, levels: tuple[float, ...], dtype: Any) -> list[Any]:
    """The levels of the low and of the high half of a byte, by byte permutations: low and high bytes apart."""
    index = arith.andi(entry, asm.const(0x77))
    upper = arith.andi(arith.shrui(entry, asm.const(1)), asm.const(0x44))
    upper = arith.ori(upper, asm.const(0x10))

    def half(shift: int) -> Any:
        a, b, c, d = _bytes_of(levels, dtype, shift)
        return _permuted(_permuted(a, b, index), _permuted(c, d, index), upper)

    return [_permuted(half(0), half(8), asm.const(0x5140))]


def _words_of_four(entry: Any, levels: tuple[float, ...], dtype: Any) -> list[Any]:
    """The levels of the low two codes of a byte, and of the high two."""
    (low,), (high,) = (_bytes_of(levels, dtype, shift) for shift in (0, 8))

    def word(first: int) -> Any:
        selector = asm.const(0x4040)
        for i in range(2):
            code = arith.andi(arith.shrui(entry, asm.const(first + 2 * i)), asm.const(3))
            selector = arith.addi(selector, arith.muli(code, asm.const(0x11 << 8 * i)))
        return _permuted(low, high, selector)

    return [word(0), word(4)]
