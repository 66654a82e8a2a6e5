"""Scores of a warp's tokens with its queries, of keys that are packed channel by channel; see `warps`.

A scale belongs to a channel of a block, so that queries are scaled, once for all of the block's tokens that a warp has.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from . import asm
from .channels import expand_plainly, load_channels, load_four
from .fragments import Plan
from .in_place import load_offset, operands_of, scaled, second_operand, unit_at
from .layout import ROWS, WGMMA
from .softmax import Scores, fma
from .warp_scores import columns_of, spread
from .warps import QUERIES, by_row, mma16, no_sums


def multiply_channels(
    queries: list[jax.Array],
    offsets: Any,
    codes: Any,
    tables: list[Any],
    plan: Plan,
    *,
    tiles: int,
    tokens: int,
    interpret: bool,
) -> Scores:
    """For each tile ``f32[64, 8]``: row ``16 w + g + 8 r`` of tile t is token ``16 (tiles w + t) + 2 g + r``.

    Args:
      queries: from `load_queries`, in the order of `permute_channels`.
      offsets: from `write_offsets`, the number itself.
      codes, tables, tokens: as for `expand_channels`, of `tiles` tiles.
      tiles: 1 or 2.
    """
    width = 64 * len(queries)
    if interpret:
        out = []
        for chunk, own in enumerate(queries):
            made = expand_plainly(codes, tables, chunk, plan, tiles, tokens, width)
            found = [a.astype(jnp.float32) @ own.astype(jnp.float32).T for a in made]
            out = [x + y for x, y in zip(out, found)] if out else found
        return out
    tile = plgpu.ShapeDtypeStruct((ROWS, QUERIES), jnp.float32, layout=WGMMA)

    @asm.inline(
        arg_types=(
            [WGMMA] * len(queries),
            plgpu.RefType(),
            plgpu.RefType(),
            [plgpu.RefType()] * len(tables),
        ),
        return_type=[tile] * tiles,
    )
    def run(ctx, queries, offsets, codes, tables):
        made, (warp, _, q) = operands_of(plan), asm.lanes()
        columns, offset = columns_of(queries), load_offset(offsets, 0)
        sums, rest = [no_sums() for _ in range(tiles)], no_sums()
        for step, column in enumerate(columns):
            chunk, m = divmod(step, 4)
            if m == 0:
                block, words, pieces = load_channels(codes, warp, chunk, plan, tiles, tokens, width)
                fields = list(map(made.field, pieces))
            channel = arith.addi(arith.muli(q, asm.const(4)), asm.const(16 * step))
            found = [load_four(t, arith.addi(block, channel)) for t in tables]
            own, others = [], []
            for b, x in enumerate(column):
                scale, *second = (pairs[b] for pairs in found)
                own.append(scaled(x, made.scale(scale)))
                others.append(second_operand(plan, x, own[-1], second))
            rest = mma16(rest, offset, others)
            for t, (word, field) in enumerate(zip(words, fields)):
                places = [made.places(word[2 * m + b]) for b in range(2)]
                a = [made.level(place, field) for rows in places for place in rows]
                sums[t] = mma16(sums[t], a, own)
        return [_whole(x, rest, unit_at(plan, piece)) for x, piece in zip(sums, pieces)]

    return run(queries, offsets, codes, list(tables))


def _whole(sums: list[Any], rest: list[Any], unit: Any) -> Any:
    pairs = zip(by_row(sums), by_row(rest))
    join = arith.addf if unit is None else lambda x, y: fma(x, spread(unit), y)
    return asm.array(np.array([join(x, y) for x, y in pairs], dtype=object), WGMMA, (ROWS, QUERIES))
