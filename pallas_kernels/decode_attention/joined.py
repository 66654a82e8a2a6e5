"""Attention to the few rows that are kept in full, how parts of one attention are joined, and turning rows back.

Written for few kernels of XLA, of which each takes longer to start than to read what these read: products are sums of
their own instead of small matmuls, and a column of ones beside the rows sums the weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..codecs.rows import hadamard_matrix
from .reference import by_head
from .rows import FullRows

# Output f32[B, K, G, H] and logarithm of the denominator f32[B, K, G].
Part = tuple[jax.Array, jax.Array]


class Sums(NamedTuple):
    """Of some rows: the greatest score, and sums with weights relative to it.

    Attributes:
      top: ``f32[B, K, G]``, -inf where no row is seen.
      total: ``f32[B, K, G]``, of the weights.
      out: ``f32[B, K, G, H]``, of the rows with their weights.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


def attend(q: jax.Array, rows: FullRows, *, scale: float, soft_cap: float | None) -> Sums:
    """Attention of ``[B, N, H]`` to rows in full precision, in float32."""
    b, heads, _, h = rows.keys.shape
    x = q.astype(jnp.float32).reshape(b, heads, 1, -1, h) * scale
    scores = (x * rows.keys.astype(jnp.float32)[:, :, :, None]).sum(-1)  # [B, K, E, G]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(by_head(rows.seen)[..., None], scores, -jnp.inf)
    values = rows.values.astype(jnp.float32)
    values = jnp.pad(values, (*[(0, 0)] * 3, (0, 1)), constant_values=1)
    return sums(values[:, :, :, None], scores)


def sums(values: jax.Array, scores: jax.Array) -> Sums:
    """Of rows ``f32[B, K, P, G or 1, H + 1]``, a 1 in the last place, and scores ``f32[B, K, P, G]``.

    Parts that are attentions themselves have the logarithms of their denominators for scores.
    """
    top = scores.max(2, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isinf(top), 0, top)[:, :, None])
    both = (weights[..., None] * values).sum(2)
    return Sums(top, both[..., -1], both[..., :-1])


def turned(x: jax.Array) -> jax.Array:
    """`hadamard` of a few rows."""
    return (x[..., None, :] * hadamard_matrix(x.shape[-1])).sum(-1)


def finished(*parts: Sums) -> Part:
    """The attention to the rows of all."""
    top = functools.reduce(jnp.maximum, (part.top for part in parts))
    base = jnp.where(jnp.isinf(top), 0, top)
    shares = [jnp.exp(part.top - base) for part in parts]
    add = lambda terms: functools.reduce(jnp.add, terms)
    total = add(share * part.total for share, part in zip(shares, parts))
    out = add(share[..., None] * part.out for share, part in zip(shares, parts))
    return out / jnp.where(total == 0, 1, total)[..., None], top + jnp.log(total)
