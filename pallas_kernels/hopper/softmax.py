"""An online softmax over the rows of tiles: a column is a query, and a thread has two rows of it in each tile.

What a column has one of, its greatest score, is a `COLUMN`; sums over rows stay what each thread has of its own rows
until `column_sums`. Scores are to base 2.

Rows are tokens. With `runs` 0, row ``16 w + g + 8 r`` of tile t is token ``64 t + 16 w + g + 8 r``; with more, a warp
has so many runs of 16 tokens, one in each tile, as `expand_channels` gives them: token ``16 (runs w + t) + 2 g + r``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm
from .layout import COLUMN, ROWS, SCALAR, WGMMA, tiled

Scores = list[jax.Array]  # f32[64, W] of each tile


def column(width: int, x: float) -> jax.Array:
    """``f32[W]`` of one number."""
    return plgpu.layout_cast(jnp.full((width,), x, jnp.float32), COLUMN)


def zeros(width: int) -> jax.Array:
    """``f32[64, width]``."""
    return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), WGMMA)


def in_rows(x: jax.Array) -> jax.Array:
    """``f32[W]`` in each of 64 rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, *x.shape), (1,)), WGMMA)


def hide(
    scores: Scores, first: Any, low: Any, high: Any, never: float, runs: int, interpret: bool
) -> Scores:
    """Scores of tokens before `low` and from `high` on become `never`. Tiles that have none of those take a short way.

    Args:
      first: token of the first tile; the others follow.
    """
    if interpret:
        at = [first + token for token in _tokens(runs, len(scores))]
        return [jnp.where(((a >= low) & (a < high))[:, None], x, never) for a, x in zip(at, scores)]

    @asm.inline(
        arg_types=([WGMMA] * len(scores), SCALAR, SCALAR, SCALAR), return_type=_like(scores)
    )
    def run(ctx, scores, first, low, high):
        first, low, high = map(asm.scalar, (first, low, high))
        last = arith.addi(first, asm.const(ROWS * len(scores)))
        cut = arith.ori(less(first, low), less(high, last))
        registers = [v for x in scores for v in x.registers.flat]

        def hidden() -> list[Any]:
            own = arith.addi(first, _first_token(runs))
            at = [arith.addi(own, asm.const(i)) for i in _steps(runs, scores)]
            behind = [arith.cmpi(arith.CmpIPredicate.sge, i, high) for i in at]
            outside = [arith.ori(less(i, low), x) for i, x in zip(at, behind)]
            return _hidden(outside, registers, never)

        kinds = [v.type for v in registers]
        return _split(asm.either(cut, kinds, hidden, lambda: registers), scores)

    return run(scores, first, low, high)


