"""PyramidKV (https://arxiv.org/abs/2406.02069): SnapKV with budgets that fall linearly over the layers."""

import functools

from .base import Selector
from .snapkv import snapkv


def pyramidkv(
    budget: int | float, *, beta: float = 20, window: int = 32, kernel: int = 5
) -> Selector:
    return snapkv(budget, window=window, kernel=kernel, layers=falling(beta), name="pyramidkv")


@functools.cache
def falling(beta: float):
    """Shares from 2 - 1/beta in the first layer down to 1/beta in the last."""

    def share(layer: int, layers: int) -> float:
        if layers == 1:
            return 1.0
        return (2 - 1 / beta) - layer * (2 - 2 / beta) / (layers - 1)

    return share
