"""The sums of all warps of a block, joined and written; see `warps`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .layout import COLUMN, SCALAR, WGMMA
from .softmax import exp2, less, over_warp, store_pair
from .warps import QUERIES

EVERYONE = 15  # the barrier of all warps of a block
ROUNDS = 2  # in which sums go through shared memory: half of them have room beside the tiles


def join_scratch(warpgroups: int, width: int, interpret: bool) -> list[Any]:
    """What `join_warps` needs; in the interpreter what is the caller's."""
    if interpret:
        return [plgpu.SMEM((warpgroups, 2 + width, QUERIES), jnp.float32)]
    warps = 4 * warpgroups
    sizes = 2 * warps * QUERIES, warps * width * QUERIES // ROUNDS
    return [plgpu.SMEM((n,), jnp.float32) for n in sizes]


def join_warps(
    outs: list[jax.Array],
    top: jax.Array,
    total: jax.Array,
    scratch: list[Any],
    out: Any,
    logs: Any,
    row: Any,
    count: int,
    warpgroups: int,
) -> None:
    """Writes the outputs of a block to rows ``row`` to ``row + count`` of ``out[R, H]``, and logarithms to `logs`.

    Args:
      outs, top, total: as `add_values` and `weigh_rows` give them.
      logs: of the denominators, to base 2, ``f32[R]``; as `top` began where no token was seen.
    """
    warps, number = 4 * warpgroups, plgpu.RefType()

    @asm.inline(
        arg_types=([WGMMA] * len(outs), COLUMN, COLUMN, [number] * 2, number, number, SCALAR)
    )
    def run(ctx, outs, top, total, scratch, out, logs, row):
        small, large = map(asm.pointer, scratch)
        (top,), (total,), row = top.registers.flat, total.registers.flat, asm.scalar(row)
        _share(small, top, total, warps)
        _everyone(warps)
        best, whole = _found(small, warps)
        _write_logs(logs, row, count, best, whole)
        factor = arith.mulf(exp2(arith.subf(top, best)), _inverse(whole))
        blocks = len(outs) // ROUNDS
        for i in range(ROUNDS):
            if i:
                _everyone(warps)
            some = [v for x in outs[i * blocks : (i + 1) * blocks] for v in x.registers.flat]
            _hand_over(large, [arith.mulf(v, factor) for v in some])
            _everyone(warps)
            _write_sums(large, warps, 32 * len(some), out, row, count, 16 * i * blocks)

    run(outs, top, total, scratch, out, logs, row)


def _everyone(warps: int) -> None:
    code = f"bar.sync {EVERYONE}, {32 * warps};"
    mgpu.utils.inline_ptx(code, has_side_effects=True, convergent=True)


def _pair() -> ir.Type:
    return ir.VectorType.get((2,), ir.F32Type.get())


def _thread() -> Any:
    """Of the block."""
    return arith.index_cast(asm.i32(), asm.thread())


def _share(small: Any, top: Any, total: Any, warps: int) -> None:
    """A warp's greatest scores and totals, to ``f32[2, warps, 8]``."""
    _, g, q = asm.lanes()
    first = arith.cmpi(arith.CmpIPredicate.eq, g, asm.const(0))
    (whole,) = over_warp(arith.addf, [[total]])
    warp = arith.shrui(_thread(), asm.const(5))
    at = arith.addi(arith.muli(warp, asm.const(QUERIES)), arith.muli(q, asm.const(2)))
    for i, pair in enumerate(([asm.extract(top, e) for e in range(2)], whole)):
        own = arith.addi(at, asm.const(i * warps * QUERIES))
        store_pair(asm.at(small, own, ir.F32Type.get()), pair, first)


def _found(small: Any, warps: int) -> tuple[Any, Any]:
    """The greatest score of all, and the total relative to it, of a thread's columns."""
    own = arith.muli(asm.lanes()[2], asm.const(2))

    def load(i: int) -> Any:
        place = asm.at(small, arith.addi(own, asm.const(i * QUERIES)), ir.F32Type.get())
        return llvm.load(_pair(), place, alignment=8)

    tops = [load(w) for w in range(warps)]
    best = functools.reduce(arith.maxnumf, tops)
    shares = [arith.mulf(load(warps + w), exp2(arith.subf(x, best))) for w, x in enumerate(tops)]
    return best, functools.reduce(arith.addf, shares)


