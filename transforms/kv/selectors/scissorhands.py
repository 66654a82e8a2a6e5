"""Scissorhands (https://arxiv.org/abs/2305.17118): tokens that were often attended to more than the average token.

Counts fade by `DECAY` in decoding, which stands for the paper's history window.
"""

import jax.numpy as jnp

from .base import Seen, Selector

DECAY = 0.99


def scissorhands(budget: int | float, *, recent: int = 32, sinks: int = 4) -> Selector:
    return Selector(
        "scissorhands", budget, score, recent=recent, sinks=sinks, statistic=above_average
    )


def above_average(weights, places, total):
    count = jnp.maximum((weights > 0).sum(-1, keepdims=True), 1)
    return (weights > 1 / count).astype(jnp.float32).sum((2, 3))


def score(seen: Seen):
    return seen.score * DECAY**seen.new + seen.stats
