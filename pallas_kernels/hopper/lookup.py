"""Two of 16 levels at once, from a table in shared memory.

The table has an entry for every pair of codes, two 16-bit floats in a word, and of every entry a copy for each lane of
a warp: lanes read different banks, whatever their codes are. One dot product of bytes makes the address of an entry.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, gpu, llvm

from . import asm

ENTRIES = 256
LINE = 128  # bytes of an entry's 32 copies
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

    @asm.inline(arg_types=(plgpu.RefType(),))
    def run(ctx, lookup):
        thread = arith.index_cast(asm.i32(), asm.thread())
        chunk = arith.muli(arith.andi(thread, asm.const(7)), asm.const(16))
        start = arith.addi(_address(lookup), chunk)
        first, rows = arith.shrui(thread, asm.const(3)), warpgroups * WARPGROUP // 8
        for done in range(0, ENTRIES, rows):
            entry = arith.andi(arith.addi(first, asm.const(done)), asm.const(ENTRIES - 1))
            place = arith.addi(start, arith.muli(entry, asm.const(LINE)))
            levels = _levels_of(entry, plan.levels, dtype)
            mgpu.utils.inline_ptx(
                "st.shared.v4.b32 [$0], {$1, $1, $1, $1};", place, levels, has_side_effects=True
            )
        gpu.barrier()

    run(lookup)


def own_copy(lookup: Any) -> Any:
    """Address of a thread's copy of the first entry."""
    lane = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))
    return arith.addi(_address(lookup), arith.muli(lane, asm.const(4)))


def look_up(own: Any, codes: Any, byte: int) -> Any:
    """The levels of two codes: in the high halves of bytes `byte` and ``byte + 2`` of a word whose low ones are 0."""
    strides = asm.const(LINE // 16 << 8 * byte | LINE << 8 * (byte + 2))
    place = asm.word("dp4a.u32.u32 $0, $1, $2, $3;", codes, strides, own)
    return asm.word("ld.shared.b32 $0, [$1];", place)


def _address(lookup: Any) -> Any:
    return llvm.ptrtoint(asm.i32(), asm.pointer(lookup))


def _levels_of(entry: Any, levels: tuple[float, ...], dtype: Any) -> Any:
    """Those of the low and of the high half of a byte, by byte permutations: low and high bytes apart."""
    table = [int(v) for v in np.asarray(levels, dtype).view(np.uint16)]
    pack = lambda values: asm.const(sum(v << 8 * i for i, v in enumerate(values)))
    quarter = lambda i, shift: pack([v >> shift & 0xFF for v in table[4 * i : 4 * i + 4]])
    permute = lambda a, b, s: asm.word("prmt.b32 $0, $1, $2, $3;", a, b, s)
    index = arith.andi(entry, asm.const(0x77))
    upper = arith.andi(arith.shrui(entry, asm.const(1)), asm.const(0x44))
    upper = arith.ori(upper, asm.const(0x10))

    def half(shift: int) -> Any:
        a, b, c, d = (quarter(i, shift) for i in range(4))
        return permute(permute(a, b, index), permute(c, d, index), upper)

    return permute(half(0), half(8), asm.const(0x5140))
