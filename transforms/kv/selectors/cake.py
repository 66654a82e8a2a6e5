"""CAKE (https://arxiv.org/abs/2503.12491): mean and variance of the attention from a window, and a budget for each
layer by how spread and how restless its attention is.

The budgets are static here: `preferences` are measured once, on a calibration text, by `layer_preferences` (the
paper measures them on each prompt). Without them layers share equally.
"""

import functools

import jax.numpy as jnp

from .base import Seen, Selector, latest, pooled


def cake(
    budget: int | float,
    *,
    window: int = 32,
    gamma: float = 200.0,
    kernel: int = 5,
    preferences: tuple[float, ...] = (),
) -> Selector:
    layers = shares(tuple(preferences)) if preferences else None
    statistic = mean_and_variance(window, gamma)
    return Selector(
        "cake", budget, smoothed(kernel), recent=window, statistic=statistic, layers=layers
    )


@functools.cache
def mean_and_variance(window: int, gamma: float):
    """``mean + gamma * variance`` of each slot's attention over the last `window` queries of a call."""

    def statistic(weights, places, total):
        n = min(window, total)
        x = weights.mean(3) * (places >= total - window).astype(weights.dtype)[:, None]
        mean = x.sum(2) / n
        return mean + gamma * jnp.maximum((x**2).sum(2) / n - mean**2, 0)

    return statistic


@functools.cache
def smoothed(kernel: int):
    def score(seen: Seen):
        return latest(seen, pooled(seen.stats, kernel))

    return score


@functools.cache
def shares(preferences: tuple[float, ...]):
    total = sum(preferences)
    return lambda layer, layers: preferences[layer] / total * layers
