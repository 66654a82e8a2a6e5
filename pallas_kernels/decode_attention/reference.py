"""The definition of right: decode all of it, and attend in float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .rows import FullRows, Rows, heads_of


def visible(
    tokens: int,
    lengths: jax.Array,
    window: int | None,
    seen: jax.Array | None,
    hidden: jax.Array | None,
) -> jax.Array:
    """Which tokens are attended to: ``bool[B, 1 or K, S]``."""
    at, end = jnp.arange(tokens), by_row(lengths)[..., None]
    mask = at < end
    if window is not None:
        mask &= at >= end - window
    if hidden is not None:
        place = jnp.where(hidden < 0, tokens, hidden)
        mask = jax.vmap(lambda m, p: m.at[:, p].set(False, mode="drop"))(mask, place)
    return mask if seen is None else mask & by_head(seen)


def by_row(lengths: jax.Array) -> jax.Array:
    """``int32[B]`` or ``int32[B, K]`` as ``int32[B, 1 or K]``."""
    return lengths[:, None] if lengths.ndim == 1 else lengths


def by_head(seen: jax.Array) -> jax.Array:
    """``bool[B, T]`` or ``bool[B, K, T]`` as ``bool[B, 1 or K, T]``."""
    return seen[:, None] if seen.ndim == 2 else seen


def decode_attention(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    seen: jax.Array | None,
    hidden: jax.Array | None,
    full: Sequence[FullRows],
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    weights: bool = False,
) -> tuple[Any, ...]:
    b, n, h = q.shape
    lead = (b, heads_of(keys, lengths, seen, full))
    x = q.astype(jnp.float32).reshape(*lead, -1, h)
    k, v = (jnp.broadcast_to(y.decode(), (*lead, y.tokens, h)) for y in (keys, values))
    mask = visible(keys.tokens, lengths, window, seen, hidden)
    for part in full:
        k, v = (jnp.concatenate([a, y], axis=2) for a, y in ((k, part.keys), (v, part.values)))
        both = (jnp.broadcast_to(m, (*lead, m.shape[2])) for m in (mask, by_head(part.seen)))
        mask = jnp.concatenate(list(both), axis=2)
    with jax.default_matmul_precision("highest"):
        scores = scale * jnp.einsum("bkgh,bksh->bkgs", x, k)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        mask = mask[:, :, None]
        scores = jnp.where(mask, scores, -jnp.inf)
        total = jax.nn.logsumexp(scores, axis=-1)
        shares = jnp.exp(scores - jnp.where(jnp.isinf(total), 0, total)[..., None])
        out = jnp.einsum("bkgs,bksh->bkgh", shares, v)
    found = out.reshape(b, n, h).astype(q.dtype), total.reshape(b, n)
    if not weights:
        return found
    sizes = [keys.tokens, *(part.keys.shape[2] for part in full)]
    ends = list(itertools.accumulate(sizes))[:-1]
    return *found, tuple(jnp.split(shares.reshape(b, n, -1), ends, axis=2))
