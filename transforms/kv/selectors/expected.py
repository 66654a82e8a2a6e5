"""Expected attention (kvpress): what queries of the kind seen so far will attend to, times the size of the value.

For queries with mean mu and covariance C the expected weight of a key is ``exp(k mu / sqrt(d) + k C k / 2d)``. Differs
from kvpress: mean and covariance are those of this call's queries as they meet the keys, not of queries turned back
and on by the average of future rotary angles. No attention weights are needed.
"""

import jax
import jax.numpy as jnp

from .base import Seen, Selector, latest


def expected_attention(budget: int | float, *, recent: int = 0, sinks: int = 4) -> Selector:
    return Selector("expected", budget, score, recent=recent, sinks=sinks, queries=True)


def score(seen: Seen):
    q, d = seen.queries, seen.keys.shape[-1]
    mean = q.mean(1)
    centred = q - mean[:, None]
    covariance = jnp.einsum("kqd,kqe->kde", centred, centred) / q.shape[1]
    linear = jnp.einsum("kwd,kd->kw", seen.keys, mean) / jnp.sqrt(d)
    square = jnp.einsum("kwd,kde,kwe->kw", seen.keys, covariance, seen.keys) / (2 * d)
    logits = jnp.where(seen.live, linear + square, -jnp.inf)
    weight = jax.nn.softmax(logits, axis=-1) + 1e-6
    return latest(seen, weight * jnp.linalg.norm(seen.values, axis=-1))
