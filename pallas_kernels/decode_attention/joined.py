"""Attention to the few rows that are kept in full, how parts of one attention are joined, and turning rows back.

The path without a kernel; `join.py` has one that does it all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..codecs.rows import hadamard_matrix
from .reference import by_head
from .rows import FullRows

LOG2E = math.log2(math.e)
NEVER = -1e30  # a score that is not seen, and the logarithm of no weight at all
MANY = 512  # rows, from which on matmuls are faster than sums of products

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


def join(
    parts: Part,
    q: jax.Array,
    full: Sequence[FullRows],
    *,
    scale: float,
    soft_cap: float | None,
    rotated: bool,
    weights: bool = False,
) -> tuple[Any, ...]:
    """The attention that parts make together, with that to rows in full.

    Args:
      parts: outputs ``f32[B, K, P, G, H]``, and the logarithms to base 2 of their denominators ``f32[B, K, P, G]``,
        `NEVER` where nothing was seen.
      q: ``[B, N, H]``.
      rotated: the outputs of parts are to be turned by the Hadamard matrix.

    Returns:
      As `decode_attention`; with `weights` those of `full` alone.
    """
    outs, logs = parts
    found = sums(outs, jnp.where(logs <= NEVER, -jnp.inf, logs / LOG2E))
    if rotated:
        found = found._replace(out=turned(found.out))
    more = [attend(q, rows, scale=scale, soft_cap=soft_cap) for rows in full]
    out, total = finished(found, *more)
    out, total = out.reshape(q.shape).astype(q.dtype), total.reshape(q.shape[:2])
    if not weights:
        return out, total
    return out, total, weights_of_rows(q, full, total, scale=scale, soft_cap=soft_cap)


def attend(q: jax.Array, rows: FullRows, *, scale: float, soft_cap: float | None) -> Sums:
    """Attention of ``[B, N, H]`` to rows in full precision, in float32."""
    scores = scores_of(q, rows, scale=scale, soft_cap=soft_cap)
    if scores.shape[2] > MANY:
        return _sums_by_matmul(rows.values, scores)
    return sums(rows.values.astype(jnp.float32)[:, :, :, None], scores)


def scores_of(q: jax.Array, rows: FullRows, *, scale: float, soft_cap: float | None) -> jax.Array:
    """Of ``[B, N, H]`` with rows in full precision: ``f32[B, K, E, G]``, -inf where not seen."""
    b, heads, count, h = rows.keys.shape
    if count > MANY:
        x = q.reshape(b, heads, -1, h)
        scores = scale * _matmul("bkgh,bkeh->bkge", x, rows.keys).swapaxes(2, 3)
    else:
        x = q.astype(jnp.float32).reshape(b, heads, 1, -1, h) * scale
        scores = (x * rows.keys.astype(jnp.float32)[:, :, :, None]).sum(-1)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(by_head(rows.seen)[..., None], scores, -jnp.inf)


def weights_of(scores: jax.Array, total: jax.Array) -> jax.Array:
    """``f32[B, N, E]`` of scores ``f32[B, K, G, E]``, -inf where not seen, and the `total` of `decode_attention`."""
    base = jnp.where(jnp.isinf(total), 0, total)[..., None]
    return jnp.exp(scores.reshape(*total.shape, -1) - base)


def weights_of_rows(
    q: jax.Array, full: Sequence[FullRows], total: jax.Array, **form: Any
) -> tuple[jax.Array, ...]:
    """For each of `full`; see `scores_of`."""
    scores = (scores_of(q, rows, **form).swapaxes(2, 3) for rows in full)
    return tuple(weights_of(x, total) for x in scores)


def natural(scores: jax.Array) -> jax.Array:
    """Scores of kernels, to base 2 and `NEVER` where not seen, to base e and -inf."""
    return jnp.where(scores > NEVER, scores / LOG2E, -jnp.inf)


def scores_within(scores: jax.Array, first: jax.Array, stop: jax.Array) -> jax.Array:
    """`natural` scores ``f32[B, K, G, S]``, written by a kernel from `first` to `stop` alone, ``int32[B, 1 or K]``."""
    at = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    inside = (at >= first[..., None]) & (at < stop[..., None])
    return jnp.where(inside[:, :, None], natural(scores), -jnp.inf)


def sums(values: jax.Array, scores: jax.Array) -> Sums:
    """Of rows ``f32[B, K, P, G or 1, H]`` and scores ``f32[B, K, P, G]``.

    Parts that are attentions themselves have the logarithms of their denominators for scores.
    """
    top = scores.max(2, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isinf(top), 0, top)[:, :, None])
    return Sums(top, weights.sum(2), (weights[..., None] * values).sum(2))


def _sums_by_matmul(values: jax.Array, scores: jax.Array) -> Sums:
    """`sums` of rows ``[B, K, E, H]``; weights are rounded to their dtype."""
    top = scores.max(2)
    weights = jnp.exp(scores - jnp.where(jnp.isinf(top), 0, top)[:, :, None])
    out = _matmul("bkge,bkeh->bkgh", weights.swapaxes(2, 3).astype(values.dtype), values)
    return Sums(top, weights.sum(2), out)


def _matmul(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    options: dict[str, Any] = {"preferred_element_type": jnp.float32, "precision": "highest"}
    return jnp.einsum(form, x, y, **options)


def turned(x: jax.Array) -> jax.Array:
    """`hadamard` of a few rows, as a sum of products: a small matmul takes longer to start."""
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
