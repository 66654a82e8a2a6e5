"""Tiles in shared memory, tables of scales in registers, the order of columns, and results.

A warpgroup multiplies ``[64, k]`` fragments: thread (warp, g, q) holds rows ``16 warp + g`` and 8 below, and of every
16 columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9. Codes lie in shared memory as they lie in the file, in rows of `row_bytes`
bytes, swizzled. Each thread takes 16 contiguous bytes of its rows out of every 64, and a contraction does not care for
the order of its columns: so the other operand is put into that order (`permute_columns`) instead of the codes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from . import asm

ROWS = 64  # of a fragment
WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
SCALAR = plgpu.Layout.WG_SPLAT(())


def tiled(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
    """Transforms of a tile whose rows are `swizzle` bytes, or a multiple."""
    width = swizzle // jnp.dtype(dtype).itemsize
    transforms: Any = plgpu  # abstract for type checkers
    return (transforms.TilingTransform((8, width)), transforms.SwizzleTransform(swizzle))


def sync(interpret: bool) -> None:
    """A barrier of the threads of a warpgroup."""
    if interpret:
        return

    @asm.inline()
    def run(ctx):
        mgpu.utils.warpgroup_barrier()

    run()


def settled(total: jax.Array, word: Any, interpret: bool) -> jax.Array:
    """Sums after the last wait for them, with a barrier of the warpgroup.

    ptxas (CUDA 13) moves arithmetic on sums of a loop before that wait, and barriers do not hold it. So each sum takes
    part in an operation with a zero that is read from memory after the barrier.

    Args:
      total: 32-bit ``[64, W]``.
      word: ``int32[1]`` of shared memory, the warpgroup's own.
    """
    if interpret:
        return total

    @asm.inline(
        arg_types=(WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=WGMMA),
    )
    def run(ctx, total, word):
        place = llvm.ptrtoint(asm.i32(), asm.pointer(word))
        mgpu.utils.inline_ptx(
            "st.volatile.shared.u32 [$0], $1;", place, asm.const(0), has_side_effects=True
        )
        mgpu.utils.warpgroup_barrier()
        zero = mgpu.utils.inline_ptx(
            "ld.volatile.shared.u32 $0, [$1];", place, result_types=asm.i32(), has_side_effects=True
        )
        out = np.empty_like(total.registers)
        for i, x in np.ndenumerate(total.registers):
            kind = ir.VectorType.get(ir.VectorType(x.type).shape, asm.i32())
            zeros = vector.broadcast(kind, zero)
            out[i] = asm.bits(arith.xori(asm.bits(x, kind), zeros), x.type)
        return asm.array(out, WGMMA, tuple(total.shape), is_signed=total.is_signed)

    return run(total, word)


def mma(acc: Any, a: jax.Array, b: Any, staged: Any = None) -> None:
    """``acc += a @ b``, not waited for, with `a` in registers.

    Args:
      staged: shared memory for `a` in the interpreter, whose WGMMA takes no registers; None elsewhere.
    """
    if staged is None:
        plgpu.wgmma(acc, a, b)
        return
    staged[...] = a
    plgpu.wgmma(acc, staged, b)
    plgpu.wgmma_wait(0)


def permute_columns(x: jax.Array) -> jax.Array:
    """Blocks of 64 columns in the order in which `expand` gives the bytes of a block; zeros fill the last one.

    Byte ``16 q + 4 t + 2 e + o`` of a block is column ``16 t + 8 o + 2 q + e``.
    """
    *lead, k = x.shape
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -k % 64)])
    blocks = x.reshape(*lead, -1, 4, 4, 2, 2)  # q, t, e, o
    n = blocks.ndim
    order = [*range(n - 4), n - 3, n - 1, n - 4, n - 2]
    return blocks.transpose(order).reshape(x.shape)


def is_whole(group: int, piece: int, row_bytes: int, n_groups: int) -> bool:
    """Whether the bytes that a stage takes of a row are all in one group."""
    return n_groups == 1 or (group % row_bytes == 0 and piece % row_bytes == 0)


def load_table(
    ref: Any, n_groups: int, row: Any, column: Any, group: int, whole: bool, interpret: bool
) -> Any:
    """What a table ``[N, n_groups]``, or such a one flat, has for 64 rows from `row` and the codes from `column` on.

    Returns:
      ``[64]`` where all codes of the stage are in one group; else ``[64, 8]``, entry ``2 q + h`` for byte 16 q of the
      h-th 64 bytes.
    """
    index = lambda c: jnp.minimum(c // group, n_groups - 1)
    if interpret:
        flat = len(ref.shape) == 1
        rows = ref[pl.ds(row * n_groups, ROWS * n_groups)] if flat else ref[pl.ds(row, ROWS), :]
        take = lambda i: jnp.take(rows.reshape(ROWS, n_groups), i, axis=1)
        if whole:
            return take(index(column))
        return jnp.stack([take(index(column + 64 * (c % 2) + 16 * (c // 2))) for c in range(8)], 1)
    shape, layout = ((ROWS,), ROW) if whole else ((ROWS, 8), WGMMA)
    signed = asm.is_signed(ref.dtype)

    @asm.inline(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
    )
    def load(ctx, ref, row, column):
        element = asm.element(ref)
        warp, g, q = asm.lanes()
        column, first = asm.scalar(column), arith.addi(asm.scalar(row), asm.first_row(warp, g))
        columns = [column]
        if not whole:
            own = arith.addi(column, arith.muli(q, asm.const(16)))
            columns = [own, arith.addi(own, asm.const(64))]
        last = asm.const(n_groups - 1)
        entries = [arith.minui(arith.divui(c, asm.const(group)), last) for c in columns]
        start = arith.extsi(asm.i64(), arith.muli(first, asm.const(n_groups)))
        pointer, registers = asm.pointer(ref), []
        for half in range(2):
            base = arith.addi(start, asm.const64(8 * half * n_groups))
            found = [arith.addi(base, arith.extsi(asm.i64(), e)) for e in entries]
            loaded = [llvm.load(element, asm.at(pointer, i, element)) for i in found]
            kind = ir.VectorType.get((len(loaded),), element)
            registers.append(vector.from_elements(kind, loaded))
        return asm.array(np.array(registers, dtype=object), layout, shape, is_signed=signed)

    return load(ref, row, column)


AHEAD = 8  # entries of a row that `load_ahead` takes


def load_ahead(
    ref: Any, n_groups: int, row: Any, column: Any, unit: int, group: int, interpret: bool
) -> jax.Array:
    """What a table ``[N, n_groups]`` has for 64 rows and the next eight units of columns: ``[64, 8]``, for `pick`.

    The four threads of a row take two of them each: a load that every thread makes costs as much for one as for four.
    """
    index = lambda c: jnp.minimum(c // group, n_groups - 1)
    if interpret:
        rows = ref[pl.ds(row, ROWS), :].reshape(ROWS, n_groups)
        columns = [index(column + unit * i) for i in range(AHEAD)]
        return jnp.stack([jnp.take(rows, c, axis=1) for c in columns], 1)

    @asm.inline(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, AHEAD), ref.dtype, layout=WGMMA),
    )
    def load(ctx, ref, row, column):
        element, pointer = asm.element(ref), asm.pointer(ref)
        warp, g, q = asm.lanes()
        own = arith.addi(asm.scalar(column), arith.muli(q, asm.const(2 * unit)))
        columns = [own, arith.addi(own, asm.const(unit))]
        last = asm.const(n_groups - 1)
        entries = [arith.minui(arith.divui(c, asm.const(group)), last) for c in columns]
        first = arith.addi(asm.scalar(row), asm.first_row(warp, g))
        start = arith.extsi(asm.i64(), arith.muli(first, asm.const(n_groups)))
        registers, pair = [], ir.VectorType.get((2,), element)
        for half in range(2):
            base = arith.addi(start, asm.const64(8 * half * n_groups))
            found = [arith.addi(base, arith.extsi(asm.i64(), e)) for e in entries]
            loaded = [llvm.load(element, asm.at(pointer, i, element)) for i in found]
            registers.append(vector.from_elements(pair, loaded))
        return asm.array(np.array(registers, dtype=object), WGMMA, (ROWS, AHEAD))

    return load(ref, row, column)


def _holder(i: Any) -> Any:
    """The lane, of a thread's row, that has column `i` of what `load_ahead` gives."""
    lane = arith.index_cast(asm.i32(), asm.thread())
    return arith.addi(arith.andi(lane, asm.const(28)), arith.shrui(i, asm.const(1)))


