"""Decode attention on TPU over packed rows: codes are unpacked in VMEM, straight into the matrix unit.

A step of the grid takes a block of tokens of some heads of the cache, for one row of the batch, and goes over it
twice: scores of all its tokens, then, with the maximum known, sums of its values. The maximum, the sum of weights
and the sums of values stay in VMEM from block to block. Blocks that no token is seen of are neither fetched nor
looked at, but for a step of the grid each.

What is multiplied are bare levels (`tpu_levels.py`); scales meet scores and weights, of which there are fewer than
elements of rows (`tpu_rows.py`). The matrix unit is bound by loading the cache, so the rows that this adds are free.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs.rows import hadamard
from ..tpu import LANES, VMEM_BYTES
from . import joined, tpu_rows
from .reference import by_head, visible
from .rows import FullRows, Rows

LOG2E = math.log2(math.e)
NEVER = -1e30  # a score that is not seen
HEADS = 8  # of the cache in a block, where there are more
BLOCK_ROWS = 2**14  # of the cache in a block, at most
CHUNK = 512
MOST_QUERIES = 64  # of a head of the cache


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut.

    Attributes:
      block: tokens of a step of the grid, a multiple of `chunk`.
      chunk: tokens that are looked at together, a multiple of 128.
    """

    block: int
    chunk: int

    @classmethod
    def of(cls, heads: int, tokens: int) -> Config:
        """Blocks that are worth the start of a step, but no less than 8 of them, so that copies overlap.

        Args:
          heads: of a block.
          tokens: of all rows of the batch.
        """
        block = min(BLOCK_ROWS // heads, tokens // 8)
        return cls(max(1, block // CHUNK) * CHUNK, CHUNK)


def heads_together(heads: int) -> int:
    """Heads of the cache in a block: all, unless they are whole registers."""
    return heads if heads % HEADS else HEADS


def refusal(q: Any, keys: Rows, values: Rows, heads: int) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % LANES:
        return f"S = {keys.tokens} is no multiple of {LANES}"
    if heads > keys.heads:
        return f"one pool of rows for {heads} heads"
    if q.shape[1] // keys.heads > MOST_QUERIES:
        return f"{q.shape[1] // keys.heads} query heads share a head of the cache"
    reasons = (
        ("keys", tpu_rows.refusal(keys, keys=True)),
        ("values", tpu_rows.refusal(values, keys=False)),
    )
    return next((f"{name}: {reason}" for name, reason in reasons if reason), "")


def decode_attention(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    seen: jax.Array | None = None,
    hidden: jax.Array | None = None,
    full: Sequence[FullRows] = (),
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    weights: bool = False,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[Any, ...]:
    """See `decode_attention`. In float32, q and the weights are not rounded to bfloat16.

    Args:
      interpret: False, True or `pltpu.InterpretParams()`, as in `pl.pallas_call`.
    """
    b, n, h = q.shape
    heads = keys.heads
    group = n // heads
    x = q.astype(jnp.float32)
    x = hadamard(x) if getattr(keys.codec, "rotate", False) else x
    x = x.reshape(b, heads, group, h)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))
    rounding = tpu_rows.Rounding(exact=q.dtype != jnp.bfloat16, by_xla=bool(interpret))
    k, v = tpu_rows.keys_of(keys, rounding), tpu_rows.Values.of(values, rounding)
    together = heads_together(heads)
    if lengths.ndim == 2:  # heads are looked at together, as far as the longest
        seen = visible(keys.tokens, lengths, window, seen, None)
        lengths, window = lengths.max(1), None
    problem = _Problem(
        config or Config.of(together, b * keys.tokens), k, v, together, keys.tokens, x.shape[2],
        scale, soft_cap, window, weights, interpret,
    )  # fmt: skip
    if hidden is not None and hidden.shape[1]:
        seen = visible(keys.tokens, lengths, None, seen, hidden)
    first, stop = _bounds(lengths, keys.tokens, window, seen)
    masks = [] if seen is None else [by_head(seen).astype(jnp.int8)]
    bounds = jnp.stack([first, stop], axis=-1)
    found = problem(bounds, masks, k.queries(x), k.arrays(keys), v.arrays(values))
    out, logs, *scores = (x[:, :, :group] for x in found)
    out, logs = v.in_order(out), logs[..., 0]
    if getattr(values.codec, "rotate", False):
        out = hadamard(out)
    if full:
        more = [joined.attend(q, part, scale=scale, soft_cap=soft_cap) for part in full]
        out, logs = joined.finished(joined.Sums(logs, jnp.ones_like(logs), out), *more)
    out, total = out.reshape(b, n, h).astype(q.dtype), logs.reshape(b, n)
    if not weights:
        return out, total
    own = joined.scores_within(scores[0], first[:, None], stop[:, None])
    others = joined.weights_of_rows(q, full, total, scale=scale, soft_cap=soft_cap)
    return out, total, (joined.weights_of(own, total), *others)


def _bounds(
    lengths: jax.Array, tokens: int, window: int | None, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The first token that is seen by any head, and the end of those: ``int32[B]``."""
    stop = jnp.clip(lengths.astype(jnp.int32), 0, tokens)
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
    if seen is None:
        return first, stop
    at = jnp.arange(tokens, dtype=jnp.int32)
    any_head = by_head(seen).any(1)
    both = jnp.where(any_head, jnp.stack([at + 1, tokens - at])[:, None], 0)
    last, behind = both.max(-1)  # one pass for both
    return jnp.maximum(first, tokens - behind), jnp.minimum(stop, last)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static facts of a call.

    Attributes:
      heads: of the cache, in a block.
      queries: Q.
      weights: scores are a result.
    """

    config: Config
    keys: tpu_rows.TokenKeys | tpu_rows.ChannelKeys
    values: tpu_rows.Values
    heads: int
    tokens: int
    queries: int
    scale: float
    soft_cap: float | None
    window: int | None
    weights: bool
    interpret: Any

    @property
    def block(self) -> int:
        return min(self.config.block, self.tokens)

    @property
    def chunk(self) -> int:
        return math.gcd(self.config.chunk, self.block)

    @property
    def steps(self) -> int:
        """Blocks at most."""
        blocks = pl.cdiv(self.tokens, self.block)
        if self.window is None:
            return blocks
        return min(blocks, pl.cdiv(self.window - 1, self.block) + 1)

    def __call__(
        self,
        bounds: jax.Array,
        masks: list[jax.Array],
        q: list[jax.Array],
        keys: list[jax.Array],
        values: list[jax.Array],
    ) -> list[jax.Array]:
        """``f32[B, K, Q, H]``, the logarithms of denominators ``f32[B, K, Q, 1]``, and scores ``f32[B, K, Q, S]``."""
        b, heads = q[0].shape[:2]
        h, f32 = self.values.width, jnp.float32
        cuts = [*self.keys.cuts(), *self.values.cuts()]
        orders = [*self.keys.orders(), *self.values.orders()]
        specs = [
            *map(self._of_head, q),
            *(pl.BlockSpec(x.shape, lambda b, k, j, bounds: (0, 0)) for x in orders),
            *(self._of_tokens(x, (1, 1), whole=x.shape[1] == 1) for x in masks),
            *(self._of_tokens(x, cut) for x, cut in zip([*keys, *values], cuts)),
        ]
        operands = [*q, *map(jnp.asarray, orders), *masks, *keys, *values]
        like = lambda n: jax.ShapeDtypeStruct((b, heads, self.queries, n), f32)
        scores = (self.heads, self.queries, self.block)
        rows = self.queries * self.values.groups
        scratch = [
            *self.keys.scratch(self.heads, self.block, self.chunk),
            *self.values.scratch(self.heads, self.block, self.chunk),
            *[scores] * (not self.weights),
            *[(self.heads, self.queries, LANES)] * 3,  # see `_kernel`
            (self.heads, rows, h),
            *[(self.heads, rows, LANES)] * self.values.has_offsets,
        ]
        return pl.pallas_call(
            functools.partial(_kernel, self, len(q), len(masks)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(b, heads // self.heads, self.steps),
                in_specs=specs,
                out_specs=[
                    self._of_head(like(h)),
                    self._of_head(like(1)),
                    *[self._of_tokens(like(self.tokens), (2, 1))] * self.weights,
                ],
                scratch_shapes=[pltpu.VMEM(shape, f32) for shape in scratch],
            ),
            out_shape=[like(h), like(1), *[like(self.tokens)] * self.weights],
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=VMEM_BYTES,
                dimension_semantics=("parallel", "parallel", "arbitrary"),
            ),
            name="low_bit_attention",
            interpret=self.interpret,
        )(bounds, *operands)

    def _of_head(self, x: Any) -> pl.BlockSpec:
        """All of some heads, ``[B, K, ...]``."""
        shape = (None, self.heads, *x.shape[2:])
        return pl.BlockSpec(shape, lambda b, k, j, bounds: (b, k, *[0] * (len(shape) - 2)))

    def _of_tokens(self, x: Any, cut: tpu_rows.Cut, *, whole: bool = False) -> pl.BlockSpec:
        """A block of some heads, or of all of them."""
        axis, tokens = cut
        shape = [None, 1 if whole else self.heads, *x.shape[2:]]
        shape[axis + 1] = self.block // tokens

        def at(b: Any, k: Any, j: Any, bounds: Any) -> tuple[Any, ...]:
            index: list[Any] = [b, 0 if whole else k, *[0] * (x.ndim - 2)]
            last = lax.div(jnp.maximum(bounds[b, 1] - 1, 0), self.block)
            index[axis + 1] = jnp.minimum(lax.div(bounds[b, 0], self.block) + j, last)
            return tuple(index)

        return pl.BlockSpec(shape, at)


def _kernel(p: _Problem, n_q: int, n_masks: int, bounds: Any, *refs: Any) -> None:
    """A block of tokens.

    Beside sums, VMEM holds for each query: `top`, the maximum so far, in every lane; `peak`, the maximum of a block's
    scores in each lane; `total`, the sum of the weights in each lane.
    """
    take = iter(refs)
    some = lambda n: [next(take) for _ in range(n)]
    q, key_orders, value_orders = (
        some(n_q),
        some(len(p.keys.orders())),
        some(len(p.values.orders())),
    )
    masks, keys, values = some(n_masks), some(len(p.keys.cuts())), some(len(p.values.cuts()))
    out, logs, *score_outs = some(2 + p.weights)
    key_tables, value_tables = some(len(keys) - 1), some(len(values) - 1)
    scores, top, peak, total, sums, *offsets = [*score_outs, *take]
    b, j = pl.program_id(0), pl.program_id(2)
    low, high = bounds[b, 0], bounds[b, 1]
    begin = (lax.div(low, p.block) + j) * p.block

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, NEVER)
        for ref in (total, sums, *offsets):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def seen(start: Any, size: int) -> jax.Array:
        """``bool[1 or K, size]``."""
        token = begin + start + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        inside = (token >= low) & (token < high)
        return (
            inside & (masks[0][:, pl.ds(start, size)].astype(jnp.int32) != 0) if masks else inside
        )

    def chunks(step: Any) -> None:
        @pl.loop(0, p.block // p.chunk)
        def _(i: Any) -> None:
            step(pl.multiple_of(i * p.chunk, p.chunk))

    def tiles(x: jax.Array) -> list[jax.Array]:
        return [x[:, i : i + LANES] for i in range(0, p.chunk, LANES)]

    def score(start: Any) -> None:
        p.keys.stage(keys, key_tables, start)
        inside = seen(start, p.chunk)
        for k in range(p.heads):
            x = p.keys.scores(q, key_orders, keys[0], key_tables, k, start, p.chunk)
            if p.soft_cap is not None:
                x = jnp.tanh(x * (p.scale / p.soft_cap)) * (p.soft_cap * LOG2E)
            else:
                x = x * (p.scale * LOG2E)
            own = inside if inside.shape[0] == 1 else inside[k : k + 1]
            x = jnp.where(own, x, NEVER)
            scores[k, :, pl.ds(start, p.chunk)] = x
            peak[k] = functools.reduce(jnp.maximum, tiles(x), peak[k])

    def add(start: Any) -> None:
        p.values.stage(values, value_tables, start)
        for k in range(p.heads):
            base = jnp.concatenate([top[k]] * (p.chunk // LANES), axis=1)
            weights = jnp.exp2(scores[k, :, pl.ds(start, p.chunk)] - base)
            total[k] = sum(tiles(weights), start=total[k])
            x, offset = p.values.sums(weights, value_orders, values[0], value_tables, k, start)
            sums[k] += x
            if offset is not None:
                offsets[0][k] += offset

    @pl.when(begin < high)
    def _() -> None:
        p.keys.stage_block(keys, key_tables)
        peak[...] = top[...]
        chunks(score)
        best = peak[...].max(-1, keepdims=True)
        old = jnp.exp2(top[...] - best)
        top[...] = jnp.broadcast_to(best, top.shape)
        total[...] *= old
        old = jnp.concatenate([old] * p.values.groups, axis=1)
        sums[...] *= old[:, :, :1]
        for ref in offsets:
            ref[...] *= old
        chunks(add)

    @pl.when(j == p.steps - 1)
    def _() -> None:
        best = top[:, :, :1]
        there = best > NEVER
        sum_of = jnp.where(there, total[...].sum(-1, keepdims=True), 1)
        logs[...] = jnp.where(there, (best + jnp.log2(sum_of)) / LOG2E, -jnp.inf)
        for k in range(p.heads):
            own = p.values.gathered(sums[k], offsets[0][k] if offsets else None, value_orders)
            out[k] = jnp.where(there[k], own / sum_of[k], 0)
