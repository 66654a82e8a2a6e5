"""Static facts of a call of the Hopper kernel, and how it is cut into blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper import ROWS
from . import keys as of_keys
from . import values as of_values
from .token_rows import Slot

START = 2  # steps that a block's start and end take as long as
SMALL = 8 * 2**10  # bytes of a tile of keys and values, below which a step has two
RING_BYTES = 180 * 2**10  # of a multiprocessor's shared memory; sums need the rest


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut into blocks.

    Attributes:
      warpgroups: of a block; each has a ring of its own.
      stages: steps in flight.
      blocks: that run at once; half as many more where heads have lengths of their own, so that blocks of short heads
        make room for those of long ones.
      tiles: of a step, 64 tokens each: 1, or where warps work alone 2.
    """

    warpgroups: int = 4
    stages: int = 2
    blocks: int = 132
    tiles: int = 1


class OfHeads(NamedTuple):
    """What rows of the batch, or their heads, have of their own; the first axes are ``[B, 1 or K]``.

    Attributes:
      lengths: ``int32[B, 1 or K]``.
      span: the first token that is seen and the end of those, ``int32[B, 1 or K, 2]``; None for all.
      words: masks as bits, ``int32[B, 1 or K, S / 32]``, the first token lowest; None for none.
    """

    lengths: jax.Array
    span: jax.Array | None
    words: jax.Array | None


def by_warps(group: int, width: int) -> bool:
    """Whether warps work alone: they have registers for all elements of a row and few queries."""
    return group <= hopper.QUERIES and width <= 128


def bounds(length: Any, span: Any, tokens: int, window: int | None) -> tuple[Any, Any]:
    """The first token that is attended to and the end of those, of scalars or arrays."""
    stop = jnp.minimum(jnp.maximum(length, 0), tokens)
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
    if span is None:
        return first, stop
    return jnp.maximum(first, span[0]), jnp.minimum(stop, span[1])


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known before the kernel runs.

    Attributes:
      config: None for what was measured to be best.
      rows: heads of the cache, of all rows of the batch.
      heads: of a row of the batch.
      share: heads that have one head's packed rows in common.
      group: query heads of a head of the cache.
      ragged: heads have lengths of their own.
      weights: scores are a result.
    """

    config: Config | None
    keys: of_keys.TokenKeys | of_keys.ChannelKeys
    values: of_values.Values
    rows: int
    heads: int
    share: int
    tokens: int
    group: int
    scale: float
    soft_cap: float | None
    window: int | None
    ragged: bool
    weights: bool
    interpret: bool

    @property
    def width(self) -> int:
        """Columns for the query heads of a head of the cache."""
        return -(-self.group // 8) * 8

    @property
    def by_warps(self) -> bool:
        return by_warps(self.group, self.values.width)

    def cut(self, slots: list[Slot]) -> Config:
        """The configuration for tiles of these slots."""
        config = self.config or self._measured(slots)
        blocks = config.blocks * 3 // 2 if self.ragged else config.blocks
        tiles = min(config.tiles, self.tokens // ROWS) if self.by_warps else 1
        return dataclasses.replace(config, blocks=blocks, tiles=tiles)

    def _measured(self, slots: list[Slot]) -> Config:
        if not self.by_warps:
            return Config(warpgroups=2, blocks=264)
        nbytes = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in slots)
        slow = any(x.plan.kind != "int" for x in (self.keys, self.values))  # to decode
        config = Config(tiles=2 if slow or nbytes < SMALL else 1)
        fits = config.warpgroups * config.stages * config.tiles * nbytes <= RING_BYTES
        return config if fits else dataclasses.replace(config, warpgroups=2)

    def parts(self, config: Config) -> int:
        """Blocks that share the tokens of a head. Those beyond what runs at once wait for a whole block to end."""
        steps = self.tokens // ROWS // config.tiles

        def cost(parts: int) -> int:
            waves = -(-self.rows * parts // config.blocks)
            return waves * (-(-steps // (parts * config.warpgroups)) + START)

        return min(range(1, max(1, steps // config.warpgroups) + 1), key=cost)
