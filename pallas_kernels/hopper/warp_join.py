"""The sums of all warps of a block, joined and written; see `warps`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .fragments import Plan
from .in_place import unit_at
from .layout import COLUMN, SCALAR, WGMMA
from .softmax import fma, less, over_warp, store_pair
from .warps import QUERIES

EVERYONE = 15  # the barrier of all warps of a block
COLUMNS = 4  # joined at a time, each by a warp
PAD = 8  # behind a column, for the banks of shared memory


def join_scratch(warpgroups: int, width: int, interpret: bool) -> list[Any]:
    """What `join_warps` needs; in the interpreter what is the caller's."""
    if interpret:
        return [plgpu.SMEM((warpgroups, 2 + width, QUERIES), jnp.float32)]
    warps = 4 * warpgroups
    sizes = 2 * warps * QUERIES, warps * COLUMNS * (width + PAD)
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
    plan: Plan,
    row_bytes: int,
) -> None:
    """Writes the outputs of a block to rows ``row`` to ``row + count`` of ``out[R, H]``, and logarithms to `logs`.

    Args:
      outs, top, total: as `add_values` and `weigh_rows` give them.
      logs: of the denominators, to base 2, ``f32[R]``; as `top` began where no token was seen.
      plan, row_bytes: of the values.
    """
    warps, number, width = 4 * warpgroups, plgpu.RefType(), 16 * len(outs)

    @asm.inline(
        arg_types=([WGMMA] * len(outs), COLUMN, COLUMN, [number] * 2, number, number, SCALAR)
    )
    def run(ctx, outs, top, total, scratch, out, logs, row):
        small, large = map(asm.pointer, scratch)
        (top,), (total,), row = top.registers.flat, total.registers.flat, asm.scalar(row)
        _share(small, top, total, warps)
        own = arith.shrui(_thread(), asm.const(5))
        for first in range(0, count, COLUMNS):
            if first:
                _everyone(warps)
            _hand_over(large, [list(x.registers.flat) for x in outs], first)
            _everyone(warps)

            def write(first: int = first) -> list[Any]:
                share, log = _own_share(small, arith.addi(own, asm.const(first)), warps)
                line = arith.addi(row, arith.addi(own, asm.const(first)))
                _write_log(logs, line, log)
                _write_sums(large, own, share, warps, out, line, width, plan, row_bytes)
                return []

            asm.either(less(own, asm.const(min(COLUMNS, count - first))), [], write, list)

    run(outs, top, total, scratch, out, logs, row)


def _everyone(warps: int) -> None:
    code = f"bar.sync {EVERYONE}, {32 * warps};"
    mgpu.utils.inline_ptx(code, has_side_effects=True, convergent=True)


def _thread() -> Any:
    """Of the block."""
    return arith.index_cast(asm.i32(), asm.thread())


def _lane() -> Any:
    return arith.andi(_thread(), asm.const(31))


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


def _hand_over(large: Any, outs: list[list[Any]], first: int) -> None:
    """The sums of columns from `first` on, to ``f32[warps, 4, H + PAD]``: elements 2 g and 2 g + 1 of 16 together."""
    warp, (_, g, q) = arith.shrui(_thread(), asm.const(5)), asm.lanes()
    stride = 16 * len(outs) + PAD
    own = arith.subi(arith.muli(q, asm.const(2)), asm.const(first))
    inside = arith.cmpi(arith.CmpIPredicate.ult, own, asm.const(COLUMNS))
    line = arith.addi(arith.muli(warp, asm.const(COLUMNS)), own)
    start = arith.addi(arith.muli(line, asm.const(stride)), arith.muli(g, asm.const(2)))
    for i, rows in enumerate(outs):
        for e in range(2):
            place = asm.at(large, arith.addi(start, asm.const(16 * i + stride * e)), _f32())
            store_pair(place, [asm.extract(v, e) for v in rows], inside)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _own_share(small: Any, column: Any, warps: int) -> tuple[Any, Any]:
    """In lane w the factor of the w-th warp's sums of a column; and the logarithm of the column's denominator."""
    lane, zero, one = _lane(), *(arith.constant(_f32(), x) for x in (0.0, 1.0))
    at = arith.minui(lane, asm.const(warps - 1))
    at = arith.addi(arith.muli(at, asm.const(QUERIES)), column)
    load = lambda i: llvm.load(_f32(), asm.at(small, arith.addi(at, asm.const(i)), _f32()))
    top, total = load(0), load(warps * QUERIES)
    best = _over_lanes(arith.maxnumf, top)
    share = _approximate("ex2.approx.ftz", arith.subf(top, best))
    mine = arith.select(less(lane, asm.const(warps)), arith.mulf(total, share), zero)
    whole = _over_lanes(arith.addf, mine)
    none = arith.cmpf(arith.CmpFPredicate.OEQ, whole, zero)
    whole = arith.select(none, one, whole)
    log = arith.addf(best, _approximate("lg2.approx", whole))
    return arith.select(none, zero, arith.divf(share, whole)), log


def _approximate(what: str, x: Any) -> Any:
    return mgpu.utils.inline_ptx(f"{what}.f32 $0, $1;", x, result_types=_f32())


def _over_lanes(join: Any, x: Any) -> Any:
    for distance in (16, 8, 4, 2, 1):
        x = join(x, mgpu.utils.shfl_bfly(x, distance))
    return x


def _write_log(logs: Any, row: Any, log: Any) -> None:
    place = asm.at(asm.pointer(logs), arith.extsi(asm.i64(), row), _f32())
    first = arith.cmpi(arith.CmpIPredicate.eq, _lane(), asm.const(0))
    place = llvm.ptrtoint(asm.i64(), place)
    mgpu.utils.inline_ptx("@$2 st.global.f32 [$0], $1;", place, log, first, has_side_effects=True)


def _write_sums(
    large: Any, own: Any, share: Any, warps: int, out: Any, row: Any, width: int, plan: Plan,
    row_bytes: int,
) -> None:  # fmt: skip
    """Adds up what all warps handed over of the `own`-th column, four elements a lane, and writes it."""
    four = ir.VectorType.get((4,), _f32())
    lane, lanes = _lane(), width // 4
    element = arith.muli(arith.minui(lane, asm.const(lanes - 1)), asm.const(4))
    stride = width + PAD
    start = arith.addi(arith.muli(own, asm.const(stride)), element)
    total = vector.broadcast(four, arith.constant(_f32(), 0.0))
    for w in range(warps):
        place = asm.at(large, arith.addi(start, asm.const(w * COLUMNS * stride)), _f32())
        factor = mgpu.utils.inline_ptx(
            f"shfl.sync.idx.b32 $0, $1, {w}, 31, -1;", share, result_types=_f32(), convergent=True
        )
        total = fma(llvm.load(four, place, alignment=16), vector.broadcast(four, factor), total)
    unit = unit_at(plan, arith.divui(element, asm.const(row_bytes)))
    total = total if unit is None else arith.mulf(total, vector.broadcast(four, unit))
    line = arith.muli(arith.extsi(asm.i64(), row), asm.const64(width))
    place = asm.at(asm.pointer(out), arith.addi(line, arith.extsi(asm.i64(), element)), _f32())
    mgpu.utils.inline_ptx(
        "@$5 st.global.v4.f32 [$0], {$1, $2, $3, $4};", llvm.ptrtoint(asm.i64(), place),
        *(asm.extract(total, i) for i in range(4)), less(lane, asm.const(lanes)),
        has_side_effects=True,
    )  # fmt: skip
