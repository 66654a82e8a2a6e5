"""The definition of right: decode all of it, and attend in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .rows import Rows


def seen(tokens: int, lengths: jax.Array, window: int | None) -> jax.Array:
    """Which tokens each row of the batch attends to: ``bool[B, S]``."""
    at, end = jnp.arange(tokens), lengths[:, None]
    mask = at < end
    return mask if window is None else mask & (at >= end - window)


def decode_attention(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    b, n, h = q.shape
    x = q.astype(jnp.float32).reshape(b, keys.heads, -1, h)
    with jax.default_matmul_precision("highest"):
        scores = scale * jnp.einsum("bkgh,bksh->bkgs", x, keys.decode())
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        mask = seen(keys.tokens, lengths, window)[:, None, None]
        scores = jnp.where(mask, scores, -jnp.inf)
        total = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(
            mask, jnp.exp(scores - jnp.where(jnp.isinf(total), 0, total)[..., None]), 0
        )
        out = jnp.einsum("bkgs,bksh->bkgh", weights, values.decode())
    return out.reshape(b, n, h).astype(q.dtype), total.reshape(b, n)
