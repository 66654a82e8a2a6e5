"""Greedy packing: buffers one by one, in an order, each into a gap between those that lie already.

Best fit by size is what XLA's heap simulator does (`GlobalDecreasingSizeBestFitHeap`).
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from .buffers import LARGEST, Problem

ORDERS = {
    "size": lambda p: np.lexsort((p.lower, p.lower - p.upper, -p.size)),
    "area": lambda p: np.lexsort((p.lower, (p.lower - p.upper) * p.size.astype(float))),
    "width": lambda p: np.lexsort((p.lower, -p.size, p.lower - p.upper)),
    "start": lambda p: np.lexsort((-p.size, p.lower)),
}
FITS = ("best", "first")


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A greedy packing: offsets and height in units, and the heuristic that found it."""

    offsets: np.ndarray
    height: int
    method: str


def greedy(problem: Problem, capacity: int) -> Greedy:
    """The first heuristic that stays within `capacity` units, otherwise the one that needs least."""
    best = None
    for order, fit in itertools.product(ORDERS, FITS):
        offsets = place(problem, ORDERS[order](problem), fit)
        height = int((offsets + problem.size).max(initial=0))
        if best is None or height < best.height:
            best = Greedy(offsets, height, f"{fit} fit by {order}")
        if height <= capacity:
            break
    assert best is not None
    return best


def place(problem: Problem, order: np.ndarray, fit: str) -> np.ndarray:
    """Offsets in units: buffers in `order`, each into the tightest (`best`) or lowest (`first`) gap."""
    offsets = np.zeros(len(problem), np.int64)
    for count, b in enumerate(order):
        placed = order[:count]
        live = (problem.lower[placed] < problem.upper[b]) & (
            problem.lower[b] < problem.upper[placed]
        )
        near = placed[live]
        offsets[b] = _gap(offsets[near], problem.size[near], int(problem.size[b]), fit)
    return offsets


def _gap(offsets: np.ndarray, sizes: np.ndarray, size: int, fit: str) -> int:
    """Where a gap of at least `size` begins among blocks that may overlap; above them is always one."""
    order = np.argsort(offsets)
    tops = np.maximum.accumulate((offsets + sizes)[order])
    bottoms = np.concatenate([[0], tops])
    rooms = np.concatenate([offsets[order], [LARGEST]]) - bottoms
    fits = rooms >= size
    return bottoms[
        np.argmin(np.where(fits, rooms, LARGEST + 1)) if fit == "best" else fits.argmax()
    ]
