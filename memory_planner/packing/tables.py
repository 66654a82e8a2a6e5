"""What the search reads and changes: tables with a row for each buffer, section, frame and part."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .buffers import Problem

Table = Any  # a structured array; numba reads the fields of its rows as attributes


def _row(*fields: str) -> np.dtype:
    return np.dtype([(field, np.int64) for field in fields])


BUFFER = _row("size", "first", "last", "near_begin", "near_end", "rank", "offset", "low")
SECTION = _row("begin", "total", "lowest", "cuts")
FRAME = _row("buffer", "ceiling", "trail", "parts", "part", "parent")
PART = _row("lo", "hi", "next", "owner", "level")
CHANGE = _row("buffer", "low")


class State(NamedTuple):
    """A search, all in int64; offsets and sizes are in units.

    A *section* is a maximal set of buffers that live together; buffers are numbered by the first
    section that they live in. A *part* is a stretch of sections that is searched on its own, a *frame* a
    placement. A *cut* lies before each section but the first.

    Attributes:
      buffer: `size`; it lives in sections `first`..`last`-1, with the buffers
        near[near_begin:near_end]; `rank` in the fixed order; `offset` or -1; `low`, the lowest offset
        that is left to it.
      section: the buffers `begin`..`begin` of the next section start in it; `total` size that isn't
        placed yet; `lowest` is scratch; `cuts`, buffers not placed yet that cross the cut before it.
        One row more than there are sections.
      frame: its `buffer`, the `ceiling` for its offset, the lengths of `trail` and `parts` before it,
        its `part`, the frame to go back to (`parent`) when nothing fits.
      part: its sections `lo`..`hi`-1, the part to search `next`, the frame that made it (`owner`), the
        `level` of parting.
      trail: a `buffer` and the `low` that it had before.
      near: buffers.
      peak: `[level, buffer]`, the highest total of its sections when the part began.
      capacity: units.
    """

    buffer: Table
    section: Table
    frame: Table
    part: Table
    trail: Table
    near: np.ndarray
    peak: np.ndarray
    capacity: int


@dataclasses.dataclass(frozen=True)
class Tables:
    """The part of a `State` that all searches for one problem share.

    Attributes:
      index: for each row of `buffer`, its index in the problem.
    """

    index: np.ndarray
    buffer: np.ndarray
    section: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> Tables:
        ends = np.unique(problem.upper)
        # A section ends where a buffer does and another has started since the end before.
        closings = np.unique(ends[np.searchsorted(ends, problem.lower, side="right")])
        index = np.argsort(problem.lower, kind="stable")
        first = np.searchsorted(closings, problem.lower[index], side="right")
        last = np.searchsorted(closings, problem.upper[index], side="right")
        near = [_others((first < last[b]) & (first[b] < last), b) for b in range(len(index))]
        buffer = np.zeros(len(index), BUFFER)
        buffer["size"], buffer["first"], buffer["last"] = problem.size[index], first, last
        buffer["near_end"] = np.cumsum([len(others) for others in near])
        buffer["near_begin"][1:] = buffer["near_end"][:-1]
        section = np.zeros(len(closings) + 1, SECTION)
        section["begin"] = np.searchsorted(first, np.arange(len(section)))
        return cls(index, buffer, section, np.concatenate(near))

    def state(self, rank: np.ndarray, capacity: int) -> State:
        """A new state, with room for the deepest search.

        On a path, a low changes at most once for each pair of neighbours, and a cut parts at most once,
        into two. Pages of `peak` that aren't reached cost nothing.

        Args:
          rank: of each buffer of the problem.
          capacity: units.
        """
        n, sections = len(self.buffer), len(self.section) - 1
        buffer = self.buffer.copy()
        buffer["rank"], buffer["offset"] = rank[self.index], -1
        part = np.zeros(2 * sections, PART)
        part[0] = (0, sections, -1, -1, 0)
        return State(
            buffer,
            self.section.copy(),
            np.zeros(n, FRAME),
            part,
            np.zeros(len(self.near) // 2, CHANGE),
            self.near,
            np.empty((sections, n), np.int64),
            capacity,
        )

    def offsets(self, state: State) -> np.ndarray:
        """The offsets of a solved state, in units, in the problem's order."""
        offsets = np.empty(len(self.index), np.int64)
        offsets[self.index] = state.buffer["offset"]
        return offsets


def _others(mask: np.ndarray, b: int) -> np.ndarray:
    mask[b] = False
    return np.flatnonzero(mask)
