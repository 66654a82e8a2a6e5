"""Rows of a cache as the TPU kernel reads them: views of the stored arrays, and what is made of some tokens.

Nothing is copied for these views: XLA lays an array out with a long axis in the lanes of its tiles, which for rows of
less than 128 bytes and for tables is that of the tokens.

Letters, beside those of the operation: ``G`` scales of a row, ``Q`` rows of queries of a head of the cache, filled up
to whole registers, ``C`` tokens at a time, ``P`` parts of a float32 operand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..codecs import PerChannel, PerToken
from ..tpu import LANES, as_float32, loadable
from .rows import Rows
from .tpu_levels import Levels, levels_of

Cut = tuple[int, int]  # of an array without its axis B: the axis of tokens, and of how many an entry is


def keys_of(rows: Rows) -> TokenKeys | ChannelKeys:
    return ChannelKeys.of(rows) if isinstance(rows.codec, PerChannel) else TokenKeys.of(rows)


def refusal(rows: Rows, *, keys: bool) -> str:
    """Why these rows can't be taken; "" where they can."""
    codec: Any = rows.codec
    known = (PerToken, PerChannel) if keys else PerToken
    if not isinstance(codec, known) or levels_of(codec.codec) is None:
        return f"no kernel for {codec.name}"
    if rows.width % 64:
        return f"rows of {rows.width} elements, no multiple of 64"
    if isinstance(codec, PerToken):
        return ""
    if codec.tokens not in (32, 64) or (codec.codec.group or codec.tokens) < codec.tokens:
        return f"{codec.name}: a block has 32 or 64 tokens and a channel one group"
    return f"{rows.width} channels are no multiple of {LANES}" if rows.width % LANES else ""


def halves(x: jax.Array, exact: bool) -> tuple[jax.Array, jax.Array]:
    """``f32[n, m]`` as an operand ``bf16[P n, m]``, and what that stands for as float32."""
    high = x.astype(jnp.bfloat16)
    if not exact:
        return high, high.astype(jnp.float32)
    low = x - high.astype(jnp.float32)
    return jnp.concatenate([high, low.astype(jnp.bfloat16)], axis=-2), x


