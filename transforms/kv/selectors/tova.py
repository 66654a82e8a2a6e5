"""TOVA (https://arxiv.org/abs/2401.06104): what the last query attends to, averaged over the heads of a layer."""

from .base import Seen, Selector, from_window


def tova(budget: int | float) -> Selector:
    return Selector("tova", budget, score, statistic=from_window(1), together=True)


def score(seen: Seen):
    return seen.stats
