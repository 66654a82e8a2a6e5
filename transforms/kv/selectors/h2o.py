"""H2O (https://arxiv.org/abs/2306.14048): the tokens that have received the most attention so far, and the newest,
half of the budget each."""

from .base import Seen, Selector, received


def h2o(budget: int | float, *, recent: int | float = 0.5) -> Selector:
    return Selector("h2o", budget, score, recent=recent, statistic=received)


def score(seen: Seen):
    return seen.score + seen.stats
