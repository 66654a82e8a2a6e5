"""Keys with a small norm (https://arxiv.org/abs/2406.11430): they tend to receive more attention."""

import jax.numpy as jnp

from .base import Seen, Selector


def knorm(budget: int | float, *, recent: int = 0, sinks: int = 0) -> Selector:
    return Selector("knorm", budget, score, recent=recent, sinks=sinks)


def score(seen: Seen):
    return -jnp.linalg.norm(seen.keys, axis=-1)
