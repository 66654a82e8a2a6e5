"""Keys that are packed channel by channel as the register operand of WGMMA: rows are tokens, columns are channels.

The codes of one channel of a block lie together, those of the next channel follow. A transposing matrix load gives a
thread two bytes of two channels in one register, a channel in each half; what is left of a byte's codes, and the tokens
of its two bytes, are rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import asm
from .fragments import Plan, level_of
from .halves import halves_of
from .layout import ROWS, WGMMA
from .transposed import load_matrices


def permute_channels(x: jax.Array) -> jax.Array:
    """Columns in the order of `expand_channels`: ``16 m + 8 b + 2 q + e`` is channel ``16 m + 4 q + 2 b + e``."""
    *lead, k = x.shape
    blocks = x.reshape(*lead, k // 16, 4, 2, 2)  # q, b, e
    return blocks.swapaxes(-3, -2).reshape(x.shape)


def expand_channels(
    codes: Any,
    tables: list[Any],
    chunk: int,
    plan: Plan,
    *,
    tokens: int,
    width: int,
    interpret: bool,
) -> jax.Array:
    """64 channels of a tile of 64 tokens as the A operand ``f16[64, 64]``.

    Args:
      codes: flat in shared memory: ``uint8[64 / tokens, width, tokens * bits / 8]``.
      tables: of the plan, each flat ``f16[64 / tokens, width]``.
      chunk: which 64 channels.
      tokens: of a block, 32 or 64.

    Returns:
      Row ``16 w + g + 8 r`` is token ``16 w + 2 g + r``; columns are as `permute_channels` has them.
    """
    if interpret:
        return expand_plainly(codes, tables, chunk, plan, 1, tokens, width)[0]

    @asm.inline(
        arg_types=(plgpu.RefType(), [plgpu.RefType()] * len(tables)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, ROWS), jnp.float16, layout=WGMMA),
    )
    def run(ctx, codes, tables):
        halves, (warp, _, q) = halves_of(plan), asm.lanes()
        block, (words,), (piece,) = load_channels(codes, warp, chunk, plan, 1, tokens, width)
        field = halves.field(piece)
        registers = np.empty((8, 2), dtype=object)
        for m in range(4):
            channel = arith.addi(arith.muli(q, asm.const(4)), asm.const(64 * chunk + 16 * m))
            channel = arith.addi(block, channel)
            found = [load_four(t, channel) for t in tables]
            for b in range(2):
                scale, *second = (pairs[b] for pairs in found)
                rest = halves.rest(scale, *second) if second else None
                scale = halves.scale(scale)
                for r, word in enumerate(halves.places(words[2 * m + b])):
                    level = halves.level(word, field)
                    registers[2 * m + b, r] = halves.scaled(level, scale, rest)
        return asm.array(registers, WGMMA, (ROWS, ROWS))

    return run(codes, tables)


def load_channels(
    codes: Any, warp: Any, chunk: int, plan: Plan, tiles: int, tokens: int, width: int
) -> tuple[Any, list[list[Any]], list[Any]]:
    """The first channel of a warp's block, of all; and for its 16 tokens of each tile a thread's words and piece.

    Those follow each other: where they are in the same bytes, these are read once.
    """
    first, many = arith.muli(warp, asm.const(tiles)), tokens // 16  # of 16 tokens
    block = arith.muli(arith.divui(first, asm.const(many)), asm.const(width))
    row_bytes = tokens * plan.bits // 8
    load = _load_narrow if row_bytes == 8 else _load
    own = lambda t: arith.andi(arith.addi(first, asm.const(t)), asm.const(many - 1))
    turns = [t if tiles == many else own(t) for t in range(tiles)]
    return block, *load(codes, block, turns, chunk, row_bytes)


def _load(
    ref: Any, first: Any, turns: list[Any], chunk: int, row_bytes: int
) -> tuple[list[list[Any]], list[Any]]:
    """For some 16 tokens each a thread's words, and the piece of their bytes that is its own.

    A word is bytes 2 g and 2 g + 1 of 16, of channels ``16 m + 4 q + 2 b`` and the next.

    Args:
      first: channel of the block, of all.
      turns: which 16 of the block's tokens.
    """
    lane = _lane()
    bit = lambda i, to: arith.muli(
        arith.andi(arith.shrui(lane, asm.const(i)), asm.const(1)), asm.const(to)
    )
    own = arith.muli(arith.andi(arith.shrui(lane, asm.const(1)), asm.const(3)), asm.const(4))
    channel = arith.addi(arith.addi(bit(4, 16), bit(3, 2)), arith.addi(own, bit(0, 1)))
    channel = arith.addi(arith.addi(first, channel), asm.const(64 * chunk))
    row = arith.muli(channel, asm.const(row_bytes))
    row = arith.addi(llvm.ptrtoint(asm.i32(), asm.pointer(ref)), row)
    words, pieces = [], []
    for turn in turns:
        column, piece = _divided(turn, row_bytes // 16)
        pieces.append(piece)
        if words and row_bytes == 16:  # the same bytes
            words.append(words[0])
            continue
        column = (
            asm.const(16 * column) if isinstance(column, int) else arith.muli(column, asm.const(16))
        )
        place = arith.addi(row, column)
        words.append(
            load_matrices(place) + load_matrices(arith.addi(place, asm.const(32 * row_bytes)))
        )
    return words, pieces


def _divided(x: int | Any, by: int) -> tuple[Any, Any]:
    """Remainder and quotient by a power of two, of a number or a register."""
    if isinstance(x, int):
        return x % by, x // by
    return arith.andi(x, asm.const(by - 1)), arith.divui(x, asm.const(by))


def _load_narrow(
    ref: Any, first: Any, turns: list[Any], chunk: int, row_bytes: int
) -> tuple[list[list[Any]], list[Any]]:
    """The same where a channel has 8 bytes: a row that is loaded holds two channels, and half of the threads get each.

    So threads whose tokens are in the same bytes swap words, and each keeps other pieces.
    """
    lane, (_, g, _) = _lane(), asm.lanes()
    row = arith.addi(arith.muli(first, asm.const(8)), asm.const(64 * 8 * chunk))
    place = arith.addi(row, arith.muli(lane, asm.const(16)))
    found = load_matrices(arith.addi(llvm.ptrtoint(asm.i32(), asm.pointer(ref)), place))
    half = arith.shrui(g, asm.const(2))
    odd = arith.cmpi(arith.CmpIPredicate.ne, half, asm.const(0))
    low, high = (
        arith.select(odd, asm.const(x), asm.const(y))
        for x, y in ((0x1054, 0x5410), (0x3276, 0x7632))
    )
    words = []
    for word in found:
        other = mgpu.utils.shfl_bfly(word, 16)
        words += [asm.word("prmt.b32 $0, $1, $2, $3;", word, other, s) for s in (low, high)]
    twice = lambda t: asm.const(2 * t) if isinstance(t, int) else arith.muli(t, asm.const(2))
    return [words] * len(turns), [arith.addi(twice(t), half) for t in turns]


def _lane() -> Any:
    return arith.andi(arith.index_cast(asm.i32(), asm.thread()), asm.const(31))


def load_four(table: Any, i: Any) -> list[Any]:
    """Entries i to i + 3 of float16, as two words."""
    place = asm.at(asm.pointer(table), i, ir.F16Type.get())
    v = llvm.load(ir.VectorType.get((2,), asm.i32()), place, alignment=8)
    return [asm.extract(v, 0), asm.extract(v, 1)]


def expand_plainly(
    codes: Any, tables: list[Any], chunk: int, plan: Plan, tiles: int, tokens: int, width: int
) -> list[jax.Array]:
    """`expand_channels` of tiles in jnp: row ``16 w + g + 8 r`` of tile t is token ``16 (tiles w + t) + 2 g + r``."""
    own = slice(64 * chunk, 64 * chunk + 64)
    found = codes[...].reshape(-1, width, tokens * plan.bits // 8)[:, own].astype(jnp.int32)
    scale, *second = (t[...].reshape(-1, width)[:, own, None].astype(jnp.float32) for t in tables)
    pieces = [(found >> f.shift) & (2**f.width - 1) for (f,) in plan.fields]
    x = level_of(jnp.concatenate(pieces, axis=-1), plan) * scale
    if second:
        x += -scale * second[0] if plan.has_zero else second[0]
    x = permute_channels(x.astype(jnp.float16).swapaxes(1, 2).reshape(-1, ROWS))
    x = x.reshape(4, tiles, 8, 2, ROWS).transpose(1, 0, 3, 2, 4)
    return list(x.reshape(tiles, ROWS, ROWS))