def _inverse(total: Any) -> Any:
    """1 over it, or 0."""
    zero, one = (vector.broadcast(_pair(), arith.constant(ir.F32Type.get(), x)) for x in (0.0, 1.0))
    none = arith.cmpf(arith.CmpFPredicate.OEQ, total, zero)
    return arith.select(none, zero, arith.divf(one, arith.select(none, one, total)))


def _write_logs(logs: Any, row: Any, count: int, best: Any, whole: Any) -> None:
    f32, first = ir.F32Type.get(), arith.cmpi(arith.CmpIPredicate.ult, _thread(), asm.const(4))
    zero, one = (arith.constant(f32, x) for x in (0.0, 1.0))
    for e in range(2):
        total, top = asm.extract(whole, e), asm.extract(best, e)
        none = arith.cmpf(arith.CmpFPredicate.OEQ, total, zero)
        total = arith.select(none, one, total)
        log = mgpu.utils.inline_ptx("lg2.approx.f32 $0, $1;", total, result_types=f32)
        head = arith.addi(arith.muli(asm.lanes()[2], asm.const(2)), asm.const(e))
        inside = arith.andi(first, less(head, asm.const(count)))
        place = arith.extsi(asm.i64(), arith.addi(row, head))
        _store_if(logs, place, arith.addf(log, top), inside)


def _hand_over(large: Any, registers: list[Any]) -> None:
    """A thread's pairs to shared memory: by warps, and of a warp by pairs."""
    thread = _thread()
    warp, lane = arith.shrui(thread, asm.const(5)), arith.andi(thread, asm.const(31))
    mine = arith.addi(arith.muli(warp, asm.const(32 * len(registers))), lane)
    for i, v in enumerate(registers):
        place = asm.at(large, arith.addi(mine, asm.const(32 * i)), _pair())
        llvm.store(v, place, alignment=8)


def _write_sums(
    large: Any, warps: int, pairs: int, out: Any, row: Any, count: int, first: int
) -> None:
    """Adds up what all warps handed over, and writes elements from `first` on."""
    stride = asm.const64(ir.MemRefType(out.type).shape[1])
    for start in range(0, pairs, 32 * warps):
        index = arith.addi(_thread(), asm.const(start))
        there = less(index, asm.const(pairs))
        index = arith.minui(index, asm.const(pairs - 1))
        at = [asm.at(large, arith.addi(index, asm.const(w * pairs)), _pair()) for w in range(warps)]
        total = functools.reduce(arith.addf, [llvm.load(_pair(), p, alignment=8) for p in at])
        bits = lambda shift, mask, i=index: arith.andi(
            arith.shrui(i, asm.const(shift)), asm.const(mask)
        )
        # a pair's number: 16 elements, row 2 g + r of them by g and r, and two heads
        sixteen = arith.muli(arith.shrui(index, asm.const(6)), asm.const(16))
        element = arith.addi(
            arith.addi(sixteen, bits(5, 1)), arith.addi(bits(1, 14), asm.const(first))
        )
        for e in range(2):
            head = arith.addi(arith.muli(bits(0, 3), asm.const(2)), asm.const(e))
            line = arith.muli(arith.extsi(asm.i64(), arith.addi(row, head)), stride)
            place = arith.addi(line, arith.extsi(asm.i64(), element))
            inside = arith.andi(there, less(head, asm.const(count)))
            _store_if(out, place, asm.extract(total, e), inside)


def _store_if(ref: Any, at: Any, x: Any, inside: Any) -> None:
    place = llvm.ptrtoint(asm.i64(), asm.at(asm.pointer(ref), at, ir.F32Type.get()))
    mgpu.utils.inline_ptx("@$2 st.global.f32 [$0], $1;", place, x, inside)
