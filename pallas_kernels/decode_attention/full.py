"""Attention to the few rows that are kept in full, and how parts of one attention are joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .reference import by_head
from .rows import FullRows

Part = tuple[
    jax.Array, jax.Array
]  # output f32[B, K, G, H] and logarithm of the denominator f32[B, K, G]


def attend(q: jax.Array, rows: FullRows, *, scale: float, soft_cap: float | None) -> Part:
    """Attention of ``[B, N, H]`` to rows in full precision, in float32."""
    b, heads, _, h = rows.keys.shape
    x = q.astype(jnp.float32).reshape(b, heads, -1, h) * scale
    scores = jnp.einsum("bkgh,bkeh->bkge", x, rows.keys.astype(jnp.float32))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(by_head(rows.seen)[:, :, None], scores, -jnp.inf)
    top = scores.max(-1, initial=-jnp.inf)
    base = jnp.where(jnp.isinf(top), 0, top)
    weights = jnp.exp(scores - base[..., None])
    total = weights.sum(-1)
    out = jnp.einsum("bkge,bkeh->bkgh", weights, rows.values.astype(jnp.float32))
    return out / jnp.where(total == 0, 1, total)[..., None], base + jnp.log(total)


def join(outs: jax.Array, logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One attention from attentions to disjoint rows.

    Args:
      outs: ``f32[..., P, H]``, each part's own output.
      logs: ``f32[..., P]``, the logarithms of their denominators; -inf for a part that sees nothing.
    """
    total = jax.nn.logsumexp(logs, axis=-1)
    share = jnp.exp(logs - jnp.where(jnp.isinf(total), 0, total)[..., None])
    return (outs * share[..., None]).sum(-2), total
