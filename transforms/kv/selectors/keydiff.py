"""KeyDiff (https://arxiv.org/abs/2504.15364): keys that differ most from the mean direction of all keys."""

import jax.numpy as jnp

from .base import Seen, Selector


def keydiff(budget: int | float, *, recent: int = 0, sinks: int = 0) -> Selector:
    return Selector("keydiff", budget, score, recent=recent, sinks=sinks)


def score(seen: Seen):
    unit = seen.keys / jnp.maximum(jnp.linalg.norm(seen.keys, axis=-1, keepdims=True), 1e-6)
    unit = unit * seen.live[..., None]
    mean = unit.sum(1, keepdims=True) / jnp.maximum(seen.live.sum(1)[:, None, None], 1)
    mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return -(unit * mean).sum(-1)
