"""Decode attention on Hopper over packed rows.

A block takes one head of the cache and a part of its tokens; its warpgroups take tiles of 64 tokens in turn. Scores
are ``keys @ q.T`` with the keys as the register operand (`keys.py`), so a column is a query head, and the heads that
share a cache are read for once. Weights go through shared memory, and ``values.T @ weights`` has the values as the
register operand, transposed on the way in (`values.py`). Both multiply float16, in which tables are stored: its digits
are more than bfloat16's, and packed rows do not need the range. Blocks give a partial output and the logarithm of its
denominator; another kernel joins them, with the attention to rows that are kept in full (`join.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..hopper import ROWS
from . import joined
from . import keys as of_keys
from . import values as of_values
from .join import JOIN
from .joined import LOG2E, NEVER
from .reference import by_head, by_row
from .rows import FullRows, Rows, heads_of

LARGEST = 65504.0  # of float16


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut into blocks.

    Attributes:
      warpgroups: of a block; each has a ring of its own.
      stages: tiles in flight.
      blocks: at least so many, where there are tokens enough; half as many more where heads have lengths of their own,
        so that blocks of short heads make room for those of long ones.
    """

    warpgroups: int = 2
    stages: int = 2
    blocks: int = 264


def refusal(q: Any, keys: Rows, values: Rows, heads: int) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % ROWS:
        return f"S = {keys.tokens} is no multiple of {ROWS}"
    if q.shape[1] // heads > 64:
        return f"{q.shape[1] // heads} query heads share a head of the cache"
    reasons = ("keys", of_keys.refusal(keys)), ("values", of_values.refusal(values))
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
    interpret: bool = False,
) -> tuple[Any, ...]:
    """See `decode_attention`."""
    b, n, h = q.shape
    heads, tokens = heads_of(keys, lengths, seen, full), keys.tokens
    group = n // heads
    k, v = of_keys.keys_of(keys), of_values.Values.of(values)
    x = q.astype(jnp.float32)
    x = joined.turned(x) if getattr(keys.codec, "rotate", False) else x
    x = x.reshape(b * heads, group, h) * (scale * (1 if soft_cap else LOG2E))
    width = -(-group // 8) * 8
    x = jnp.pad(x, ((0, 0), (0, width - group), (0, 0)))
    x = k.query(jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float16))
    words = _words(seen, hidden, tokens)
    config = config or Config()
    if lengths.ndim == 2:
        config = dataclasses.replace(config, blocks=config.blocks * 3 // 2)
    problem = _Problem(
        config, k, v, heads, heads // keys.heads, tokens, group, width, soft_cap,
        0 if words is None else words.shape[1], weights, interpret,
    )  # fmt: skip
    first, stop = _bounds(lengths, tokens, window, seen)
    bounds = jnp.stack(jnp.broadcast_arrays(first, stop), axis=-1)
    bounds = jnp.broadcast_to(bounds, (b, heads, 2)).reshape(-1, 2)
    masks = [] if words is None else [words.reshape(-1, words.shape[2])]
    found = problem(x, bounds, masks, k.arrays(keys), v.arrays(values))
    outs, logs, *scores = (t.reshape(b, heads, *t.shape[1:]) for t in found)
    form = {"scale": scale, "soft_cap": soft_cap, "weights": weights}
    rotated = bool(getattr(values.codec, "rotate", False))
    out, total, *others = JOIN(((outs, logs), q, tuple(full)), **form, rotated=rotated)
    if not weights:
        return out, total
    own = joined.weights_of(joined.scores_within(scores[0], first, stop), total)
    return out, total, (own, *others[0])


def _bounds(
    lengths: jax.Array, tokens: int, window: int | None, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The first token that is seen and the end of those: ``int32[B, 1 or K]``."""
    stop = jnp.clip(by_row(lengths).astype(jnp.int32), 0, tokens)
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
    if seen is None:
        return first, stop
    at = jnp.arange(tokens, dtype=jnp.int32)
    both = jnp.where(by_head(seen), jnp.stack([at + 1, tokens - at])[:, None, None], 0)
    last, behind = both.max(-1)  # one pass for both
    return jnp.maximum(first, tokens - behind), jnp.minimum(stop, last)


def _words(seen: jax.Array | None, hidden: jax.Array | None, tokens: int) -> jax.Array | None:
    """Masks as bits: ``int32[B, 1 or K, S / 32]``, the first token lowest. None for none.

    Those of `seen` are made apart: XLA makes them once for all layers that have them in common.
    """
    words = None
    if seen is not None:
        bits = by_head(seen).reshape(*by_head(seen).shape[:2], tokens // 32, 32).astype(jnp.uint32)
        words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    if hidden is not None and hidden.shape[1]:
        at = hidden[:, None, None].astype(jnp.uint32)  # [B, 1, 1, E]; -1 is far behind
        word = jnp.arange(tokens // 32, dtype=jnp.uint32)[:, None]
        bits = jnp.where(at >> 5 == word, jnp.uint32(1) << (at & 31), jnp.uint32(0))
        if words is not None:
            bits = bits | ~words[..., None]
        words = ~jax.lax.reduce_or(bits, (3,))
    return None if words is None else jax.lax.bitcast_convert_type(words, jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static facts of a call.

    Attributes:
      heads: of the cache.
      share: heads that have one head's packed rows in common.
      group, width: query heads of a head of the cache, and columns for them.
      masks: heads that masks are for; 0 for no masks.
      weights: scores are a result.
    """

    config: Config
    keys: of_keys.TokenKeys | of_keys.ChannelKeys
    values: of_values.Values
    heads: int
    share: int
    tokens: int
    group: int
    width: int
    soft_cap: float | None
    masks: int
    weights: bool
    interpret: bool

    def parts(self, rows: int) -> int:
        """Blocks that share the tokens of a head, where there are `rows` heads."""
        tiles = self.tokens // ROWS
        wanted = -(-self.config.blocks // rows)
        return max(1, min(wanted, tiles // self.config.warpgroups))

    def __call__(
        self,
        q: jax.Array,
        bounds: jax.Array,
        masks: list[jax.Array],
        keys: list[jax.Array],
        values: list[jax.Array],
    ) -> tuple[jax.Array, ...]:
        """Parts ``f32[B K, P, G, H]`` and the logarithms of their denominators; scores ``f32[B K, G, S]``."""
        c, rows = self.config, bounds.shape[0]
        parts = self.parts(rows)
        wg, ring = c.warpgroups, (c.warpgroups, c.stages)
        tiles = lambda slots: [
            plgpu.SMEM((*ring, *shape), dtype, transforms=transforms)
            for shape, dtype, transforms in slots
        ]
        f16, pieces = jnp.float16, self.keys.pieces
        columns = self.values.width // pieces
        scratch: dict[str, Any] = {
            "q": plgpu.SMEM((pieces, self.width, columns), f16, transforms=hopper.tiled(f16)),
            "keys": tiles(self.keys.slots(keys)),
            "values": tiles(self.values.slots(values)),
            "weights": plgpu.SMEM((wg, self.width, ROWS), f16, transforms=hopper.tiled(f16)),
            "scales": plgpu.SMEM((wg, self.values.spread), f16),
            "warps": plgpu.SMEM((wg, 4, self.width), jnp.float32),
            "full": hopper.ring_barriers(len(keys + values), wg, c.stages, self.interpret),
            "ready": plgpu.Barrier(num_arrivals=1),
        }
        if self.interpret:
            scratch["staged"] = plgpu.SMEM((wg, ROWS, ROWS), f16)
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        n, h = parts * wg, self.values.width
        kernel = plgpu.kernel(
            _Body(self, parts, len(masks)),
            out_type=[
                f32(rows * n * self.group, h),
                f32(rows * n * self.group, 1),
                *[f32(rows * self.group, self.tokens)] * self.weights,
            ],
            grid=(rows, parts),
            grid_names=("head", "part"),
            num_threads=wg,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )  # fmt: skip
        x, logs, *scores = kernel(q, bounds, *masks, *keys, *values)
        parts = x.reshape(rows, n, self.group, h), logs.reshape(rows, n, self.group)
        return *parts, *(s.reshape(rows, self.group, self.tokens) for s in scores)


class _Body:
    """The kernel's body, for one warpgroup."""

    def __init__(self, problem: _Problem, parts: int, masks: int):
        self.problem, self.parts, self.masks = problem, parts, masks

    def __call__(self, *refs: Any, **scratch: Any) -> None:
        p, c, interpret = self.problem, self.problem.config, self.problem.interpret
        q, bounds, *arrays = refs
        score_outs = [arrays.pop() for _ in range(p.weights)]
        *arrays, out, logs = arrays
        masks, arrays = arrays[: self.masks], arrays[self.masks :]
        wg, head, part = (lax.axis_index(a) for a in ("wg", "head", "part"))
        k, v = p.keys, p.values
        low, high = bounds[head, 0], bounds[head, 1]
        first, last = lax.div(low, ROWS), lax.div(high + ROWS - 1, ROWS)
        share = lax.div(last - first + self.parts - 1, self.parts)
        start = first + part * share  # tiles of this block
        stop = jnp.minimum(start + share, last)
        mine = jnp.maximum(0, lax.div(stop - start - wg + c.warpgroups - 1, c.warpgroups))
        tile = lambda i: start + wg + i * c.warpgroups

        @pl.when(wg == 0)
        def _() -> None:
            pieces = pl.ds(head * k.pieces, k.pieces)
            plgpu.copy_gmem_to_smem(q.at[pieces], scratch["q"], scratch["ready"])

        slots, n_keys = [*scratch["keys"], *scratch["values"]], len(scratch["keys"])
        ring = hopper.Ring(slots, scratch["full"], wg, c.stages, interpret)
        stored = lax.div(head, p.share) * (p.tokens // ROWS)
        fetch = lambda i: ring.fetch(i, arrays, stored + tile(i), i < mine)
        ring.start()
        for i in range(c.stages):
            fetch(jnp.int32(i))
        plgpu.barrier_wait(scratch["ready"])
        shape = (ROWS, p.width)
        constant = lambda x: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), hopper.WGMMA)

        staged = scratch["staged"].at[wg] if interpret else None

        def scores(refs: list[Any]) -> jax.Array:
            def scope(acc: Any) -> jax.Array:
                for a, piece, column in k.operands(refs, interpret):
                    own = scratch["q"].at[piece, :, pl.ds(column, 64)]
                    hopper.mma(acc, a, own.T, staged)
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

        def weights(i: Any, refs: list[Any], top: jax.Array) -> tuple[jax.Array, ...]:
            x = scores(refs)
            if p.soft_cap is not None:
                x = (p.soft_cap * LOG2E) * jnp.tanh(x * (1 / p.soft_cap))
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=hopper.WGMMA)
            row = (row & 48) + 2 * (row & 7) + ((row >> 3) & 1) if k.paired else row
            token = tile(i) * ROWS + row
            inside = (token >= low) & (token < high)
            for mask in masks:
                of = head if p.masks == p.heads else lax.div(head, p.heads)
                words = [mask[of, 2 * tile(i) + half] for half in range(2)]
                word = jnp.where(row < 32, words[0], words[1])
                inside &= ((word >> (row & 31)) & 1) != 0
            x = jnp.where(inside, x, NEVER)
            found = hopper.over_rows("max", x, scratch["warps"].at[wg], interpret)
            for ref in score_outs:
                hopper.store_transposed(
                    ref, x, head * p.group, tile(i) * ROWS, head * p.group + p.group, interpret,
                    paired=k.paired, rows=p.group,
                )  # fmt: skip
            best = jnp.maximum(top, found)
            y = jnp.exp2(x - best).astype(jnp.float16).astype(jnp.float32)
            return best, jnp.exp2(top - best), y

        def step(i: Any, carry: Any) -> Any:
            top, total, outs = carry
            ring.wait(i)
            refs, scales = ring.tile(i), scratch["scales"].at[wg]
            best, old, y = weights(i, refs[:n_keys], top)
            refs = refs[n_keys:]
            hopper.store_weights(scratch["weights"].at[wg], y, interpret, k.paired)
            v.stage(refs, scales, interpret)
            if not interpret:
                plgpu.commit_smem()

            def scope(*accs: Any) -> list[jax.Array]:
                for acc, a in zip(accs, v.operands(refs, scales, interpret)):
                    hopper.mma(acc, a, scratch["weights"].at[wg].T, staged)
                plgpu.wgmma_wait(0)
                return [acc[...] for acc in accs]

            found = pl.run_scoped(scope, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * v.tiles)
            hopper.sync(interpret)
            fetch(i + c.stages)
            return best, total * old + y, [o * old + x for o, x in zip(outs, found)]

        zero = [constant(0.0) for _ in range(v.tiles)]
        carry = (constant(NEVER), constant(0.0), zero)
        top, total, outs = lax.fori_loop(0, mine, step, carry)
        row = (head * self.parts + part) * c.warpgroups + wg
        hopper.sync(interpret)
        total = hopper.over_rows("sum", total, scratch["warps"].at[wg], interpret)
        share = jnp.where(total == 0, 0.0, 1 / total)
        for j, x in enumerate(outs):
            hopper.store_transposed(
                out, x * share, row * p.group, jnp.int32(64 * j),
                row * p.group + p.group, interpret, paired=True, rows=p.group,
            )  # fmt: skip
        found = jnp.where(total == 0, NEVER, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
        hopper.store_first(logs, found, row * p.group, jnp.int32(0), p.group, interpret)
