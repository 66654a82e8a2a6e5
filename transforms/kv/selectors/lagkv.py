"""LagKV (https://arxiv.org/abs/2504.04704): how much a token stands out by the ranges of the tokens that follow.

Each chunk of `lag` tokens is normalized, channel by channel, by the least and greatest value in the next chunk; a
token's score is the softmax over its chunk of its spread over channels, for keys and for values. A prompt is scored
when it comes; tokens of its last chunk are the newest.
"""

import functools

import jax
import jax.numpy as jnp

from .base import Seen, Selector, latest


def lagkv(budget: int | float, *, lag: int = 32, sinks: int = 4) -> Selector:
    return Selector("lagkv", budget, scored(lag), recent=lag, sinks=sinks)


@functools.cache
def scored(lag: int):
    def score(seen: Seen):
        return latest(seen, _spread(seen.keys, lag) + _spread(seen.values, lag))

    return score


def _spread(x: jax.Array, lag: int) -> jax.Array:
    """``f32[K, W]``; slots are in the order of their positions."""
    k, w, d = x.shape
    pad = -w % lag
    chunks = jnp.pad(x, ((0, 0), (pad, 0), (0, 0))).reshape(k, -1, lag, d)
    low, high = (f(chunks[:, 1:], axis=2, keepdims=True) for f in (jnp.min, jnp.max))
    z = (chunks[:, :-1] - low) / jnp.maximum(high - low, 1e-6)
    score = jax.nn.softmax(z.std(-1), axis=-1) * lag
    last = jnp.full((k, 1, lag), jnp.inf)
    return jnp.concatenate([score, last], axis=1).reshape(k, -1)[:, pad:]
