"""What is left around the kernel, in few passes: joining its parts, attention to rows in full, turning rows back.

The same as `full.py`, but written for few kernels of XLA, of which each takes longer to start than to read what these
read: products are sums of their own instead of small matmuls, and a sum of weights has the shape of the weighted sum
beside it, so that both are one loop.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..codecs.rows import hadamard_matrix
from .full import Part
from .reference import by_head
from .rows import FullRows


class Sums(NamedTuple):
    """Of some rows: the greatest score, and sums of weights relative to it, bare and of the rows' values.

    Attributes:
      top: ``f32[B, K, G]``, -inf where no row is seen.
      total, out: ``f32[B, K, G, H]``; `total` is the same for all elements.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


def attend(q: jax.Array, rows: FullRows, *, scale: float, soft_cap: float | None) -> Sums:
    """Attention of ``[B, N, H]`` to rows in full precision, in float32."""
    b, heads, _, h = rows.keys.shape
    x = q.astype(jnp.float32).reshape(b, heads, -1, 1, h) * scale
    scores = (x * rows.keys.astype(jnp.float32)[:, :, None]).sum(-1)  # [B, K, G, E]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(by_head(rows.seen)[:, :, None], scores, -jnp.inf)
    return _sums(rows.values.astype(jnp.float32)[:, :, None], scores)


def join(outs: jax.Array, logs: jax.Array) -> Sums:
    """One attention from attentions to disjoint rows.

    Args:
      outs: ``f32[B, K, P, G, H]``, each part's own output.
      logs: ``f32[B, K, P, G]``, the logarithms of their denominators; -inf for a part that sees nothing.
    """
    return _sums(outs.swapaxes(2, 3), logs.swapaxes(2, 3))


def _sums(values: jax.Array, scores: jax.Array) -> Sums:
    """Over the axis P of ``f32[B, K, G or 1, P, H]`` and ``f32[B, K, G, P]``."""
    top = scores.max(-1, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isinf(top), 0, top)[..., None])
    weights = jnp.broadcast_to(weights[..., None], (*scores.shape, values.shape[-1]))
    return Sums(top, weights.sum(3), (weights * values).sum(3))


def finished(*parts: Sums) -> Part:
    """The attention to the rows of all."""
    top = functools.reduce(jnp.maximum, (part.top for part in parts))
    base = jnp.where(jnp.isinf(top), 0, top)
    shares = [jnp.exp(part.top - base)[..., None] for part in parts]
    add = lambda terms: functools.reduce(jnp.add, terms)
    total = add(share * part.total for share, part in zip(shares, parts))
    out = add(share * part.out for share, part in zip(shares, parts))
    return out / jnp.where(total == 0, 1, total), top + jnp.log(total[..., 0])


def turned(x: jax.Array) -> jax.Array:
    """`hadamard` of a few rows."""
    return (x[..., None, :] * hadamard_matrix(x.shape[-1])).sum(-1)
