"""Greedy heuristics first, then branch and bound under several orders, in turn and in parallel."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from .buffers import Problem
from .heuristics import greedy

# Each order gets this many nodes for each buffer, then twice as many, and so on.
FIRST_NODES = 2

# Rank of the buffers, and whether the highest live total goes before it: MiniMalloc's WAT, TAW and TWA.
ORDERS: dict[str, tuple[Callable[[Problem], np.ndarray], bool]] = {
    "width": (lambda p: np.lexsort((-_area(p), p.lower - p.upper)), False),
    "total, area": (lambda p: np.lexsort((p.lower - p.upper, -_area(p))), True),
    "total, width": (lambda p: np.lexsort((-_area(p), p.lower - p.upper)), True),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of packing a problem into a capacity.

    Attributes:
      offsets: in units, or None.
      infeasible: proven that there is no packing.
      nodes: of branch and bound, over all orders; 0 when a heuristic was enough.
      method: what decided.
      upper: units that the best greedy packing takes, where one was made.
    """

    offsets: np.ndarray | None
    infeasible: bool = False
    nodes: int = 0
    method: str = "time limit"
    upper: int | None = None

    @property
    def decided(self) -> bool:
        return self.infeasible or self.offsets is not None


def decide(problem: Problem, capacity: int, *, deadline: float, workers: int = 2) -> Outcome:
    """Packs a problem into `capacity` units, or proves that it can't be, or runs out of time.

    The answer is the same whatever the number of workers and their speed, unless time runs out.

    Args:
      deadline: on the clock of `time.monotonic`.
      workers: threads that search.
    """
    if problem.max_live() > capacity:
        return Outcome(None, infeasible=True, method="max live")
    found = greedy(problem, capacity)
    if found.height <= capacity:
        return Outcome(found.offsets, method=found.method, upper=found.height)
    searched = branch_and_bound(problem, capacity, deadline=deadline, workers=workers)
    return dataclasses.replace(searched, upper=found.height)


def branch_and_bound(problem: Problem, capacity: int, *, deadline: float, workers: int) -> Outcome:
    """As `decide`, by search alone."""
    stop, nodes = np.zeros(1, np.int64), 0
    turns = _turns(problem, capacity, stop)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = collections.deque(pool.submit(turn) for turn in itertools.islice(turns, workers))
        try:
            while True:
                outcome = running.popleft().result(max(0, deadline - time.monotonic()))
                nodes += outcome.nodes
                if outcome.decided:
                    return dataclasses.replace(outcome, nodes=nodes)
                running.append(pool.submit(next(turns)))
        except TimeoutError:
            return Outcome(None, nodes=nodes)
        finally:
            stop[0] = 1


def _turns(problem: Problem, capacity: int, stop: np.ndarray) -> Iterator[Callable[[], Outcome]]:
    """Round after round, one search for each order."""
    # Importing numba takes as long as many a packing.
    from .search import INFEASIBLE, SOLVED, search
    from .tables import Tables

    tables = Tables.of(problem)

    def turn(name: str, node_limit: int) -> Outcome:
        order, by_peak = ORDERS[name]
        rank = np.empty(len(problem), np.int64)
        rank[order(problem)] = np.arange(len(problem))
        state = tables.state(rank, capacity)
        status, nodes = search(state, by_peak, node_limit, stop)
        offsets = tables.offsets(state) if status == SOLVED else None
        return Outcome(offsets, status == INFEASIBLE, nodes, f"search by {name}")

    limits = (FIRST_NODES * len(problem) << doubling for doubling in itertools.count())
    return (functools.partial(turn, name, limit) for limit in limits for name in ORDERS)


def _area(problem: Problem) -> np.ndarray:
    return (problem.upper - problem.lower) * problem.size.astype(float)
