"""The path that works everywhere: a block of tokens is decoded and attended to, then the next.

The running maximum and sum are those of an online softmax (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867).
Blocks beyond the last token that is seen are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .joined import Sums, attend, finished
from .reference import visible
from .rows import FullRows, Rows

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
) -> tuple[jax.Array, jax.Array]:
    b, n, h = q.shape
    heads, tokens = keys.heads, keys.tokens
    block = block_of(keys, values)
    x = q.astype(jnp.float32).reshape(b, heads, -1, h) * scale
    mask = visible(tokens, lengths, window, seen, hidden)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        start = i * block
        k, v = (_part(rows, start, block) for rows in (keys, values))
        scores = jnp.einsum("bkgh,bksh->bkgs", x, k)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        here = lax.dynamic_slice_in_dim(mask, start, block, axis=2)[:, :, None]
        scores = jnp.where(here, scores, -jnp.inf)
        best = jnp.maximum(top, scores.max(-1))
        base = jnp.where(jnp.isinf(best), 0, best)
        weights, old = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
        out = out * old[..., None] + jnp.einsum("bkgs,bksh->bkgh", weights, v)
        return best, total * old + weights.sum(-1), out

    shape = (b, heads, n // heads)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, h)))
    last = jnp.where(mask, jnp.arange(1, tokens + 1, dtype=jnp.int32), 0).max()
    top, total, out = lax.fori_loop(0, (last + block - 1) // block, step, start)
    more = [attend(q, part, scale=scale, soft_cap=soft_cap) for part in full]
    out, total = finished(Sums(top, total, out), *more)
    return out.reshape(b, n, h).astype(q.dtype), total.reshape(b, n)


def block_of(keys: Rows, values: Rows) -> int:
    """Tokens of a block: a multiple of what a codec encodes together, and a divisor of all."""
    b, heads, tokens, h = keys.shape
    least = max(keys.codec.block, values.codec.block)
    nbytes = BLOCK_BYTES if jax.default_backend() == "cpu" else DEVICE_BLOCK_BYTES
    most = max(least, nbytes // (8 * b * heads * h))
    sizes = (n for n in range(min(most, tokens), 0, -1) if tokens % n == 0 and n % least == 0)
    return next(sizes, tokens)


def _part(rows: Rows, start: jax.Array, size: int) -> jax.Array:
    n = rows.codec.block
    take = lambda x: lax.dynamic_slice_in_dim(x, start // n, size // n, axis=2)
    return rows.codec.decode(jax.tree.map(take, rows.parts), rows.width)
