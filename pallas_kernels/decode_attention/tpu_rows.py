"""Rows of a cache as the TPU kernel reads them: views of the stored arrays, and what is made of some tokens.

Nothing is copied for these views: XLA lays an array out with a long axis in the lanes of its tiles, which for rows of
less than 128 bytes and for tables is that of the tokens.

Letters, beside those of the operation: ``G`` scales of a row, ``Q`` rows of queries of a head of the cache, filled up
to whole registers, ``T`` tokens of a block, ``C`` tokens at a time, ``P`` parts of a float32 operand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ..codecs import PerChannel, PerToken
from ..tpu import LANES, finite, loadable, lookup, widened
from .rows import Rows
from .tpu_levels import Levels, levels_of

Cut = tuple[
    int, int
]  # of an array without its axis B: the axis of tokens, and of how many an entry is


def keys_of(rows: Rows, rounding: Rounding) -> TokenKeys | ChannelKeys:
    is_channel = isinstance(rows.codec, PerChannel)
    return ChannelKeys.of(rows, rounding) if is_channel else TokenKeys.of(rows, rounding)


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
    group = codec.codec.group  # pyright: ignore[reportAttributeAccessIssue]
    if codec.tokens not in (32, 64) or (group or codec.tokens) < codec.tokens:
        return f"{codec.name}: a block has 32 or 64 tokens and a channel one group"
    return f"{rows.width} channels are no multiple of {LANES}" if rows.width % LANES else ""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How float32 becomes operands of the matrix unit.

    Attributes:
      exact: by two parts of bfloat16.
      by_xla: in code that XLA compiles, which drops a conversion to bfloat16 and back unless it is told.
    """

    exact: bool
    by_xla: bool

    @property
    def parts(self) -> int:
        """P."""
        return 2 if self.exact else 1

    def halves(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``f32[..., n, m]`` as an operand ``bf16[..., P n, m]``, and what that stands for as float32."""
        high, rounded = self._rounded(x)
        if not self.exact:
            return high, rounded
        low, rest = self._rounded(x - rounded)
        return jnp.concatenate([high, low], axis=-2), rounded + rest

    def _rounded(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.by_xla:
            x = lax.reduce_precision(x, 8, 7)
            return x.astype(jnp.bfloat16), x
        return x.astype(jnp.bfloat16), x.astype(jnp.bfloat16).astype(jnp.float32)

    def dot(self, a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        """``f32[n, m]`` of an operand of `halves`, over its columns and an axis of `b`."""
        y = lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
        n = y.shape[0] // 2
        return y[:n] + y[n:] if self.exact else y


def rearranged(x: jax.Array, order: jax.Array) -> jax.Array:
    """``f32[Q, C]``, the lanes of each tile put into an order ``i32[1, LANES]``."""
    order = jnp.broadcast_to(order, (x.shape[0], LANES))
    tiles = [lookup(x[:, i : i + LANES], order) for i in range(0, x.shape[1], LANES)]
    return jnp.concatenate(tiles, axis=1)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows that are packed token by token.

    Attributes:
      row_bytes: of codes.
      group, groups: elements that a scale covers, and G.
      width: H.
    """

    levels: Levels
    row_bytes: int
    group: int
    groups: int
    width: int
    rounding: Rounding

    @classmethod
    def of(cls, rows: Rows, rounding: Rounding) -> Self:
        codec: Any = rows.codec.codec  # pyright: ignore[reportAttributeAccessIssue]
        levels = levels_of(codec)
        assert levels is not None
        row_bytes, groups = (rows.parts[name].shape[-1] for name in ("codes", "scale"))
        return cls(levels, row_bytes, codec.group or rows.width, groups, rows.width, rounding)

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

    def scratch(self, heads: int, block: int, chunk: int) -> list[tuple[int, ...]]:
        """Tables of C tokens as float32, ``[K G, C]``."""
        return [(heads * self.groups, chunk) for _ in self.levels.tables]

    def stage_block(self, refs: list[Any], scratch: list[Any]) -> None:
        """Before a block."""

    def stage(self, refs: list[Any], scratch: list[Any], start: Any) -> None:
        """Before C tokens: whole registers of tables at a time."""
        rows, size = scratch[0].shape
        at, step = pl.ds(start, size), max(1, 8 // self.groups)
        for k in range(0, rows // self.groups, step):
            heads = range(k, min(k + step, rows // self.groups))
            tables = [self._of_heads(t, heads, at) for t in refs[1:]]
            first = k * self.groups
            for to, x in zip(scratch, self.levels.load(tables)):
                to[first : first + x.shape[0], :] = x

    def _of_heads(self, table: Any, heads: range, at: Any) -> jax.Array:
        """``f32[len(heads) G, C]``."""
        if self.groups == 1:
            return finite(widened(table[heads.start : heads.stop, at]))
        return finite(jnp.concatenate([widened(table[k, :, at]) for k in heads]))

    def operand(self, codes: Any, orders: list[Any], head: int, start: Any, size: int) -> jax.Array:
        """Levels ``bf16[H, C]`` or, where tokens are not in lanes, ``bf16[C, H]``; rows in `order`."""
        constants = [x[...] for x in orders[len(orders) - len(self.levels.constants()) :]]
        of = lambda *at: self.levels.of(codes[head, *at], constants)
        if self.in_lanes:
            return jnp.concatenate(of(slice(None), pl.ds(start, size)), axis=0)
        tiles = [of(pl.ds(start + i, LANES), slice(None)) for i in range(0, size, LANES)]
        return jnp.concatenate([jnp.concatenate(x, axis=1) for x in tiles], axis=0)

    @property
    def elements(self) -> np.ndarray:
        """Of the columns of a product."""
        return self.levels.order(self.row_bytes) if self.in_lanes else np.arange(self.width)

    @property
    def tokens(self) -> np.ndarray | None:
        """Of the lanes of a tile, None where they are in order."""
        in_order = self.in_lanes or self.levels.bits == 8
        return None if in_order else self.levels.order(LANES)[:LANES]

    def entry(self, table: Any, head: int, group: int) -> jax.Array:
        """``[1, C]`` of a table of `scratch`."""
        row = head * self.groups + group
        return table[row : row + 1, :]

    def rows(self, x: jax.Array, group: int) -> jax.Array:
        """``[Q, ...]`` of a group, of ``[G Q, ...]``."""
        n = x.shape[0] // self.groups
        return x[group * n : (group + 1) * n]


class TokenKeys(TokenRows):
    """Keys in rows: a row of queries comes once for each group, zero outside of it, and scales come on the scores."""

    def queries(self, x: jax.Array) -> list[jax.Array]:
        """``f32[B, K, Q, H]`` as ``bf16[B, K, P G Q, H]``, and sums over groups, if any, ``f32[B, K, G Q, LANES]``."""
        own = self.elements // self.group == np.arange(self.groups)[:, None, None]
        x = jnp.where(own, x[:, :, None, :, self.elements], 0)
        outside = dataclasses.replace(self.rounding, by_xla=True)
        x, rounded = outside.halves(x.reshape(*x.shape[:2], -1, self.width))
        if not self.levels.zero and not self.levels.mean:
            return [x]
        sums = rounded.sum(-1, keepdims=True)
        return [x, jnp.broadcast_to(sums, (*sums.shape[:-1], LANES))]

    def orders(self) -> list[np.ndarray]:
        """The order to put tokens into, if any, and constants of levels: ``i32[1, LANES]`` each."""
        tokens = [] if self.tokens is None else [np.argsort(self.tokens)[None].astype(np.int32)]
        return tokens + self.levels.constants()

    def scores(
        self, q: list[Any], orders: list[Any], codes: Any, tables: list[Any], head: int, start: Any, size: int
    ) -> jax.Array:  # fmt: skip
        """``f32[Q, C]``."""
        made = self.operand(codes, orders, head, start, size)
        dots = self.rounding.dot(q[0][head], made, 0 if self.in_lanes else 1)
        dots = dots if self.tokens is None else rearranged(dots, orders[0][...])
        found = [self._of_group(q, dots, tables, head, g) for g in range(self.groups)]
        return sum(found[1:], start=found[0])

    def _of_group(
        self, q: list[Any], dots: jax.Array, tables: list[Any], head: int, group: int
    ) -> jax.Array:  # fmt: skip
        y = self.rows(dots, group)
        size = y.shape[1]
        table = lambda i: self.entry(tables[i], head, group)
        if len(q) == 1:
            return y * table(0)
        sums = jnp.concatenate([self.rows(q[1][head], group)] * (size // LANES), axis=1)
        zero = table(1) if self.levels.zero_table else self.levels.zero
        y = (y - sums * zero if self.levels.zero else y) * table(0)
        return y + sums * table(-1) if self.levels.mean else y


class Values(TokenRows):
    """Values in rows: weights come once for each group, times its scales, and each meets all columns of the rows."""

    def orders(self) -> list[np.ndarray]:
        """Groups of the columns of a product, ``i32[1, H]``, the order of tokens, if any, and constants of levels."""
        groups = [self.elements // self.group] if self.groups > 1 else []
        tokens = [] if self.tokens is None else [self.tokens]
        found = [x[None].astype(np.int32) for x in (*groups, *tokens)]
        return found + self.levels.constants()

    @property
    def has_offsets(self) -> bool:
        return bool(self.levels.zero) or self.levels.mean

    def sums(
        self, weights: jax.Array, orders: list[Any], codes: Any, tables: list[Any], head: int, start: Any
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """Of weights ``f32[Q, C]`` the sums ``f32[G Q, H]``, and what to add to them, ``f32[G Q, LANES]`` by lanes."""
        size = weights.shape[1]
        table = lambda i, g: self.entry(tables[i], head, g)
        groups = range(self.groups)
        scaled = jnp.concatenate([weights * table(0, g) for g in groups], axis=0)
        x, rounded = self.rounding.halves(scaled)
        if self.tokens is not None:
            x = rearranged(x.astype(jnp.float32), orders[self.groups > 1][...]).astype(jnp.bfloat16)
        made = self.operand(codes, orders, head, start, size)
        found = self.rounding.dot(x, made, 1 if self.in_lanes else 0)
        if not self.has_offsets:
            return found, None
        terms = []
        for g in groups:
            term = jnp.zeros((), jnp.float32)
            if self.levels.zero:
                zero = table(1, g) if self.levels.zero_table else self.levels.zero
                term -= self.rows(rounded, g) * zero
            terms.append(term + weights * table(-1, g) if self.levels.mean else term)
        lanes = [
            jnp.concatenate([t[:, i : i + LANES] for t in terms]) for i in range(0, size, LANES)
        ]
        return found, sum(lanes[1:], start=lanes[0])

    def gathered(self, sums: jax.Array, offsets: jax.Array | None, orders: list[Any]) -> jax.Array:
        """``f32[Q, H]`` of all that `sums` gave for a head: each group's columns."""
        if offsets is not None:
            sums += offsets.sum(-1, keepdims=True)
        out = self.rows(sums, 0)
        for g in range(1, self.groups):
            out = jnp.where(orders[0][...] == g, self.rows(sums, g), out)
        return out

    def in_order(self, x: jax.Array) -> jax.Array:
        """Columns of `gathered` by element."""
        return x[..., np.argsort(self.elements)]


@dataclasses.dataclass(frozen=True)
class ChannelKeys:
    """Keys in blocks of tokens, channel by channel: scales come on the queries, once for each block of a tile.

    Attributes:
      tokens: of a block.
      width: H.
    """

    levels: Levels
    tokens: int
    width: int
    rounding: Rounding

    @classmethod
    def of(cls, rows: Rows, rounding: Rounding) -> Self:
        codec: Any = rows.codec
        levels = levels_of(codec.codec)
        assert levels is not None
        return cls(levels, codec.tokens, rows.width, rounding)

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

    def scratch(self, heads: int, block: int, chunk: int) -> list[tuple[int, ...]]:
        """Tables of a block as float32."""
        return [(heads, math.ceil(block / self.tokens), self.width) for _ in self.levels.tables]

    def stage_block(self, refs: list[Any], scratch: list[Any]) -> None:
        """Before a block."""
        for k in range(scratch[0].shape[0]):
            found = self.levels.load([finite(widened(t[k])) for t in refs[1:]])
            for to, x in zip(scratch, found):
                to[k] = x

    def stage(self, refs: list[Any], scratch: list[Any], start: Any) -> None:
        """Before C tokens."""

    def orders(self) -> list[np.ndarray]:
        """Blocks of the lanes of a tile's scores, and the order to put them into: ``i32[1, LANES]`` each."""
        token = self._token
        found = [x[None].astype(np.int32) for x in (token // self.tokens, np.argsort(token))]
        return found + self.levels.constants()

    @property
    def _token(self) -> np.ndarray:
        """Of the lanes of a tile."""
        n = LANES // self.levels.pieces
        piece, row = divmod(self.levels.order(n), n)
        of_block = self.tokens // self.levels.pieces
        return row // of_block * self.tokens + piece * of_block + row % of_block

    def scores(
        self, q: list[Any], orders: list[Any], codes: Any, tables: list[Any], head: int, start: Any, size: int
    ) -> jax.Array:  # fmt: skip
        """``f32[Q, C]``."""
        tile = lambda i: self._tile(q[0][head], orders, codes, tables, head, start + i)
        found = jnp.concatenate([tile(i) for i in range(0, size, LANES)], axis=1)
        return found if self.levels.bits == 8 else rearranged(found, orders[1][...])

    def _tile(
        self, q: jax.Array, orders: list[Any], codes: Any, tables: list[Any], head: int, start: Any
    ) -> jax.Array:
        """``f32[Q, LANES]``: of a product of all blocks' queries with all tokens, each block's own."""
        blocks, n = LANES // self.tokens, q.shape[0]
        first = lax.div(start, self.tokens)
        rows = lambda t: [t[head, pl.ds(first + i, 1), :] for i in range(blocks)]
        x, rounded = self.rounding.halves(jnp.concatenate([q * s for s in rows(tables[0])]))
        constants = [x[...] for x in orders[2:]]
        part = LANES // self.levels.pieces
        at = pl.multiple_of(lax.div(start, self.levels.pieces), part)
        made = jnp.concatenate(self.levels.of(codes[head, pl.ds(at, part), :], constants), axis=0)
        found = self.rounding.dot(x, made, 1)
        if self.levels.zero:
            if self.levels.zero_table:
                zeros = jnp.concatenate([jnp.broadcast_to(z, q.shape) for z in rows(tables[1])])
                rounded *= zeros
            else:
                rounded *= self.levels.zero
            found -= rounded.sum(-1, keepdims=True)
        if self.levels.mean:
            terms = jnp.concatenate([q * m for m in rows(tables[-1])])
            found += terms.sum(-1, keepdims=True)
        out = found[:n]
        for i in range(1, blocks):
            out = jnp.where(orders[0][...] == i, found[i * n : (i + 1) * n], out)
        return out