def in_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 numbers as sums of two, high and low, of which the digits of a bfloat16 are all or most."""
    # astype there and back would be simplified away
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high, x - high


def pick(entries: jax.Array, i: Any, interpret: bool) -> jax.Array:
    """Column `i` of what `load_ahead` gives, ``f32[64]``."""
    if interpret:
        return jnp.take(entries, i, axis=1).astype(jnp.float32)

    @asm.inline(
        arg_types=(WGMMA, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW),
    )
    def run(ctx, entries, i):
        i = asm.scalar(i)
        source = _holder(i)
        odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(i, asm.const(1)), asm.const(0))
        f32, out = ir.F32Type.get(), []
        for x in entries.registers.flat:
            x = arith.select(odd, asm.extract(x, 1), asm.extract(x, 0))
            x = x if x.type == f32 else arith.extf(f32, x)
            word = asm.word("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", asm.bits(x, asm.i32()), source)
            out.append(vector.from_elements(ir.VectorType.get((1,), f32), [asm.bits(word, f32)]))
        return asm.array(np.array(out, dtype=object), ROW, (ROWS,))

    return run(entries, i)


def pick_terms(terms: jax.Array, i: Any, interpret: bool) -> jax.Array:
    """Column `i` of 16-bit ``[64, 8]``, whose columns are as those of `load_ahead`: ``[64]``, for `expand`.

    Each as a word that has it twice.
    """
    if interpret:
        return jnp.take(terms, i, axis=1)

    @asm.inline(
        arg_types=(WGMMA, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=ROW),
    )
    def run(ctx, terms, i):
        i = asm.scalar(i)
        source = _holder(i)
        half = arith.addi(
            arith.muli(arith.andi(i, asm.const(1)), asm.const(0x2222)), asm.const(0x1010)
        )
        one, out = ir.VectorType.get((1,), asm.i32()), []
        for x in terms.registers.flat:
            x = asm.bits(x, asm.i32())
            word = asm.word("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", x, source)
            word = asm.word("prmt.b32 $0, $1, $1, $2;", word, half)
            out.append(vector.from_elements(one, [word]))
        return asm.array(np.array(out, dtype=object), ROW, (ROWS,), is_signed=True)

    return run(terms, i)


def load_columns(ref: Any, first: Any, stride: int, width: int, interpret: bool) -> jax.Array:
    """``ref[first + stride * i]`` for `width` columns i of a flat float32 array in global memory: for `scale_rows`."""
    if interpret:
        return ref[...][first + stride * jnp.arange(width)]

    @asm.inline(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((width,), jnp.float32, layout=COLUMN),
    )
    def load(ctx, ref, first):
        f32 = ir.F32Type.get()
        own = arith.muli(asm.lanes()[2], asm.const(2 * stride))
        own, registers = arith.addi(asm.scalar(first), own), []
        for octet in range(width // 8):
            at = [arith.addi(own, asm.const((8 * octet + e) * stride)) for e in range(2)]
            place = [asm.at(asm.pointer(ref), arith.extsi(asm.i64(), i), f32) for i in at]
            pair = ir.VectorType.get((2,), f32)
            registers.append(vector.from_elements(pair, [llvm.load(f32, p) for p in place]))
        return asm.array(np.array(registers, dtype=object), COLUMN, (width,))

    return load(ref, first)


def scale_rows(
    total: jax.Array, x: jax.Array, scale: jax.Array, interpret: bool, less: Any = ()
) -> jax.Array:
    """``total + x * scale[:, None]`` in float32; `scale` is ``[64]``.

    Args:
      less: ``[64]`` and what `load_columns` gives: their outer product is subtracted from `x`.
    """
    if interpret:
        x = x - less[0][:, None] * less[1][None] if less else x
        return total + x * scale[:, None]

    @asm.inline(
        arg_types=(WGMMA, WGMMA, ROW, [ROW, COLUMN] if less else []),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def run(ctx, total, x, scale, less):
        fast: dict[str, Any] = {"fastmath": arith.FastMathFlags.contract}
        spread = lambda rows: [vector.shuffle(v, v, [0, 0]) for v in rows.registers.flat]
        scales, zeros = spread(scale), [arith.negf(v) for v in spread(less[0])] if less else []
        columns = list(less[1].registers.flat) if less else []
        old, new = total.registers.reshape(-1, 2), x.registers.reshape(-1, 2)
        out = np.empty_like(old)
        for i in range(len(old)):
            for half in range(2):
                own = new[i, half]
                if less:
                    own = arith.addf(arith.mulf(zeros[half], columns[i], **fast), own, **fast)
                product = arith.mulf(own, scales[half], **fast)
                out[i, half] = arith.addf(old[i, half], product, **fast)
        return asm.array(out, WGMMA, tuple(total.shape))

    return run(total, x, scale, list(less))


def store_transposed(
    out: Any,
    tile: jax.Array,
    row: Any,
    column: Any,
    stop: Any,
    interpret: bool,
    *,
    paired: bool = False,
    rows: int | None = None,
    every: int = 1,
) -> None:
    """Writes ``tile[j, every * i]`` to ``out[row + i, column + j]`` for rows below `stop`.

    Args:
      paired: the tile's rows are as `expand_transposed` has them; they are written in the order of elements.
      rows: how many columns of the tile there are to write; None for all (the interpreter can't write outside).
      every: 1 or 2.
    """
    width = tile.shape[1]
    if interpret:
        n = width // every if rows is None else rows
        x = tile.reshape(4, 2, 8, width).swapaxes(1, 2).reshape(tile.shape) if paired else tile
        out[pl.ds(row, n), pl.ds(column, ROWS)] = x.T[::every][:n].astype(out.dtype)
        return

    @asm.inline(arg_types=(plgpu.RefType(), WGMMA, SCALAR, SCALAR, SCALAR))
    def run(ctx, ref, tile, row, column, stop):
        element, pointer = asm.element(ref), asm.pointer(ref)
        warp, g, q = asm.lanes()
        stop = asm.scalar(stop)
        lane = arith.addi(asm.first_row(warp, g), g) if paired else asm.first_row(warp, g)
        first = arith.extsi(asm.i64(), arith.addi(asm.scalar(column), lane))
        own = arith.addi(asm.scalar(row), arith.muli(q, asm.const(2 // every)))
        registers = tile.registers.reshape(width // 8, 2)
        stride = asm.const64(ir.MemRefType(ref.type).shape[1])
        for octet in range(width // 8):
            for e in range(0, 2, every):
                r = arith.addi(own, asm.const(8 // every * octet + e))
                inside = arith.cmpi(arith.CmpIPredicate.slt, r, stop)
                start = arith.addi(arith.muli(arith.extsi(asm.i64(), r), stride), first)
                for half in range(2):
                    x = vector.extract(
                        registers[octet, half], dynamic_position=[], static_position=[e]
                    )
                    step = asm.const64(half if paired else 8 * half)
                    place = asm.at(pointer, arith.addi(start, step), element)
                    _store(place, x, element, inside)

    run(out, tile, row, column, stop)


def _store(place: Any, x: Any, element: ir.Type, inside: Any) -> None:
    place = llvm.ptrtoint(asm.i64(), place)
    if isinstance(element, ir.F32Type):
        x = asm.bits(x, asm.i32())
        mgpu.utils.inline_ptx("@$2 st.global.b32 [$0], $1;", place, x, inside)
        return
    x = asm.bits(arith.truncf(element, x), ir.IntegerType.get_signless(16))
    mgpu.utils.inline_ptx("@$2 st.global.b16 [$0], $1;", place, x, inside)