def hide_unset(
    scores: Scores, words: Any, row: Any, tile: Any, never: float, runs: int, interpret: bool
) -> Scores:
    """Scores of tokens whose bit is not set become `never`.

    Args:
      words: ``int32[R, S / 32]`` in global memory, the first token lowest.
      row: of `words`.
      tile: the number of the first tile, of 64 tokens.
    """
    if interpret:
        at = [
            2 * ROWS * (tile // 2) + ROWS * (tile % 2) + token
            for token in _tokens(runs, len(scores))
        ]
        flags = [((words[row, :][i // 32] >> (i % 32)) & 1) != 0 for i in at]
        return [jnp.where(flag[:, None], x, never) for flag, x in zip(flags, scores)]

    @asm.inline(
        arg_types=([WGMMA] * len(scores), plgpu.RefType(), SCALAR, SCALAR),
        return_type=_like(scores),
    )
    def run(ctx, scores, words, row, tile):
        first, stride = _first_token(runs), ir.MemRefType(words.type).shape[1]
        start = arith.addi(
            arith.muli(asm.scalar(row), asm.const(stride)),
            arith.muli(asm.scalar(tile), asm.const(2)),
        )
        outside = []
        for i in _steps(runs, scores):
            token = arith.addi(first, asm.const(i))
            place = arith.addi(start, arith.shrui(token, asm.const(5)))
            place = asm.at(asm.pointer(words), arith.extsi(asm.i64(), place), asm.i32())
            word = arith.shrui(llvm.load(asm.i32(), place), arith.andi(token, asm.const(31)))
            bit = arith.andi(word, asm.const(1))
            outside.append(arith.cmpi(arith.CmpIPredicate.eq, bit, asm.const(0)))
        registers = [v for x in scores for v in x.registers.flat]
        return _split(_hidden(outside, registers, never), scores)

    return run(scores, words, row, tile)


def store_scores(
    out: Any, scores: Scores, row: Any, column: Any, n: int, runs: int, interpret: bool
) -> None:
    """The first `n` columns, to ``out[row + i, column + token]``, float32 in global memory."""
    if interpret:
        found = in_order(scores, runs)[:n]
        out[pl.ds(row, n), pl.ds(column, found.shape[1])] = found
        return

    @asm.inline(arg_types=(plgpu.RefType(), [WGMMA] * len(scores), SCALAR, SCALAR))
    def run(ctx, ref, scores, row, column):
        stride, f32 = asm.const64(ir.MemRefType(ref.type).shape[1]), ir.F32Type.get()
        own = arith.extsi(asm.i64(), arith.addi(asm.scalar(column), _first_token(runs)))
        head = arith.muli(asm.lanes()[2], asm.const(2))
        rows = [v for x in scores for v in x.registers.reshape(-1, 2).T]
        for step, vectors in zip(_steps(runs, scores), rows):
            for octet, v in enumerate(vectors):
                for e in range(2):
                    i = arith.addi(head, asm.const(8 * octet + e))
                    line = arith.extsi(asm.i64(), arith.addi(asm.scalar(row), i))
                    place = arith.addi(arith.addi(arith.muli(line, stride), own), asm.const64(step))
                    place = llvm.ptrtoint(asm.i64(), asm.at(asm.pointer(ref), place, f32))
                    inside = less(i, asm.const(n))
                    mgpu.utils.inline_ptx(
                        "@$2 st.global.f32 [$0], $1;", place, asm.extract(v, e), inside
                    )

    run(out, scores, row, column)


def store_weights(to: Any, weights: jax.Array, runs: int, interpret: bool) -> None:
    """Weights ``f32[64, W]`` as the swizzled tile ``f16[W, 64]`` in shared memory, tokens in their order.

    Args:
      runs: 0 or 1.
    """
    if interpret:
        to[...] = in_order([weights], runs).astype(to.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(tiled(to.dtype)), WGMMA))
    def run(ctx, to, weights):
        base, byte, f16 = asm.pointer(to), ir.IntegerType.get_signless(8), asm.element(to)
        first, q = _first_token(runs), asm.lanes()[2]
        rows, together = weights.registers.reshape(-1, 2), 2 if runs else 1  # tokens in a word
        for octet in range(len(rows)):
            for e in range(2):
                head = arith.addi(arith.muli(q, asm.const(2)), asm.const(e))
                line = arith.addi(arith.muli(head, asm.const(128)), asm.const(1024 * octet))
                for r in range(0, 2, together):
                    token = arith.addi(first, asm.const(8 * r))
                    chunk = arith.xori(arith.shrui(token, asm.const(3)), head)
                    rest = arith.muli(arith.andi(token, asm.const(7)), asm.const(2))
                    own = arith.addi(arith.muli(chunk, asm.const(16)), rest)
                    found = [asm.extract(v, e) for v in rows[octet, r : r + together]]
                    pair = asm.vector_of(ir.VectorType.get((together,), ir.F32Type.get()), found)
                    made = arith.truncf(ir.VectorType.get((together,), f16), pair)
                    llvm.store(made, asm.at(base, arith.addi(line, own), byte))

    run(to, weights)


def spread_max(scores: jax.Array, scratch: Any, interpret: bool) -> None:
    """The greatest score of each column in a warp's rows, to shared memory, and a barrier: for `weigh`.

    Args:
      scratch: ``f32[4, W]``. A barrier stands between its last reads and this.
    """
    if interpret:
        scratch[...] = jnp.broadcast_to(scores.max(0), scratch.shape)
        return

    @asm.inline(arg_types=(WGMMA, plgpu.RefType()))
    def run(ctx, scores, scratch):
        _store_warp(scratch, over_warp(arith.maxnumf, list(scores.registers.reshape(-1, 2).T)))
        mgpu.utils.warpgroup_barrier()

    run(scores, scratch)


def weigh(
    scores: jax.Array, top: jax.Array, scratch: Any, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """After `spread_max`: the greatest scores so far, what sums so far are to be multiplied by, and weights.

    Args:
      top: the greatest scores before, ``f32[W]``.

    Returns:
      ``f32[W]``, ``f32[W]``, and ``exp2(scores - greatest)``.
    """
    if interpret:
        best = jnp.maximum(top, scratch[...].max(0))
        return best, jnp.exp2(top - best), jnp.exp2(scores - best)
    whole = plgpu.ShapeDtypeStruct(top.shape, jnp.float32, layout=COLUMN)

    @asm.inline(
        arg_types=(WGMMA, COLUMN, plgpu.RefType()), return_type=(whole, whole, *_like([scores]))
    )
    def run(ctx, scores, top, scratch):
        best, old = [], []
        for before, found in zip(top.registers.flat, _load_warps(arith.maxnumf, scratch)):
            best.append(arith.maxnumf(before, found))
            old.append(exp2(arith.subf(before, best[-1])))
        rows = scores.registers.reshape(-1, 2)
        weights = np.empty_like(rows)
        for (octet, r), v in np.ndenumerate(rows):
            weights[octet, r] = exp2(arith.subf(v, best[octet]))
        columns = (
            asm.array(np.array(x, dtype=object), COLUMN, tuple(top.shape)) for x in (best, old)
        )
        return (*columns, asm.array(weights, WGMMA, tuple(scores.shape)))

    return run(scores, top, scratch)


def add_rows(total: jax.Array, old: jax.Array, weights: jax.Array, interpret: bool) -> jax.Array:
    """``total * old`` and the weights of a thread's own rows: ``f32[W]``, to be summed by `column_sums`."""
    if interpret:
        return total * old + weights.sum(0)

    @asm.inline(
        arg_types=(COLUMN, COLUMN, WGMMA),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=COLUMN),
    )
    def run(ctx, total, old, weights):
        rows = weights.registers.reshape(-1, 2)
        out = np.empty(len(rows), dtype=object)
        for octet, (x, factor) in enumerate(zip(total.registers.flat, old.registers.flat)):
            out[octet] = arith.addf(fma(x, factor, rows[octet, 0]), rows[octet, 1])
        return asm.array(out, COLUMN, tuple(total.shape))

    return run(total, old, weights)


def column_sums(total: jax.Array, scratch: Any, interpret: bool) -> jax.Array:
    """The sums of what all threads have of a column, ``f32[W]``; see `spread_max` for `scratch`."""
    if interpret:
        return total

    @asm.inline(
        arg_types=(COLUMN, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=COLUMN),
    )
    def run(ctx, total, scratch):
        _store_warp(scratch, over_warp(arith.addf, [list(total.registers.flat)]))
        mgpu.utils.warpgroup_barrier()
        out = np.array(_load_warps(arith.addf, scratch), dtype=object)
        return asm.array(out, COLUMN, tuple(total.shape))

    return run(total, scratch)


def hand_over(to: Any, sums: tuple[jax.Array, ...], interpret: bool) -> None:
    """What a warpgroup has in registers to shared memory, for `taken`.

    Args:
      to: ``f32[n]``, of `words` elements.
      sums: each a `COLUMN` or ``f32[64, W]``.
    """
    if interpret:
        flat = jnp.concatenate([x.reshape(-1) for x in sums])
        to[...] = jnp.pad(flat, (0, to.shape[0] - flat.size))
        return

    @asm.inline(arg_types=(plgpu.RefType(), [_layout(x) for x in sums]))
    def run(ctx, to, sums):
        for place, v in zip(_places(to), [v for x in sums for v in x.registers.flat]):
            llvm.store(v, place, alignment=8)

    run(to, list(sums))


def taken(ref: Any, like: tuple[jax.Array, ...], interpret: bool) -> list[jax.Array]:
    """What another warpgroup's `hand_over` put there, after a barrier of both."""
    if interpret:
        out, start = [], 0
        for x in like:
            out.append(ref[pl.ds(start, x.size)].reshape(x.shape))
            start += x.size
        return out
    shapes = [plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=_layout(x)) for x in like]

    @asm.inline(arg_types=(plgpu.RefType(),), return_type=shapes)
    def run(ctx, ref):
        places, pair = _places(ref), ir.VectorType.get((2,), ir.F32Type.get())
        out = []
        for x in like:
            found = [llvm.load(pair, next(places), alignment=8) for _ in range(_pairs(x))]
            out.append(asm.array(np.array(found, dtype=object), _layout(x), tuple(x.shape)))
        return out

    return run(ref)


def words(width: int, tiles: int) -> int:
    """Elements that `hand_over` needs for two columns and some tiles, of `width` queries."""
    return 256 * (2 * (width // 8) + tiles * (width // 4))


def _layout(x: Any) -> Any:
    return COLUMN if x.ndim == 1 else WGMMA


def _pairs(x: Any) -> int:
    """Registers, two numbers each, that a thread has of an array."""
    return x.size // 8 if x.ndim == 1 else x.size // 256


def _places(ref: Any) -> Iterator[Any]:
    """Where a thread's pairs go, one after the other."""
    thread = arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(127))
    first = arith.muli(thread, asm.const(2))
    for i in itertools.count():
        yield asm.at(asm.pointer(ref), arith.addi(first, asm.const(256 * i)), ir.F32Type.get())


def store_columns(out: Any, x: jax.Array, row: Any, n: int, interpret: bool) -> None:
    """The first `n` of ``f32[W]`` to ``out[row + i]``, flat in global memory."""
    if interpret:
        out[pl.ds(row, n)] = x[:n]
        return

    @asm.inline(arg_types=(plgpu.RefType(), COLUMN, SCALAR))
    def run(ctx, ref, x, row):
        warp, g, q = asm.lanes()
        first = arith.cmpi(arith.CmpIPredicate.eq, asm.first_row(warp, g), asm.const(0))
        for octet, pair in enumerate(x.registers.flat):
            for e in range(2):
                i = arith.addi(arith.muli(q, asm.const(2)), asm.const(8 * octet + e))
                inside = arith.andi(first, less(i, asm.const(n)))
                place = arith.extsi(asm.i64(), arith.addi(asm.scalar(row), i))
                place = llvm.ptrtoint(asm.i64(), asm.at(asm.pointer(ref), place, ir.F32Type.get()))
                value = asm.extract(pair, e)
                mgpu.utils.inline_ptx("@$2 st.global.f32 [$0], $1;", place, value, inside)

    run(out, x, row)


def _tokens(runs: int, tiles: int) -> list[jax.Array]:
    """The tokens of the rows of each tile."""
    row = jnp.arange(ROWS)
    if not runs:
        return [ROWS * t + row for t in range(tiles)]
    return [16 * (runs * (row >> 4) + t) + 2 * (row & 7) + ((row >> 3) & 1) for t in range(tiles)]


def in_order(scores: Scores, runs: int) -> jax.Array:
    """``[W, tokens]``."""
    if not runs:
        return jnp.concatenate(scores).T
    x = jnp.stack(scores).reshape(runs, 4, 2, 8, -1)  # t, w, r, g
    return x.transpose(4, 1, 0, 3, 2).reshape(scores[0].shape[1], -1)


def _first_token(runs: int) -> Any:
    """Of a thread's rows; `_steps` are the others."""
    warp, g, _ = asm.lanes()
    if not runs:
        return asm.first_row(warp, g)
    return arith.addi(arith.muli(warp, asm.const(16 * runs)), arith.addi(g, g))


def _steps(runs: int, scores: Any) -> list[int]:
    """For both of a thread's rows of each tile."""
    tile, row = (16, 1) if runs else (ROWS, 8)
    return [tile * t + row * r for t in range(len(scores)) for r in range(2)]


def _hidden(outside: list[Any], registers: list[Any], never: float) -> list[Any]:
    """Registers of tiles, two rows an octet, with `never` in the rows of a thread that are `outside`."""
    f32 = ir.F32Type.get()
    nothing = vector.broadcast(registers[0].type, arith.constant(f32, never))
    octets = len(registers) // len(outside)
    row = lambda i: 2 * (i // (2 * octets)) + i % 2
    return [arith.select(outside[row(i)], nothing, v) for i, v in enumerate(registers)]


def _like(scores: Scores) -> list[Any]:
    return [plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA) for x in scores]


def _split(words: Any, scores: Any) -> list[Any]:
    """Registers of all tiles, one after the other, as arrays."""
    found = np.array(list(words), dtype=object).reshape(len(scores), -1)
    return [asm.array(v, WGMMA, tuple(x.shape)) for v, x in zip(found, scores)]


def less(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def fma(a: Any, b: Any, c: Any) -> Any:
    fast: dict[str, Any] = {"fastmath": arith.FastMathFlags.contract}
    return arith.addf(arith.mulf(a, b, **fast), c, **fast)


def exp2(v: Any) -> Any:
    """Of a vector; what is below the smallest normal number is 0."""
    f32, count = ir.F32Type.get(), ir.VectorType(v.type).shape[0]
    one = lambda x: mgpu.utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=f32)
    return asm.vector_of(v.type, [one(asm.extract(v, i)) for i in range(count)])


def over_warp(join: Any, rows: list[Any]) -> list[list[Any]]:
    """Of the vectors of all rows, by octet of columns: joined over rows and the threads that share columns."""
    out = []
    for vectors in zip(*rows):
        v, *rest = vectors
        for x in rest:
            v = join(v, x)
        pair = [asm.extract(v, e) for e in range(2)]
        for distance in (4, 8, 16):
            pair = [join(x, mgpu.utils.shfl_bfly(x, distance)) for x in pair]
        out.append(pair)
    return out


def _store_warp(scratch: Any, found: list[list[Any]]) -> None:
    """To a warp's row of ``f32[4, W]``."""
    warp, g, q = asm.lanes()
    first = arith.cmpi(arith.CmpIPredicate.eq, g, asm.const(0))
    base = arith.addi(arith.muli(warp, asm.const(8 * len(found))), arith.muli(q, asm.const(2)))
    for octet, pair in enumerate(found):
        at = arith.addi(base, asm.const(8 * octet))
        store_pair(asm.at(asm.pointer(scratch), at, ir.F32Type.get()), pair, first)


def store_pair(place: Any, pair: list[Any], inside: Any) -> None:
    """Two numbers to shared memory."""
    code = "@$3 st.shared.v2.f32 [$0], {$1, $2};"
    place = llvm.ptrtoint(asm.i32(), place)
    mgpu.utils.inline_ptx(code, place, *pair, inside, has_side_effects=True)


def _load_warps(join: Any, scratch: Any) -> list[Any]:
    """For each octet of columns a thread's two, joined over the warps' rows of ``f32[4, W]``."""
    width = ir.MemRefType(scratch.type).shape[1]
    pair, own = ir.VectorType.get((2,), ir.F32Type.get()), arith.muli(asm.lanes()[2], asm.const(2))
    out = []
    for octet in range(width // 8):
        at = [arith.addi(own, asm.const(8 * octet + width * w)) for w in range(4)]
        place = [asm.at(asm.pointer(scratch), i, ir.F32Type.get()) for i in at]
        a, b, c, d = (llvm.load(pair, p, alignment=8) for p in place)
        out.append(join(join(a, b), join(c, d)))
    return out
