"""ChunkKV (https://arxiv.org/abs/2502.00299): SnapKV's scores, kept or dropped by chunks of consecutive tokens."""

from .base import Selector
from .snapkv import snapkv


def chunkkv(budget: int | float, *, chunk: int = 10, window: int = 32) -> Selector:
    return snapkv(budget, window=window, kernel=1, chunk=chunk, name="chunkkv")
