"""The path that works everywhere: queries in blocks, so that few scores exist at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .reference import attend, visible

SCORE_BYTES = 64 << 20  # of scores in float32


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
    b, n, t, h = q.shape
    tokens = keys.shape[2]
    size = min(t, max(1, SCORE_BYTES // (4 * b * n * tokens)))

    def block(start: jax.Array | int) -> jax.Array:
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)
        own = None if seen is None else cut(padded(seen, 1, size), 1)
        places = start + jnp.arange(size)
        mask = visible(places, tokens, lengths, own, causal, window)
        return attend(cut(padded(q, 2, size), 2), keys, values, mask, scale, soft_cap)

    if size == t:
        return block(0)
    outs = lax.map(block, jnp.arange(0, t, size))  # [blocks, B, N, size, H]
    return jnp.moveaxis(outs, 0, 2).reshape(b, n, -1, h)[:, :, :t]


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """With zeros behind, up to a multiple of `size`."""
    widths = [(0, -x.shape[d] % size if d == axis else 0) for d in range(x.ndim)]
    return jnp.pad(x, widths)
