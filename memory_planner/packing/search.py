"""Branch and bound over canonical packings, in the spirit of MiniMalloc.

Any packing can be pushed down until each buffer lies at 0 or on another one. Read by rising offset,
such a packing places every buffer at its *low*: the highest top among those below that live with it.
So the search places buffers by rising offset, each at its low, and loses nothing. What prunes:

1. *Canonical order*: offsets never fall, and buffers of equal low come in one fixed order.
2. *Section inference*: what is left in a section lies at its lowest low or above, and at the offset
   that the search has reached or above; from there it needs the sum of its sizes.
3. *Dominance*: nothing goes where another buffer would fit below it.
4. *Hatless*: a buffer that nothing left can lie on disturbs nobody, so one try is enough.
5. *Decomposition*: where no buffer left crosses a cut in time, both sides are searched on their own,
   and a failure on either goes straight back to the placement that parted them.

References:
  Moffitt. MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning.
  ASPLOS 2023. https://doi.org/10.1145/3623278.3624752

Differs from it in: 1. The lowest low of a section is found anew where it may have changed, not stored.
2. What bounds all buffers of a node alike (dominance, the offset reached) is one ceiling for their
offsets, computed once. 3. A failure goes back past all parts that it doesn't depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from .buffers import LARGEST
from .tables import State

SOLVED, INFEASIBLE, UNDECIDED = 1, 0, -1
DONE = LARGEST  # the ceiling of a part in which nothing is left

# Typed, for numba compiles a helper once more for each literal that it might be called with.
ZERO: Any = np.int64(0)
NONE: Any = np.int64(-1)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles on the first call and keeps the machine code for later runs, where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@jit
def search(s: State, by_peak: bool, node_limit: int, stop: np.ndarray) -> tuple[int, int]:
    """Searches until solved, exhausted, `node_limit` nodes are visited, or `stop[0]` isn't 0.

    Args:
      s: a new state; its buffers' `offset` is the packing once solved.
      by_peak: buffers of equal low come by the highest total of their sections, then by rank;
        otherwise by rank.
      node_limit: a node is a set of placements that can't be refuted at once.
      stop: `i64[1]`, for other threads to write.

    Returns:
      `SOLVED`, `INFEASIBLE` or `UNDECIDED`, and the number of nodes.
    """
    for b in range(len(s.buffer)):
        _count(s, b)
    depth, trail, nodes, parent, parted = ZERO, ZERO, ZERO, NONE, True
    parts = _part(s, ZERO, ZERO, s.part[0].hi, NONE, ZERO + 1)
    part = parts - 1
    while part >= 0:
        if nodes >= node_limit or stop[0] != 0:
            return UNDECIDED, nodes
        nodes += 1
        if parted:
            _note_peaks(s, part, by_peak)
        ceiling = _ceiling(s, part)
        if ceiling == DONE:
            part, parted = s.part[part].next, True
            parent = s.part[part].owner
            continue
        after = NONE if parted else s.frame[parent].buffer
        frame = s.frame[depth]
        frame.buffer, frame.ceiling, frame.parent = NONE, ceiling, parent
        frame.part, frame.parts, frame.trail = part, parts, trail
        parent, trail = _advance(s, depth, after, trail)
        if parent < 0:
            return INFEASIBLE, nodes
        depth, frame = parent + 1, s.frame[parent]
        placed = s.buffer[frame.buffer]
        parts = _part(s, frame.part, placed.first, placed.last, parent, frame.parts)
        parted = parts > frame.parts
        part = parts - 1 if parted else frame.part
    return SOLVED, nodes


@jit
def _advance(s: State, depth: int, after: int, trail: int) -> tuple[int, int]:
    """Places the next buffer that fits, in the top frame or as far back as needed.

    Returns:
      The frame, or -1 when there is none, and the length of the trail.
    """
    f = depth
    while True:
        b = _next(s, f, after)
        if b >= 0:
            s.frame[f].buffer = b
            left, right, trail = _place(s, b, trail)
            if left == right:
                s.frame[f].ceiling = 0  # hatless
            if _fits(s, s.frame[f].part, left, right):
                return f, trail
        else:
            f = s.frame[f].parent
            if f < 0:
                return f, trail
        after = s.frame[f].buffer
        trail = _undo(s, depth, f, trail)
        depth = f


@jit
def _next(s: State, f: int, after: int) -> int:
    """The first buffer behind `after` that is below the ceiling, or -1."""
    part, best = s.part[s.frame[f].part], NONE
    for b in range(s.section[part.lo].begin, s.section[part.hi].begin):
        if s.buffer[b].offset < 0 and s.buffer[b].low < s.frame[f].ceiling:
            behind = after < 0 or _before(s, part.level, after, b)
            if behind and (best < 0 or _before(s, part.level, b, best)):
                best = b
    return best


@jit
def _before(s: State, level: int, a: int, b: int) -> bool:
    if s.buffer[a].low != s.buffer[b].low:
        return s.buffer[a].low < s.buffer[b].low
    if s.peak[level, a] != s.peak[level, b]:
        return s.peak[level, a] > s.peak[level, b]
    return s.buffer[a].rank < s.buffer[b].rank


@jit
def _place(s: State, b: int, trail: int) -> tuple[int, int, int]:
    """Places a buffer at its low and lifts the lows of its neighbours.

    Returns:
      The sections left..right-1 whose lowest low may have changed, none when `b` is hatless, and the
      length of the trail.
    """
    placed = s.buffer[b]
    placed.offset = placed.low
    _count(s, b)
    top, left, right = placed.low + placed.size, placed.last, placed.last
    for k in range(placed.near_begin, placed.near_end):
        c = s.near[k]
        if s.buffer[c].offset < 0:
            left = min(left, placed.first)
            if s.buffer[c].low < top:
                s.trail[trail].buffer, s.trail[trail].low = c, s.buffer[c].low
                trail += 1
                s.buffer[c].low = top
                left, right = min(left, s.buffer[c].first), max(right, s.buffer[c].last)
    return left, right, trail


@jit
def _undo(s: State, depth: int, f: int, trail: int) -> int:
    """Takes out the buffers of the frames from `depth` down to `f`; returns the trail's length."""
    for frame in range(depth, f - 1, -1):
        b = s.frame[frame].buffer
        if b >= 0 and s.buffer[b].offset >= 0:
            s.buffer[b].offset = -1
            _count(s, b)
    while trail > s.frame[f].trail:
        trail -= 1
        s.buffer[s.trail[trail].buffer].low = s.trail[trail].low
    return trail


