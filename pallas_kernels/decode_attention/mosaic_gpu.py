"""Decode attention on Hopper over packed rows.

A block takes one head of the cache and a part of its tokens; its warpgroups take steps of 64 or 128 tokens in turn, so
that the heads that share a cache are read for once. Where up to 8 do, and rows are short, warps work alone
(`by_warps.py`), else the four of a warpgroup work together (`by_warpgroups.py`). Both multiply float16, in which tables
are stored: its digits are more than bfloat16's, and packed rows do not need the range. Blocks give a partial output and
the logarithm of its denominator; another kernel joins them, with the attention to rows that are kept in full
(`join.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..hopper import ROWS
from . import by_warpgroups, by_warps, joined
from . import keys as of_keys
from . import values as of_values
from .block import Block
from .join import JOIN
from .problem import Config as Config
from .problem import OfHeads, Problem, bounds
from .problem import by_warps as is_by_warps
from .reference import by_head, by_row
from .rows import FullRows, Rows, heads_of


def refusal(q: Any, keys: Rows, values: Rows, heads: int) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % ROWS:
        return f"S = {keys.tokens} is no multiple of {ROWS}"
    if q.shape[1] // heads > 64:
        return f"{q.shape[1] // heads} query heads share a head of the cache"
    alone = is_by_warps(q.shape[1] // heads, q.shape[2])
    reasons = ("keys", of_keys.refusal(keys, alone)), ("values", of_keys.rows_refusal(values))
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
    x = joined.turned(q.astype(jnp.float32)) if getattr(keys.codec, "rotate", False) else q
    problem = Problem(
        config, of_keys.keys_of(keys), of_values.Values.of(values), b * heads, heads, heads // keys.heads,
        tokens, n // heads, scale, soft_cap, window, lengths.ndim == 2, weights, interpret,
    )  # fmt: skip
    span = None if seen is None else _span(by_head(seen))
    own = OfHeads(by_row(lengths).astype(jnp.int32), span, _words(seen, hidden, tokens))
    outs, logs, *scores = _call(problem, x.reshape(-1, h), own, keys, values)
    outs, logs = (t.reshape(b, heads, *t.shape[1:]) for t in (outs, logs))
    form = {"scale": scale, "soft_cap": soft_cap, "weights": weights}
    rotated = bool(getattr(values.codec, "rotate", False))
    out, total, *others = JOIN(((outs, logs), q, tuple(full)), **form, rotated=rotated)
    if not weights:
        return out, total
    ends = None if span is None else (span[..., 0], span[..., 1])
    first, stop = bounds(own.lengths, ends, tokens, window)
    found = joined.scores_within(scores[0].reshape(b, heads, -1, tokens), first, stop)
    return out, total, (joined.weights_of(found, total), *others[0])


def _call(
    problem: Problem, q: jax.Array, own: OfHeads, keys: Rows, values: Rows
) -> tuple[jax.Array, ...]:
    """Of ``[B N, H]`` parts ``f32[B K, P, G, H]`` and logarithms of denominators ``f32[B K, P, G]``.

    Where they are asked for, also scores ``f32[B K G, S]``.
    """
    k, v, rows, group = problem.keys, problem.values, problem.rows, problem.group
    of_k, of_v = k.arrays(keys), v.arrays(values)
    slots = [*k.slots(of_k), *v.slots(of_v)]
    config = problem.cut(slots)
    parts, wg = problem.parts(config), config.warpgroups
    way = by_warps if problem.by_warps else by_warpgroups
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def body(
        q: Any, own: OfHeads, arrays: list[Any], out: Any, logs: Any, *scores: Any, **scratch: Any
    ) -> None:
        block = Block(problem, config, parts, own, arrays, len(of_k), list(scores), scratch)
        way.attend(block, q, out, logs, scratch)

    kernel = plgpu.kernel(
        body,
        out_type=[
            f32(rows * parts * group, v.width),
            f32(rows * parts * group),
            *[f32(rows * group, problem.tokens)] * problem.weights,
        ],
        grid=(rows, parts),
        grid_names=("head", "part"),
        num_threads=wg,
        thread_name="wg",
        scratch_types={
            "ring": [
                plgpu.SMEM((wg, config.stages, config.tiles * n, *rest), dtype, transforms=transforms)
                for (n, *rest), dtype, transforms in slots
            ],
            "full": hopper.ring_barriers(len(slots), wg, config.stages, problem.interpret),
            **way.scratch(problem, config),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if problem.interpret else None,
    )  # fmt: skip
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), own)
    x, logs, *scores = kernel(q, flat, [*of_k, *of_v])
    return x.reshape(rows, parts, group, -1), logs.reshape(rows, parts, group), *scores


def _span(seen: jax.Array) -> jax.Array:
    """See `problem.OfHeads`."""
    tokens = seen.shape[-1]
    at = jnp.arange(tokens, dtype=jnp.int32)
    both = jnp.where(seen, jnp.stack([at + 1, tokens - at])[:, None, None], 0)
    last, behind = both.max(-1)  # one pass for both
    return jnp.stack([tokens - behind, last], axis=-1)


def _words(seen: jax.Array | None, hidden: jax.Array | None, tokens: int) -> jax.Array | None:
    """See `problem.OfHeads`.

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