def dot(a: jax.Array, b: jax.Array, axis: int, exact: bool) -> jax.Array:
    """``f32[n, m]`` of an operand of `halves`, over its columns and an axis of `b`."""
    y = lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    n = y.shape[0] // 2
    return y[:n] + y[n:] if exact else y


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows that are packed token by token.

    Attributes:
      row_bytes: of codes.
      group, groups: elements that a scale covers, and G.
      width: H.
      exact: float32 operands are multiplied as such.
    """

    levels: Levels
    row_bytes: int
    group: int
    groups: int
    width: int
    exact: bool

    @classmethod
    def of(cls, rows: Rows, exact: bool = False) -> Self:
        codec: Any = rows.codec.codec  # pyright: ignore[reportAttributeAccessIssue]
        levels = levels_of(codec)
        assert levels is not None
        row_bytes, groups = (rows.parts[name].shape[-1] for name in ("codes", "scale"))
        return cls(levels, row_bytes, codec.group or rows.width, groups, rows.width, exact)

    @property
    def in_lanes(self) -> bool:
        """Whether tokens are; rows of whole tiles lie as they are."""
        return self.row_bytes % LANES != 0

    def arrays(self, rows: Rows) -> list[jax.Array]:
        """Codes ``[B, K, row_bytes, S]`` or ``[B, K, S, row_bytes]``, tables ``[B, K, S]`` or ``[B, K, G, S]``."""
        codes = rows.parts["codes"]
        tables = [loadable(rows.parts[name]) for name in self.levels.tables]
        tables = [x[..., 0] if self.groups == 1 else jnp.swapaxes(x, 2, 3) for x in tables]
        return [jnp.swapaxes(codes, 2, 3) if self.in_lanes else codes, *tables]

    def cuts(self) -> list[Cut]:
        """Of `arrays`."""
        codes = (2, 1) if self.in_lanes else (1, 1)
        return [codes, *[((1, 1) if self.groups == 1 else (2, 1)) for _ in self.levels.tables]]

    def operand(self, codes: Any, head: int, start: Any, size: int) -> jax.Array:
        """Levels ``bf16[H, C]`` or, where tokens are not in lanes, ``bf16[C, H]``."""
        at = pl.ds(start, size)
        part = codes[head, :, at] if self.in_lanes else codes[head, at, :]
        pieces = self.levels.of(part, jnp.bfloat16)
        return jnp.concatenate(pieces, axis=0 if self.in_lanes else 1)

    def load(self, tables: list[Any], start: Any, size: int) -> list[jax.Array]:
        """The tables of C tokens, ``f32[K, C]`` or ``f32[K, G, C]``: scales, and zero points or means."""
        scale, *offset = [as_float32(t[..., pl.ds(start, size)]) for t in tables]
        zero = self.levels.zero if self.levels.offset == "zero" else lambda x: x
        return [scale * self.levels.unit, *map(zero, offset)]

    def entry(self, table: jax.Array, head: int, group: int) -> jax.Array:
        """``[1, C]`` of what `load` gives."""
        return table[head : head + 1] if self.groups == 1 else table[head, group : group + 1]

    def rows(self, x: jax.Array, group: int) -> jax.Array:
        """``[Q, ...]`` of a group, of ``[G Q, ...]``."""
        n = x.shape[0] // self.groups
        return x[group * n : (group + 1) * n]


class TokenKeys(TokenRows):
    """Keys in rows: a row of queries comes once for each group, zero outside of it, and scales come on the scores."""

    def queries(self, x: jax.Array) -> list[jax.Array]:
        """``f32[B, K, Q, H]`` as ``bf16[B, K, P G Q, H]``, and sums over groups, if any, ``f32[B, K, G Q, LANES]``."""
        own = jnp.arange(self.width) // self.group == jnp.arange(self.groups)[:, None, None]
        x = jnp.where(own, x[:, :, None], 0).reshape(*x.shape[:2], -1, self.width)
        x, rounded = halves(x, self.exact)
        sums = rounded.sum(-1, keepdims=True)
        wide = jnp.broadcast_to(sums, (*sums.shape[:-1], LANES))
        return [x, wide] if self.levels.offset else [x]

    def scratch(self, heads: int, tokens: int) -> list[tuple[int, ...]]:
        return []

    def stage(self, refs: list[Any], scratch: list[Any]) -> None:
        """Before a block."""

    def scores(
        self, q: list[Any], refs: list[Any], scratch: list[Any], heads: int, start: Any, size: int
    ) -> list[jax.Array]:
        """``f32[Q, C]`` of each head."""
        codes, *tables = refs
        loaded = self.load(tables, start, size)
        return [
            self._scores(q, codes, [self._by_group(t, k) for t in loaded], k, start, size)
            for k in range(heads)
        ]

    def _by_group(self, table: jax.Array, head: int) -> list[jax.Array]:
        return [self.entry(table, head, g) for g in range(self.groups)]

    def _scores(
        self, q: list[Any], codes: Any, tables: list[list[jax.Array]], head: int, start: Any, size: int
    ) -> jax.Array:  # fmt: skip
        made = self.operand(codes, head, start, size)
        dots = dot(q[0][head], made, 0 if self.in_lanes else 1, self.exact)
        total = jnp.zeros((), jnp.float32)
        for g, scale in enumerate(tables[0]):
            one = self.rows(dots, g)
            if not self.levels.offset:
                total += one * scale
                continue
            sums = self.rows(q[1][head], g)
            shift = tables[1][g] * jnp.concatenate([sums] * (size // LANES), axis=1)
            is_mean = self.levels.offset == "mean"
            total += one * scale + shift if is_mean else (one - shift) * scale
        return total


class Values(TokenRows):
    """Values in rows: weights come once for each group, times its scales, and each meets all columns of the rows."""

    def weighted(
        self, weights: list[jax.Array], seen: list[jax.Array], refs: list[Any], start: Any, size: int
    ) -> list[tuple[jax.Array, jax.Array | None]]:  # fmt: skip
        """For each head the sums ``f32[G Q, H]``, and what offsets add to them, ``f32[G Q, LANES]`` to be summed.

        Args:
          weights: of each head, ``f32[Q, C]``.
          seen: of each head, ``bool[1, C]``: the tables of other tokens may hold anything.
        """
        codes, *tables = refs
        loaded = self.load(tables, start, size)
        return [
            self._weighted(w, hidden, codes, loaded, k, start, size)
            for k, (w, hidden) in enumerate(zip(weights, seen))
        ]

    def _weighted(
        self, weights: jax.Array, seen: jax.Array, codes: Any, tables: list[jax.Array], head: int, start: Any, size: int
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        entry = lambda t, g: jnp.where(seen, self.entry(t, head, g), 0)
        scaled = [weights * entry(tables[0], g) for g in range(self.groups)]
        x, rounded = halves(jnp.concatenate(scaled, axis=0), self.exact)
        made = self.operand(codes, head, start, size)
        sums = dot(x, made, 1 if self.in_lanes else 0, self.exact)
        if not self.levels.offset:
            return sums, None
        if self.levels.offset == "mean":
            terms = [weights * entry(tables[1], g) for g in range(self.groups)]
        else:
            terms = [-self.rows(rounded, g) * entry(tables[1], g) for g in range(self.groups)]
        terms = jnp.concatenate(terms, axis=0)
        return sums, sum(terms[:, i : i + LANES] for i in range(0, size, LANES))  # pyright: ignore

    def gathered(self, sums: jax.Array, offsets: jax.Array | None) -> jax.Array:
        """``f32[Q, H]`` of all that `weighted` gave for a head: each group's columns."""
        if offsets is not None:
            sums += offsets.sum(-1, keepdims=True)
        column = lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
        out = self.rows(sums, 0)
        for g in range(1, self.groups):
            out = jnp.where(column >= g * self.group, self.rows(sums, g), out)
        return out


