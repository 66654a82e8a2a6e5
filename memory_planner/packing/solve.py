"""The two questions: do the buffers fit into a capacity, and which capacity do they need?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from .buffers import Buffer, Problem, problem_of
from .explain import PackingTimeout, explain
from .heuristics import greedy
from .portfolio import Outcome, branch_and_bound, decide
from .validate import validate


@dataclasses.dataclass(frozen=True)
class Packing:
    """A packing and how it was found.

    Attributes:
      offsets: of each buffer in bytes, in their order.
      method: the heuristic, or the order of the search, that found it.
      nodes: that the search visited, under all orders; 0 when a heuristic found it.
    """

    offsets: tuple[int, ...]
    method: str
    nodes: int


@dataclasses.dataclass(frozen=True)
class CapacityBounds:
    """How much memory buffers need.

    Attributes:
      lower: bytes; it is proven that no packing needs less.
      upper: bytes that are enough.
      offsets: of each buffer in bytes, in their order: a packing into `upper`.
    """

    lower: int
    upper: int
    offsets: tuple[int, ...]

    @property
    def gap(self) -> int:
        """Bytes between what is enough and what is proven; 0 when `upper` is the least."""
        return self.upper - self.lower


def pack(
    buffers: Sequence[Buffer],
    capacity: int,
    *,
    alignment: int = 1,
    time_limit: float = 60.0,
    workers: int = 2,
) -> tuple[int, ...]:
    """Places buffers in memory so that no two that are live at the same time overlap.

    Greedy heuristics come first; where they fail, branch and bound finds a packing or proves that
    there is none. Unless time runs out, the answer is the same on every run.

    Args:
      buffers: in any order, with ids that differ.
      capacity: bytes that there are.
      alignment: bytes; each buffer takes a multiple of it, and so every offset is one.
      time_limit: seconds. The first search on a machine spends some of them on compiling.
      workers: threads that search.

    Returns:
      The offset of each buffer in bytes, in the order of `buffers`.

    Raises:
      PackingError: it is proven that there is no packing. It names buffers that are enough for that.
      PackingTimeout: time ran out with neither. It says how much is needed and how much is enough.
      ValueError: an argument out of its range.
    """
    return find_packing(
        buffers, capacity, alignment=alignment, time_limit=time_limit, workers=workers
    ).offsets


def find_packing(
    buffers: Sequence[Buffer],
    capacity: int,
    *,
    alignment: int = 1,
    time_limit: float = 60.0,
    workers: int = 2,
) -> Packing:
    """As `pack`, and tells how the packing was found."""
    problem, deadline = _start(buffers, alignment, time_limit, workers)
    if capacity < 0:
        raise ValueError(f"`capacity` is {capacity}, expected at least 0.")
    outcome = decide(problem, capacity // problem.unit, deadline=deadline, workers=workers)
    if outcome.infeasible:
        probe = _probe(capacity // problem.unit, deadline, workers)
        raise explain(buffers, problem, capacity, probe)
    if outcome.offsets is None:
        assert outcome.upper is not None
        lower, upper = problem.max_live() * problem.unit, outcome.upper * problem.unit
        raise PackingTimeout(capacity, time_limit, lower, upper)
    offsets = _in_bytes(buffers, problem, outcome.offsets, capacity, alignment)
    return Packing(offsets, outcome.method, outcome.nodes)


def min_capacity(
    buffers: Sequence[Buffer], *, alignment: int = 1, time_limit: float = 60.0, workers: int = 2
) -> CapacityBounds:
    """The least capacity that the buffers can be packed into, or bounds for it when time runs out.

    What is live at once is tried first, then the middle of what is still open.

    Args:
      buffers, alignment, workers: as in `pack`.
      time_limit: seconds; each capacity that is tried gets a quarter of what is left of them.

    Raises:
      ValueError: an argument out of its range.
    """
    problem, deadline = _start(buffers, alignment, time_limit, workers)
    proven = untried = target = problem.max_live()
    found = greedy(problem, target)
    offsets, height = found.offsets, found.height
    while untried < height and (left := deadline - time.monotonic()) > 0:
        until = deadline - 0.75 * left
        outcome = branch_and_bound(problem, target, deadline=until, workers=workers)
        if outcome.offsets is not None:
            offsets, height = outcome.offsets, int((outcome.offsets + problem.size).max())
        else:
            untried = target + 1
            proven = untried if outcome.infeasible else proven
        target = (untried + height) // 2
    lower, upper = proven * problem.unit, height * problem.unit
    return CapacityBounds(lower, upper, _in_bytes(buffers, problem, offsets, upper, alignment))


def _start(
    buffers: Sequence[Buffer], alignment: int, time_limit: float, workers: int
) -> tuple[Problem, float]:
    """The problem, and when the time is over."""
    deadline = time.monotonic() + time_limit
    if workers < 1:
        raise ValueError(f"`workers` is {workers}, expected at least 1.")
    return problem_of(buffers, alignment), deadline


def _probe(capacity: int, deadline: float, workers: int) -> Callable[[Problem], Outcome]:
    """For many questions within what is left of the time: each gets an eighth of it."""

    def decide_part(part: Problem) -> Outcome:
        left = deadline - time.monotonic()
        if left <= 0:
            return Outcome(None)
        return decide(part, capacity, deadline=deadline - 0.875 * left, workers=workers)

    return decide_part


def _in_bytes(
    buffers: Sequence[Buffer],
    problem: Problem,
    offsets: np.ndarray,
    capacity: int,
    alignment: int,
) -> tuple[int, ...]:
    """The offsets in bytes, found valid."""
    found = tuple(int(offset) * problem.unit for offset in offsets)
    validate(buffers, found, capacity, alignment=alignment)
    return found
