"""Levels that mirror each other as an odd polynomial of the code."""

from __future__ import annotations

import functools
import math

import numpy as np

DEGREE = {1: 0, 2: 1, 4: 2, 8: 3}  # of the polynomial's square, by levels of one sign


@functools.cache
def odd_polynomial(levels: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
    """`down` and coefficients c: level i is about ``v * (c[0] + c[1] v**2 + ...)``, v being ``(i - middle) / 2**down``.

    The best one for codes of normal data; 16 Lloyd-Max levels are off by 0.12 % of its deviation.
    """
    n = len(levels) // 2
    top = np.asarray(levels[n:])
    down = n.bit_length() - 1
    v = (np.arange(n) + 0.5) / 2**down
    edges = [0.0, *(top[1:] + top[:-1]) / 2, math.inf]
    share = np.sqrt(np.diff([math.erf(e / math.sqrt(2)) for e in edges]))
    powers = v[:, None] ** (2 * np.arange(DEGREE[n] + 1) + 1)
    found = np.linalg.lstsq(powers * share[:, None], top * share, rcond=None)[0]
    return down, tuple(map(float, found))
