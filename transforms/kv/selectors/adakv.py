"""Ada-KV (https://arxiv.org/abs/2407.11550): SnapKV's scores, one budget for all heads of a layer.

Heads hold different numbers of tokens in buffers that are no larger (most implementations only mask).
"""

from .base import Selector
from .snapkv import snapkv


def adakv(
    budget: int | float, *, window: int = 32, kernel: int = 5, guarantee: float = 0.2
) -> Selector:
    options = {"pooled": True, "guarantee": guarantee, "name": "adakv"}
    return snapkv(budget, window=window, kernel=kernel, **options)
