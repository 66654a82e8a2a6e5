"""Decode attention on Hopper over packed rows.

A block takes one head of the cache and a part of its tokens; its warpgroups take steps of one or two tiles of 64 tokens
in turn. Scores are ``keys @ q.T`` with the keys as the register operand (`keys.py`), so a column is a query head, and the heads that
share a cache are read for once. Weights go through shared memory, and ``values.T @ weights`` has the values as the
register operand, transposed on the way in (`values.py`). Both multiply float16, in which tables are stored: its digits
are more than bfloat16's, and packed rows do not need the range. Blocks give a partial output and the logarithm of its
denominator; another kernel joins them, with the attention to rows that are kept in full (`join.py`).

A step is a chain of loads, products and barriers, each of which waits for the one before. Two tiles make one chain for
twice the tokens, and codes are decoded where it would wait.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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

START = 2  # steps that a block's start and end take as long as
RING_BYTES = 220 * 2**10  # of a multiprocessor's shared memory


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut into blocks.

    Attributes:
      warpgroups: of a block; each has a ring of its own.
      stages: steps in flight.
      blocks: that run at once; half as many more where heads have lengths of their own, so that blocks of short heads
        make room for those of long ones.
      tiles: of a step, 1 or 2; None for what registers and shared memory have room for.
    """

    warpgroups: int = 2
    stages: int = 2
    blocks: int = 264
    tiles: int | None = None


