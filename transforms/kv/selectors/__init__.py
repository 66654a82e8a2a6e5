"""Selectors: one small file each, one line in the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from .adakv import adakv
from .base import Seen as Seen
from .base import Selector as Selector
from .cake import cake
from .chunkkv import chunkkv
from .expected import expected_attention
from .h2o import h2o
from .keydiff import keydiff
from .knorm import knorm
from .lagkv import lagkv
from .pyramidkv import pyramidkv
from .random import random
from .scissorhands import scissorhands
from .snapkv import snapkv
from .streaming import streaming
from .tova import tova

# name: (what makes it, the paper)
SELECTORS: dict[str, tuple[Callable[..., Selector], str]] = {
    "adakv": (adakv, "https://arxiv.org/abs/2407.11550"),
    "cake": (cake, "https://arxiv.org/abs/2503.12491"),
    "chunkkv": (chunkkv, "https://arxiv.org/abs/2502.00299"),
    "expected": (expected_attention, "https://github.com/NVIDIA/kvpress"),
    "h2o": (h2o, "https://arxiv.org/abs/2306.14048"),
    "keydiff": (keydiff, "https://arxiv.org/abs/2504.15364"),
    "knorm": (knorm, "https://arxiv.org/abs/2406.11430"),
    "lagkv": (lagkv, "https://arxiv.org/abs/2504.04704"),
    "pyramidkv": (pyramidkv, "https://arxiv.org/abs/2406.02069"),
    "random": (random, ""),
    "scissorhands": (scissorhands, "https://arxiv.org/abs/2305.17118"),
    "snapkv": (snapkv, "https://arxiv.org/abs/2404.14469"),
    "streaming": (streaming, "https://arxiv.org/abs/2309.17453"),
    "tova": (tova, "https://arxiv.org/abs/2401.06104"),
}


def get(name: str, budget: int | float, **options: Any) -> Selector:
    """The selector called `name`.

    Raises:
      ValueError: no selector has this name.
    """
    if name not in SELECTORS:
        near = difflib.get_close_matches(str(name), SELECTORS, n=3)
        raise ValueError(f"unknown selector {name!r}; near ones: {near}. All: {sorted(SELECTORS)}")
    return SELECTORS[name][0](budget, **options)
