"""4 bits times 8 bits on Hopper: `many_rows`, whose codes become int8 in registers.

A tile of 128 bytes of codes is two steps, of the columns of its low and of its high nibbles. What a group's integer
scale makes of a code is an int8, so sums are exact in int32 over all of K; the scales of channels and tokens come on
the finished sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import hopper
from ..codecs import Int, Packed, Qoq4
from ..hopper import ROWS
from . import many_rows, tiles
from .many_rows import Config
from .tiles import LINE, TALL, Item
from .w8a8_mosaic_gpu import scaled, scales_of_tokens


def refusal(w: Packed) -> str:
    """Why this kernel can't take a weight of 4 bits that is multiplied in 8; "" where it can."""
    n, k = w.shape[-2:]
    if n < TALL or n % 8:
        return f"N = {n} is no multiple of 8 from {TALL} on"
    if k % (2 * LINE):
        return f"K = {k} is no multiple of {2 * LINE}"
    group = getattr(w.codec, "group", None) or k
    if group < k and group not in (LINE // 4, LINE // 2) and group % LINE:
        return f"groups of {group}"
    return ""


def shared_bytes(config: Config) -> int:
    """Bytes of shared memory that a block takes, barriers not counted."""
    return tiles.shared_bytes(config) + config.code_stages * TALL * LINE


def matmul(
    codes: jax.Array, scale: jax.Array, w: Packed, config: Config, *, out_dtype: Any,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """``[B, M, K] x [B, N, K] -> [B, M, N]``.

    Args:
      codes: int8, x over its scale.
      scale: float32 ``[B, M, 1]``, of the rows of x.
      w: qoq4, or int4 without zero points and a scale for each row at most.
      out_dtype: of the result.
    """
    if isinstance(w.codec, Int):
        levels, rows = w, w.parts["scale"]
    else:
        levels, rows = over_channels(w), w.parts["channel_scale"]
    problem = many_rows.Problem.of(codes, levels, config, out_dtype, interpret)
    own, tables = problem.operands(levels)
    rows = jnp.broadcast_to(rows, (problem.batch, problem.n, 1)).reshape(-1, 1)
    groups = tables if isinstance(w.codec, Qoq4) else []
    return problem.run(_Block, codes, own, *groups, rows, scales_of_tokens(problem, scale))


def over_channels(w: Packed, scale: jax.Array | None = None) -> Packed:
    """A weight of qoq4 as one of int4 without zero points in the same groups, over its channel scales.

    Args:
      scale: of the groups; None for the integers that are stored.
    """
    assert isinstance(w.codec, Qoq4)
    parts = {"codes": w.parts["codes"], "scale": w.parts["scale"] if scale is None else scale}
    codec = Int(bits=4, group=w.codec.group, symmetric=True, scale_dtype="f32")
    return Packed(parts, codec, w.view)


class _Block(many_rows.Block):
    @property
    def has_groups(self) -> bool:
        return len(self.tables) > 2

    def entries(self, item: Item, j: Any) -> Any:
        return super().entries(item, j) if self.has_groups else ()

    def words(self, slot: Any, half: int) -> jax.Array:
        own = self.scratch["codes"].at[slot, 0, pl.ds(self.wg * ROWS, ROWS)]
        return hopper.load_bytes(own, jnp.uint8, self.problem.interpret)

    def decoded(self, words: jax.Array, half: int, piece: int, entries: Any) -> jax.Array:
        scales = [scale for (scale,) in entries[half, piece]] if self.has_groups else []
        return hopper.expand_nibbles(words, piece, scales, self.problem.interpret)

    def write(self, item: Item, total: jax.Array) -> None:
        unit = 1.0 if self.has_groups else 1 / 16  # codes of a channel are multiplied by 16
        super().write(item, scaled(self, item, total, unit))