def refusal(q: Any, keys: Rows, values: Rows, heads: int) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % ROWS:
        return f"S = {keys.tokens} is no multiple of {ROWS}"
    if q.shape[1] // heads > 64:
        return f"{q.shape[1] // heads} query heads share a head of the cache"
    by_warps = _by_warps(q.shape[1] // heads, q.shape[2])
    reasons = ("keys", of_keys.refusal(keys, by_warps)), ("values", of_keys.rows_refusal(values))
    return next((f"{name}: {reason}" for name, reason in reasons if reason), "")


def _by_warps(group: int, width: int) -> bool:
    """Whether warps work alone: they have registers for all elements of a row and few queries."""
    return group <= hopper.QUERIES and width <= 128


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
    k, v = of_keys.keys_of(keys), of_values.Values.of(values)
    x = joined.turned(q.astype(jnp.float32)) if getattr(keys.codec, "rotate", False) else q
    config = config or Config()
    if lengths.ndim == 2:
        config = dataclasses.replace(config, blocks=config.blocks * 3 // 2)
    lengths, words = by_row(lengths).astype(jnp.int32), _words(seen, hidden, tokens)
    span = None if seen is None else _span(by_head(seen))
    problem = _Problem(
        config, k, v, heads, heads // keys.heads, tokens, n // heads, scale, soft_cap, window, weights, interpret
    )  # fmt: skip
    own = _OfHeads(lengths, span, words)
    found = problem(x.reshape(-1, h), own, k.arrays(keys), v.arrays(values))
    outs, logs, *scores = (t.reshape(b, heads, *t.shape[1:]) for t in found)
    form = {"scale": scale, "soft_cap": soft_cap, "weights": weights}
    rotated = bool(getattr(values.codec, "rotate", False))
    out, total, *others = JOIN(((outs, logs), q, tuple(full)), **form, rotated=rotated)
    if not weights:
        return out, total
    bounds = _bounds(
        lengths, None if span is None else (span[..., 0], span[..., 1]), tokens, window
    )
    found = joined.weights_of(joined.scores_within(scores[0], *bounds), total)
    return out, total, (found, *others[0])


class _OfHeads(NamedTuple):
    """What rows of the batch, or their heads, have of their own; the first axes are ``[B, 1 or K]``.

    Attributes:
      lengths: ``int32[B, 1 or K]``.
      span: the first token that is seen and the end of those, ``int32[B, 1 or K, 2]``; None for all.
      words: masks as bits, ``int32[B, 1 or K, S / 32]``, the first token lowest; None for none.
    """

    lengths: jax.Array
    span: jax.Array | None
    words: jax.Array | None


def _span(seen: jax.Array) -> jax.Array:
    tokens = seen.shape[-1]
    at = jnp.arange(tokens, dtype=jnp.int32)
    both = jnp.where(seen, jnp.stack([at + 1, tokens - at])[:, None, None], 0)
    last, behind = both.max(-1)  # one pass for both
    return jnp.stack([tokens - behind, last], axis=-1)


def _bounds(length: Any, span: Any, tokens: int, window: int | None) -> tuple[Any, Any]:
    """The first token that is attended to and the end of those, of scalars or arrays."""
    stop = jnp.minimum(jnp.maximum(length, 0), tokens)
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
    if span is None:
        return first, stop
    return jnp.maximum(first, span[0]), jnp.minimum(stop, span[1])


def _words(seen: jax.Array | None, hidden: jax.Array | None, tokens: int) -> jax.Array | None:
    """See `_OfHeads`. Those of `seen` are made apart: XLA makes them once for all layers that have them in common."""
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
      group: query heads of a head of the cache.
      weights: scores are a result.
    """

    config: Config
    keys: of_keys.TokenKeys | of_keys.ChannelKeys
    values: of_values.Values
    heads: int
    share: int
    tokens: int
    group: int
    scale: float
    soft_cap: float | None
    window: int | None
    weights: bool
    interpret: bool

    @property
    def width(self) -> int:
        """Columns for the query heads of a head of the cache."""
        return -(-self.group // 8) * 8

    def tiles(self, tile_bytes: int) -> int:
        """Of a step."""
        c = self.config
        fits = 2 * c.warpgroups * c.stages * tile_bytes * max(1, 4 // c.warpgroups) <= RING_BYTES
        many = fits and self.width <= 16 and self.values.tiles <= 2
        return min(c.tiles or (2 if many else 1), self.tokens // ROWS)

    def parts(self, rows: int, tiles: int) -> int:
        """Blocks that share the tokens of a head, where there are `rows` heads and so many tiles in a step.

        Blocks beyond those that run at once wait for a whole block to end.
        """
        c, steps = self.config, self.tokens // ROWS // tiles

        def cost(parts: int) -> int:
            return -(-rows * parts // c.blocks) * (-(-steps // (parts * c.warpgroups)) + START)

        return min(range(1, max(1, steps // c.warpgroups) + 1), key=cost)

    @property
    def by_warps(self) -> bool:
        return _by_warps(self.group, self.values.width)

    def of_warpgroups(self, tiles: int) -> dict[str, Any]:
        """Scratch where the warps of a warpgroup work together."""
        wg, h, f16, pieces = (
            self.config.warpgroups,
            self.values.width,
            jnp.float16,
            self.keys.pieces,
        )
        scratch: dict[str, Any] = {
            "queries": plgpu.SMEM(
                (pieces, self.width, h // pieces), f16, transforms=hopper.tiled(f16)
            ),
            "weights": plgpu.SMEM((wg, tiles, self.width, ROWS), f16, transforms=hopper.tiled(f16)),
            "scales": plgpu.SMEM((wg, tiles, self.values.spread), f16),
            "warps": plgpu.SMEM((wg, 4, self.width), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=1),
        }
        if wg > 1:
            words = hopper.words(self.width, self.values.tiles)
            scratch["sums"] = plgpu.SMEM((wg - 1, words), jnp.float32)
            scratch["summed"] = plgpu.Barrier(num_arrivals=wg - 1)
        if self.interpret:
            scratch["staged"] = plgpu.SMEM((wg, ROWS, ROWS), f16)
        return scratch

    def __call__(
        self, q: jax.Array, own: _OfHeads, keys: list[jax.Array], values: list[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """Of ``[B N, H]`` parts ``f32[B K, P, G, H]`` and the logarithms of their denominators; scores ``f32[B K, G, S]``."""
        c, rows = self.config, q.shape[0] // self.group
        slots = [*self.keys.slots(keys), *self.values.slots(values)]
        tiles = self.tiles(sum(math.prod(s) * jnp.dtype(t).itemsize for s, t, _ in slots))
        parts, wg, h = self.parts(rows, tiles), c.warpgroups, self.values.width
        scratch: dict[str, Any] = {
            "ring": [
                plgpu.SMEM((wg, c.stages, tiles * n, *rest), dtype, transforms=transforms)
                for (n, *rest), dtype, transforms in slots
            ],
            "full": hopper.ring_barriers(len(slots), wg, c.stages, self.interpret),
        }
        if self.by_warps:
            scratch["join"] = hopper.join_scratch(wg, h, self.interpret)
            if self.interpret:
                scratch["joined"] = plgpu.Barrier(num_arrivals=wg)
        else:
            scratch |= self.of_warpgroups(tiles)
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        n = rows * parts * self.group
        kernel = plgpu.kernel(
            _Body(self, rows, parts, tiles, len(keys)),
            out_type=[f32(n, h), f32(n), *[f32(rows * self.group, self.tokens)] * self.weights],
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
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), own)
        x, logs, *scores = kernel(q, flat, [*keys, *values])
        parts = x.reshape(rows, parts, self.group, h), logs.reshape(rows, parts, self.group)
        return *parts, *(s.reshape(rows, self.group, self.tokens) for s in scores)


class _Body:
    """The kernel's body, for one warpgroup."""

    def __init__(self, problem: _Problem, rows: int, parts: int, tiles: int, n_keys: int):
        self.problem, self.rows, self.parts, self.tiles = problem, rows, parts, tiles
        self.n_keys = n_keys

    def __call__(
        self, q: Any, of_heads: _OfHeads, arrays: list[Any], *refs: Any, **scratch: Any
    ) -> None:
        out, logs, *score_outs = refs
        p, c, interpret = self.problem, self.problem.config, self.problem.interpret
        wg, head, part = (lax.axis_index(a) for a in ("wg", "head", "part"))
        k, v, tiles = p.keys, p.values, self.tiles
        low, high = self.bounds(of_heads, head)
        first = lax.div(low, ROWS)
        steps = lax.div(lax.div(high + ROWS - 1, ROWS) - first + tiles - 1, tiles)
        share = lax.div(steps + self.parts - 1, self.parts)
        start = part * share  # steps of this block
        stop = jnp.minimum(start + share, steps)
        mine = jnp.maximum(0, lax.div(stop - start - wg + c.warpgroups - 1, c.warpgroups))
        begin = lambda i: first + (start + wg + i * c.warpgroups) * tiles
        # the last step may begin earlier, so as not to read behind the rows; it hides what the one before has seen
        tile = lambda i: jnp.minimum(begin(i), p.tokens // ROWS - tiles)

        ring = hopper.Ring(scratch["ring"], scratch["full"], wg, c.stages, interpret, tiles)
        stored = lax.div(head, p.share) * (p.tokens // ROWS)
        fetch = lambda i: ring.fetch(i, arrays, stored + tile(i), i < mine)
        ring.start()
        fetch(
            jnp.int32(0)
        )  # the first steps of all before any second one: what is first asked for comes first

        scale = p.scale * (1 if p.soft_cap else LOG2E)
        runs = tiles if isinstance(k, of_keys.ChannelKeys) else 0

        def capped(found: list[jax.Array]) -> list[jax.Array]:
            if (cap := p.soft_cap) is None:
                return found
            return [(cap * LOG2E) * jnp.tanh(x * (1 / cap)) for x in found]

        def shown(i: Any, x: list[jax.Array]) -> list[jax.Array]:
            cut = functools.partial(
                hopper.hide, first=tile(i) * ROWS, high=high, never=NEVER, runs=runs, interpret=interpret
            )  # fmt: skip
            if (words := of_heads.words) is not None:
                x = hopper.hide_unset(
                    x, words, self.own(words, head), tile(i), NEVER, runs, interpret
                )
            if not p.weights:
                return cut(x, low=jnp.maximum(low, begin(i) * ROWS))
            x = cut(x, low=low)
            hopper.store_scores(
                score_outs[0], x, head * p.group, tile(i) * ROWS, p.group, runs, interpret
            )
            return cut(x, low=begin(i) * ROWS)

        row = (head * self.parts + part) * p.group
        if p.by_warps:
            queries = hopper.load_queries(
                q, head * p.group, p.group, k.warp_order, scale, interpret
            )
            query_sums = k.sums(queries, interpret)
            for i in range(1, c.stages):
                fetch(jnp.int32(i))

            def step(i: Any, carry: Any) -> Any:
                top, total, outs = carry
                ring.wait(i)
                refs = ring.slot(i)
                x = k.scores(queries, query_sums, refs[: self.n_keys], tiles, interpret)
                x = shown(i, capped(x))
                top, old, total, y = hopper.weigh_rows(x, top, total, interpret)
                codes, *tables = refs[self.n_keys :]
                outs = hopper.add_values(
                    outs, old, y, codes, tables, v.plan,
                    runs=runs, row_bytes=v.row_bytes, group=v.group, groups=v.groups, interpret=interpret,
                )  # fmt: skip
                hopper.release(wg * c.stages + lax.rem(i, c.stages), interpret)
                fetch(i + c.stages)
                return top, total, outs

            column = lambda x: hopper.warp_column(x, interpret)
            zero = lambda: plgpu.layout_cast(jnp.zeros((ROWS, p.width), jnp.float32), hopper.WGMMA)
            sums = column(NEVER), column(0.0), [zero() for _ in range(v.width // 16)]
            top, total, outs = lax.fori_loop(0, mine, step, sums)
            if not interpret:
                hopper.join_warps(
                    outs, top, total, scratch["join"], out, logs, row, p.group, c.warpgroups
                )
                return
            self.join(wg, top, total, outs, scratch, out, logs, row)
            return

        @pl.when(wg == 0)
        def _() -> None:
            hopper.stage_rows(
                scratch["queries"], q, head * p.group, p.group, k.order, scale, interpret
            )
            if not interpret:
                plgpu.commit_smem()
            plgpu.barrier_arrive(scratch["ready"])

        plgpu.barrier_wait(scratch["ready"])
        for i in range(1, c.stages):
            fetch(jnp.int32(i))
        shape = (ROWS, p.width)
        products = lambda n: [plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * n
        staged = scratch["staged"].at[wg] if interpret else None
        warps, weights = scratch["warps"].at[wg], scratch["weights"].at[wg]
        of_values = lambda refs, t: [hopper.tile_of(ref, t, tiles) for ref in refs[self.n_keys :]]
        scales = lambda t: scratch["scales"].at[wg, t]

        def scores(refs: list[Any]) -> list[jax.Array]:
            def scope(*accs: Any) -> list[jax.Array]:
                for t, a, piece, column in k.operands(refs[: self.n_keys], tiles, interpret):
                    own = scratch["queries"].at[piece, :, pl.ds(column, 64)]
                    hopper.mma(accs[t], a, own.T, staged)
                for t in range(tiles):
                    v.stage(of_values(refs, t), scales(t), interpret)
                plgpu.wgmma_wait(0)
                return [acc[...] for acc in accs]

            return capped(pl.run_scoped(scope, *products(tiles)))

        def step(i: Any, carry: Any) -> Any:
            top, total, outs = carry
            ring.wait(i)
            refs = ring.slot(i)
            x = shown(i, scores(refs))
            hopper.spread_max(x, warps, interpret)
            operands = lambda t: v.operands(of_values(refs, t), scales(t), interpret)
            ready = operands(0)  # while the greatest scores and weights are waited for
            top, old, y = hopper.weigh(x, top, warps, interpret)
            hopper.store_weights(weights, y, runs, interpret)
            total = hopper.add_rows(total, old, y, interpret)
            if not interpret:
                plgpu.commit_smem()

            def scope(*accs: Any) -> list[jax.Array]:
                for t in range(tiles):
                    for acc, a in zip(accs, operands(t) if t else ready):
                        hopper.mma(acc, a, weights.at[t].T, staged)
                hopper.sync(interpret)
                fetch(i + c.stages)
                plgpu.wgmma_wait(0)
                return [acc[...] for acc in accs]

            found = pl.run_scoped(scope, *products(v.tiles))
            factor = hopper.in_rows(old)
            return top, total, [o * factor + x for o, x in zip(outs, found)]

        zeros = lambda: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), hopper.WGMMA)
        column = lambda x: hopper.column(p.width, x)
        sums = (column(NEVER), column(0.0), [zeros() for _ in range(v.tiles)])
        sums = lax.fori_loop(0, mine, step, sums)
        hopper.sync(interpret)
        for other in range(1, c.warpgroups):

            @pl.when(wg == other)
            def _() -> None:
                hopper.hand_over(scratch["sums"].at[other - 1], (*sums[:2], *sums[2]), interpret)
                plgpu.barrier_arrive(scratch["summed"])

        @pl.when(wg == 0)
        def _() -> None:
            top, total, outs = sums
            if c.warpgroups > 1:
                plgpu.barrier_wait(scratch["summed"])
            for other in range(1, c.warpgroups):
                theirs = hopper.taken(scratch["sums"].at[other - 1], (top, total, *outs), interpret)
                best = jnp.maximum(top, theirs[0])
                own, more = jnp.exp2(top - best), jnp.exp2(theirs[0] - best)
                top, total = best, total * own + theirs[1] * more
                own, more = hopper.in_rows(own), hopper.in_rows(more)
                outs = [x * own + y * more for x, y in zip(outs, theirs[2:])]
            total = hopper.column_sums(total, warps, interpret)
            each = hopper.in_rows(jnp.where(total == 0, 0.0, 1 / total))
            for j, x in enumerate(outs):
                hopper.store_transposed(
                    out, x * each, row, jnp.int32(64 * j), row + p.group, interpret, paired=True, rows=p.group
                )  # fmt: skip
            found = jnp.where(total == 0, NEVER, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
            hopper.store_columns(logs, found, row, p.group, interpret)

    def join(
        self, wg: Any, top: Any, total: Any, outs: Any, scratch: Any, out: Any, logs: Any, row: Any
    ) -> None:
        """`hopper.join_warps` for the interpreter."""
        p, c, shared = self.problem, self.problem.config, scratch["join"][0]
        best = top.max(0)
        share = jnp.exp2(top - best)
        x = jnp.stack(outs).reshape(-1, 4, 2, 8, p.width).transpose(1, 0, 3, 2, 4)
        x = x.reshape(4, -1, p.width) * share[:, None]
        shared[wg] = jnp.concatenate([best[None], (total * share).sum(0)[None], x.sum(0)])
        plgpu.barrier_arrive(scratch["joined"])

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.barrier_wait(scratch["joined"])
            found = shared[...]
            best = found[:, 0].max(0)
            share = jnp.exp2(found[:, 0] - best)
            total = (found[:, 1] * share).sum(0)
            kept = jnp.where(total == 0, 1, total)
            x = (found[:, 2:] * share[:, None]).sum(0) / kept
            out[pl.ds(row, p.group), :] = x.T[: p.group]
            log = jnp.where(total == 0, NEVER, best + jnp.log2(kept))
            logs[pl.ds(row, p.group)] = log[: p.group]

    def own(self, x: Any, head: Any) -> Any:
        """Where an array of `_OfHeads`, its first axes joined, has what is a head's."""
        return head if x.shape[0] == self.rows else lax.div(head, self.problem.heads)

    def bounds(self, of_heads: _OfHeads, head: Any) -> tuple[Any, Any]:
        """See `_bounds`."""
        p, span = self.problem, of_heads.span
        length = of_heads.lengths[self.own(of_heads.lengths, head)]
        if span is not None:
            at = self.own(span, head)
            span = span[at, 0], span[at, 1]
        return _bounds(length, span, p.tokens, p.window)