@jit
def _count(s: State, b: int) -> None:
    """Counts a buffer among those not placed yet, or no more, as its offset says."""
    row = s.buffer[b]
    sign = 1 if row.offset < 0 else -1
    for section in range(row.first, row.last):
        s.section[section].total += sign * row.size
    for section in range(row.first + 1, row.last):
        s.section[section].cuts += sign


@jit
def _fits(s: State, part: int, left: int, right: int) -> bool:
    """Section inference where lows have changed."""
    for section in range(left, right):
        s.section[section].lowest = DONE
    for b in range(s.section[s.part[part].lo].begin, s.section[right].begin):
        if s.buffer[b].offset < 0:
            low = s.buffer[b].low
            for section in range(max(left, s.buffer[b].first), min(right, s.buffer[b].last)):
                s.section[section].lowest = min(s.section[section].lowest, low)
    for section in range(left, right):
        row = s.section[section]
        if row.total > 0 and row.lowest + row.total > s.capacity:
            return False
    return True


@jit
def _ceiling(s: State, part: int) -> int:
    """What the next offset must stay below, or `DONE`: dominance, and section inference by offset."""
    lo, hi, ceiling = s.part[part].lo, s.part[part].hi, DONE
    for b in range(s.section[lo].begin, s.section[hi].begin):
        if s.buffer[b].offset < 0:
            ceiling = min(ceiling, s.buffer[b].low + s.buffer[b].size)
    if ceiling < DONE:
        for section in range(lo, hi):
            ceiling = min(ceiling, s.capacity - s.section[section].total + 1)
    return ceiling


@jit
def _note_peaks(s: State, part: int, by_peak: bool) -> None:
    lo, hi, level = s.part[part].lo, s.part[part].hi, s.part[part].level
    for b in range(s.section[lo].begin, s.section[hi].begin):
        s.peak[level, b] = 0
        if by_peak:
            for section in range(s.buffer[b].first, s.buffer[b].last):
                s.peak[level, b] = max(s.peak[level, b], s.section[section].total)


@jit
def _part(s: State, part: int, first: int, last: int, owner: int, parts: int) -> int:
    """Parts `part` at the cuts within first..last-1 that nothing crosses; the leftmost comes on top.

    Returns:
      The number of parts, `parts` when there is no such cut.
    """
    before, hi, after = parts, s.part[part].hi, s.part[part].next
    for cut in range(last - 1, first - 1, -1):
        rest = cut == first
        if parts > before if rest else s.section[cut].cuts == 0:
            new = s.part[parts]
            new.lo, new.hi, new.next = s.part[part].lo if rest else cut, hi, after
            new.owner, new.level = owner, s.part[part].level + 1
            hi, after = cut, parts
            parts += 1
    return parts
