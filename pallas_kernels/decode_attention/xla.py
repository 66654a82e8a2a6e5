"""The path that works everywhere: a block of tokens is decoded and attended to, then the next.

The running maximum and sum are those of an online softmax (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867).
Blocks beyond the last token that is seen are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .joined import Sums, attend, finished, weights_of, weights_of_rows
from .reference import visible
from .rows import FullRows, Rows, heads_of

BLOCK_BYTES = 16 * 2**20  # of decoded float32 rows, in a CPU's caches
DEVICE_BLOCK_BYTES = 128 * 2**20  # elsewhere: small blocks leave a GPU waiting for its next kernel


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
    heads, tokens = heads_of(keys, lengths, seen, full), keys.tokens
    block = block_of(keys, values, heads)
    x = q.astype(jnp.float32).reshape(b, heads, -1, h) * scale
    mask = visible(tokens, lengths, window, seen, hidden)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out, *kept = carry
        start = i * block
        k, v = (_part(rows, start, block, heads) for rows in (keys, values))
        scores = jnp.einsum("bkgh,bksh->bkgs", x, k)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        here = lax.dynamic_slice_in_dim(mask, start, block, axis=2)[:, :, None]
        scores = jnp.where(here, scores, -jnp.inf)
        best = jnp.maximum(top, scores.max(-1))
        base = jnp.where(jnp.isinf(best), 0, best)
        shares, old = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
        out = out * old[..., None] + jnp.einsum("bkgs,bksh->bkgh", shares, v)
        kept = [lax.dynamic_update_slice_in_dim(x, scores, start, axis=3) for x in kept]
        return best, total * old + shares.sum(-1), out, *kept

    shape = (b, heads, n // heads)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, h)))
    start += (jnp.full((*shape, tokens), -jnp.inf),) * weights
    last = jnp.where(mask, jnp.arange(1, tokens + 1, dtype=jnp.int32), 0).max()
    top, total, out, *kept = lax.fori_loop(0, (last + block - 1) // block, step, start)
    more = [attend(q, part, scale=scale, soft_cap=soft_cap) for part in full]
    out, total = finished(Sums(top, total, out), *more)
    out, total = out.reshape(b, n, h).astype(q.dtype), total.reshape(b, n)
    if not weights:
        return out, total
    others = weights_of_rows(q, full, total, scale=scale, soft_cap=soft_cap)
    return out, total, (weights_of(kept[0], total), *others)


def block_of(keys: Rows, values: Rows, heads: int) -> int:
    """Tokens of a block: a multiple of what a codec encodes together, and a divisor of all."""
    b, _, tokens, h = keys.shape
    least = max(keys.codec.block, values.codec.block)
    nbytes = BLOCK_BYTES if jax.default_backend() == "cpu" else DEVICE_BLOCK_BYTES
    most = max(least, nbytes // (8 * b * heads * h))
    sizes = (n for n in range(min(most, tokens), 0, -1) if tokens % n == 0 and n % least == 0)
    return next(sizes, tokens)


def _part(rows: Rows, start: jax.Array, size: int, heads: int) -> jax.Array:
    """``f32[B, heads, size, H]``."""
    n = rows.codec.block
    take = lambda x: lax.dynamic_slice_in_dim(x, start // n, size // n, axis=2)
    x = rows.codec.decode(jax.tree.map(take, rows.parts), rows.width)
    return jnp.broadcast_to(x, (x.shape[0], heads, *x.shape[2:]))