@dataclasses.dataclass(frozen=True)
class ChannelKeys:
    """Keys in blocks of tokens, channel by channel: scales come on the queries, once for each block of a tile.

    Attributes:
      tokens: of a block.
      width: H.
      exact: float32 operands are multiplied as such.
    """

    levels: Levels
    tokens: int
    width: int
    exact: bool

    @classmethod
    def of(cls, rows: Rows, exact: bool = False) -> Self:
        codec: Any = rows.codec
        levels = levels_of(codec.codec)
        assert levels is not None
        return cls(levels, codec.tokens, rows.width, exact)

    @property
    def bytes(self) -> int:
        """Of a channel in a block."""
        return self.tokens // self.levels.pieces

    def arrays(self, rows: Rows) -> list[jax.Array]:
        """Codes ``[B, K, S / pieces, H]`` and tables ``[B, K, S / tokens, H]``."""
        codes = jnp.swapaxes(rows.parts["codes"], 3, 4)
        tables = [loadable(rows.parts[name])[..., 0] for name in self.levels.tables]
        return [codes.reshape(*codes.shape[:2], -1, self.width), *tables]

    def cuts(self) -> list[Cut]:
        return [(1, self.levels.pieces), *[(1, self.tokens) for _ in self.levels.tables]]

    def queries(self, x: jax.Array) -> list[jax.Array]:
        """``f32[B, K, Q, H]`` as it is."""
        return [x]

    def scratch(self, heads: int, tokens: int) -> list[tuple[int, ...]]:
        """Tables of a block as float32."""
        return [(heads, math.ceil(tokens / self.tokens), self.width) for _ in self.levels.tables]

    def stage(self, refs: list[Any], scratch: list[Any]) -> None:
        scale, *offset = [as_float32(t[...]) for t in refs[1:]]
        scratch[0][...] = scale * self.levels.unit
        for to, x in zip(scratch[1:], offset):
            to[...] = self.levels.zero(x) if self.levels.offset == "zero" else x

    def scores(
        self, q: list[Any], refs: list[Any], scratch: list[Any], heads: int, start: Any, size: int
    ) -> list[jax.Array]:
        """``f32[Q, C]`` of each head."""
        tiles = [start + i for i in range(0, size, LANES)]
        one = lambda k: [self._tile(q[0][k], refs[0], scratch, k, at) for at in tiles]
        return [jnp.concatenate(one(k), axis=1) for k in range(heads)]

    def _tile(
        self, q: jax.Array, codes: Any, scratch: list[Any], head: int, start: Any
    ) -> jax.Array:
        """``f32[Q, LANES]``: of a product of all blocks' queries with all tokens, each block's own."""
        blocks = LANES // self.tokens
        row = lambda t, i: t[head, pl.ds(start // self.tokens + i, 1), :]
        table = lambda t: [row(t, i) for i in range(blocks)]
        scaled = jnp.concatenate([q * s for s in table(scratch[0])], axis=0)
        x, rounded = halves(scaled, self.exact)
        sums = dot(x, self._operand(codes, head, start), 1, self.exact)
        n = q.shape[0]
        if self.levels.offset:
            offsets = table(scratch[1])
            if self.levels.offset == "mean":
                terms = [q * o for o in offsets]
            else:
                terms = [-rounded[i * n : (i + 1) * n] * o for i, o in enumerate(offsets)]
            sums += jnp.concatenate(terms, axis=0).sum(-1, keepdims=True)
        token = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        out = sums[:n]
        for i in range(1, blocks):
            out = jnp.where(token >= i * self.tokens, sums[i * n : (i + 1) * n], out)
        return out

    def _operand(self, codes: Any, head: int, start: Any) -> jax.Array:
        """Levels ``bf16[LANES tokens, H]`` in order."""
        pieces = self.levels.pieces
        at = pl.multiple_of(start // pieces, LANES // pieces)
        part = codes[head, pl.ds(at, LANES // pieces), :]
        # pieces of a block are put behind each other: whole registers, of float32 where they are but 8 rows
        dtype = jnp.float32 if self.bytes % 16 else jnp.bfloat16
        made = [x.reshape(-1, self.bytes, self.width) for x in self.levels.of(part, dtype)]
        whole = jnp.concatenate(made, axis=1)
        return whole.reshape(LANES, self.width).astype(jnp.bfloat16)
