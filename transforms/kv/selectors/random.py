"""Tokens at random (by a hash of their positions): what every selector has to beat."""

import jax.numpy as jnp

from .base import Seen, Selector


def random(budget: int | float, *, recent: int = 0, sinks: int = 0) -> Selector:
    return Selector("random", budget, score, recent=recent, sinks=sinks)


def score(seen: Seen):
    x = (seen.at.astype(jnp.uint32) + 1) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    return ((x ^ (x >> 13)) >> 8).astype(jnp.float32)
