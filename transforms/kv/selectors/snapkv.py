"""SnapKV (https://arxiv.org/abs/2404.14469): what the last queries of a prompt attend to, smoothed over neighbours.

In decoding the prompt's tokens are dropped by the same scores as the budget fills up; the paper lets the cache grow.
"""

import functools

from .base import Seen, Selector, from_window, latest, pooled


def snapkv(budget: int | float, *, window: int = 32, kernel: int = 5, **more) -> Selector:
    options = {"recent": window, "statistic": from_window(window), **more}
    return Selector(options.pop("name", "snapkv"), budget, smoothed(kernel), **options)


@functools.cache
def smoothed(kernel: int):
    def score(seen: Seen):
        return latest(seen, pooled(seen.stats, kernel))

    return score
