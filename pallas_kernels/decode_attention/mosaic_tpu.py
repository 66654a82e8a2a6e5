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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs.rows import hadamard
from ..tpu import LANES, VMEM_BYTES
from . import joined, tpu_rows
from .reference import by_head
from .rows import FullRows, Rows

LOG2E = math.log2(math.e)
NEVER = -1e30  # a score that is not seen
HEADS = 8  # of the cache in a block, where there are more
MOST_QUERIES = 64  # of a head of the cache


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut.

    Attributes:
      block: tokens of a step of the grid, a multiple of 1024.
      chunk: tokens that are looked at together, a multiple of 128 that divides `block`.
    """

    block: int = 1024
    chunk: int = 256


def refusal(q: Any, keys: Rows, values: Rows) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % LANES:
        return f"S = {keys.tokens} is no multiple of {LANES}"
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
    full: FullRows | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
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
    exact = q.dtype != jnp.bfloat16
    k = dataclasses.replace(tpu_rows.keys_of(keys), exact=exact)
    v = tpu_rows.Values.of(values, exact)
    problem = _Problem(
        config or Config(), k, v, heads if heads % HEADS else HEADS, keys.tokens, x.shape[2],
        scale, soft_cap, window, interpret,
    )  # fmt: skip
    first, stop = _bounds(lengths, keys.tokens, window, seen)
    masks = [] if seen is None else [by_head(seen).astype(jnp.int8)]
    bounds = jnp.stack([first, stop], axis=-1)
    out, logs = problem(bounds, masks, k.queries(x), k.arrays(keys), v.arrays(values))
    out, logs = out[:, :, :group], logs[:, :, :group, 0]
    if getattr(values.codec, "rotate", False):
        out = hadamard(out)
    if full is not None:
        rest = joined.attend(q, full, scale=scale, soft_cap=soft_cap)
        out, logs = joined.finished(joined.Sums(logs, jnp.ones_like(logs), out), rest)
    return out.reshape(b, n, h).astype(q.dtype), logs.reshape(b, n)


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
    ) -> tuple[jax.Array, jax.Array]:
        """``f32[B, K, Q, H]``, and ``f32[B, K, Q, 1]``, the logarithm of the denominator."""
        b, heads = q[0].shape[:2]
        h, f32 = self.values.width, jnp.float32
        cuts = [*self.keys.cuts(), *self.values.cuts()]
        specs = [
            *map(self._of_head, q),
            *(self._of_tokens(x, (1, 1), whole=x.shape[1] == 1) for x in masks),
            *(self._of_tokens(x, cut) for x, cut in zip([*keys, *values], cuts)),
        ]
        like = lambda n: jax.ShapeDtypeStruct((b, heads, self.queries, n), f32)
        rows = self.queries * self.values.groups
        scratch = [
            (self.heads, self.queries, self.block),  # scores, then weights
            *[(self.heads, self.queries, LANES)] * 2,  # the maximum and the sum, in every lane
            (self.heads, rows, h),
            *[(self.heads, rows, LANES)] * (self.values.levels.offset is not None),
            *self.keys.scratch(self.heads, self.block),
        ]
        return pl.pallas_call(
            functools.partial(_kernel, self, len(q), len(masks), len(keys)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(b, heads // self.heads, self.steps),
                in_specs=specs,
                out_specs=[self._of_head(like(h)), self._of_head(like(1))],
                scratch_shapes=[pltpu.VMEM(shape, f32) for shape in scratch],
            ),
            out_shape=[like(h), like(1)],
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=VMEM_BYTES,
                dimension_semantics=("parallel", "parallel", "arbitrary"),
            ),
            name="low_bit_attention",
            interpret=self.interpret,
        )(bounds, *q, *masks, *keys, *values)

    def _of_head(self, x: Any) -> pl.BlockSpec:
        """All of some heads, ``[B, K, ...]``."""
        shape = (None, self.heads, *x.shape[2:])
        return pl.BlockSpec(shape, lambda b, k, j, bounds: (b, k, *[0] * (len(shape) - 2)))

    def _of_tokens(self, x: jax.Array, cut: tpu_rows.Cut, *, whole: bool = False) -> pl.BlockSpec:
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


def _kernel(p: _Problem, n_q: int, n_masks: int, n_keys: int, bounds: Any, *refs: Any) -> None:
    """A block of tokens."""
    take = iter(refs)
    some = lambda n: [next(take) for _ in range(n)]
    q, masks, keys = some(n_q), some(n_masks), some(n_keys)
    values = some(len(p.values.cuts()))
    out, logs, scores, top, total, sums = some(6)
    offsets = some(p.values.levels.offset is not None)
    staged = list(take)
    b, j = pl.program_id(0), pl.program_id(2)
    low, high = bounds[b, 0], bounds[b, 1]
    begin = (lax.div(low, p.block) + j) * p.block

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, NEVER)
        for ref in (total, sums, *offsets):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def seen(start: Any) -> list[jax.Array]:
        """Of each head, ``bool[1, C]``."""
        token = begin + start + lax.broadcasted_iota(jnp.int32, (1, p.chunk), 1)
        inside = (token >= low) & (token < high)
        if not masks:
            return [inside] * p.heads
        flags = masks[0][:, pl.ds(start, p.chunk)].astype(jnp.int32) != 0
        own = lambda k: flags[k : k + 1] if flags.shape[0] > 1 else flags
        return [inside & own(k) for k in range(p.heads)]

    def chunks(step: Any) -> None:
        @pl.loop(0, p.block // p.chunk)
        def _(i: Any) -> None:
            step(pl.multiple_of(i * p.chunk, p.chunk))

    def score(start: Any) -> None:
        found = p.keys.scores(q, keys, staged, p.heads, start, p.chunk)
        for k, (x, own) in enumerate(zip(found, seen(start))):
            if p.soft_cap is not None:
                x = jnp.tanh(x * (p.scale / p.soft_cap)) * (p.soft_cap * LOG2E)
            else:
                x = x * (p.scale * LOG2E)
            scores[k, :, pl.ds(start, p.chunk)] = jnp.where(own, x, NEVER)

    def add(start: Any) -> None:
        at = pl.ds(start, p.chunk)
        weights = [scores[k, :, at] for k in range(p.heads)]
        found = p.values.weighted(weights, seen(start), values, start, p.chunk)
        for k, (x, offset) in enumerate(found):
            sums[k] += x
            if offset is not None:
                offsets[0][k] += offset

    @pl.when(begin < high)
    def _() -> None:
        p.keys.stage(keys, staged)
        chunks(score)
        best = jnp.maximum(top[:, :, :1], scores[...].max(-1, keepdims=True))
        old = jnp.exp2(top[:, :, :1] - best)
        weights = jnp.exp2(scores[...] - best)
        scores[...] = weights
        total[...] = total[...] * old + weights.sum(-1, keepdims=True)
        top[...] = jnp.broadcast_to(best, top.shape)
        old = jnp.concatenate([old] * p.values.groups, axis=1)
        for ref in (sums, *offsets):
            ref[...] *= old
        chunks(add)

    @pl.when(j == p.steps - 1)
    def _() -> None:
        there = top[:, :, :1] > NEVER
        sum_of = jnp.where(there, total[:, :, :1], 1)
        logs[...] = jnp.where(there, (top[:, :, :1] + jnp.log2(sum_of)) / LOG2E, -jnp.inf)
        for k in range(p.heads):
            found = p.values.gathered(sums[k], offsets[0][k] if offsets else None)
            out[k] = jnp.where(there[k], found / sum_of[k], 0)
