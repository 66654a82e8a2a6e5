"""The definition of right: all scores at once, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # a score that is not seen


def visible(
    places: jax.Array,
    tokens: int,
    lengths: jax.Array | None,
    seen: jax.Array | None,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """Which tokens the queries at `places` see, ``bool[B or 1, T or 1, S]``; `seen` is of these queries."""
    at, mask = jnp.arange(tokens), jnp.ones((1, 1, tokens), bool)
    if causal:
        mask &= at <= places[:, None]
    if window is not None:
        mask &= at > places[:, None] - window
    if lengths is not None:
        mask = mask & (at < lengths[:, None, None])
    return mask if seen is None else mask & seen


def prefill_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array | None,
    seen: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    mask = visible(jnp.arange(q.shape[2]), keys.shape[2], lengths, seen, causal, window)
    with jax.default_matmul_precision("highest"):
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, keys, values))
        return attend(q32, k32, v32, mask, scale, soft_cap).astype(q.dtype)


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """All scores at once, in float32; the weights are of the dtype of `values`."""
    b, n, t, h = q.shape
    x = q.reshape(b, keys.shape[1], -1, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", x, keys, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, None, None], scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights, values).reshape(b, n, t, h)
