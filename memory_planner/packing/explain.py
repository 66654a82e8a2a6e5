"""Why there is no packing: the buffers that are enough to make it impossible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .buffers import Buffer, Problem
from .portfolio import Outcome

SHOWN = 8  # buffers that a message names


class PackingError(ValueError):
    """It is proven that the buffers can't be packed into the capacity.

    Attributes:
      buffers: a set of them that can't be packed on its own.
      capacity: bytes.
      irreducible: without any one of `buffers` the others can be packed. Not so when time ran out
        before the set was down to that.
    """

    def __init__(self, why: str, buffers: Sequence[Buffer], capacity: int, irreducible: bool):
        super().__init__(why)
        self.buffers = tuple(buffers)
        self.capacity = capacity
        self.irreducible = irreducible


class PackingTimeout(TimeoutError):
    """Time ran out before a packing was found or excluded.

    Attributes:
      lower: bytes; no packing needs less.
      upper: bytes; a packing into these is known.
    """

    def __init__(self, capacity: int, time_limit: float, lower: int, upper: int):
        super().__init__(
            f"whether the buffers fit into `capacity`={capacity} is still open after "
            f"`time_limit`={time_limit:g} s: any packing needs at least {lower}, the best one known "
            f"needs {upper}. Allow more of either."
        )
        self.lower = lower
        self.upper = upper


def explain(
    buffers: Sequence[Buffer],
    problem: Problem,
    capacity: int,
    decide: Callable[[Problem], Outcome],
) -> PackingError:
    """The error for buffers that can't be packed.

    Args:
      buffers: all of them.
      problem: the same buffers as arrays.
      capacity: bytes.
      decide: packs a part of the problem into the same capacity.
    """
    times, live = problem.live()
    peak = int(live.argmax())
    if (need := int(live[peak]) * problem.unit) > capacity:
        time = int(times[peak])
        at_once = np.flatnonzero((problem.lower <= time) & (time < problem.upper))
        return _too_many_at_once(buffers, problem, capacity, at_once, time, need)
    kept, irreducible = _shrink(problem, decide)
    subset = [buffers[i] for i in kept]
    return PackingError(
        f"`buffers` can't be packed into `capacity`={capacity}, though no more than {need} is live "
        f"at once: these {len(subset)} already leave no arrangement: {_names(subset)}",
        subset,
        capacity,
        irreducible,
    )


def _too_many_at_once(
    buffers: Sequence[Buffer],
    problem: Problem,
    capacity: int,
    at_once: np.ndarray,
    time: int,
    need: int,
) -> PackingError:
    """Names the fewest of the buffers live at a time that are too many."""
    largest = at_once[np.argsort(-problem.size[at_once], kind="stable")]
    enough = np.cumsum(problem.size[largest]) * problem.unit > capacity
    subset = [buffers[i] for i in largest[: enough.argmax() + 1]]
    return PackingError(
        f"`buffers` need {need} at time {time}, which is {need - capacity} more than "
        f"`capacity`={capacity}: {len(at_once)} are live then, and the largest {len(subset)} are "
        f"already too many: {_names(subset)}",
        subset,
        capacity,
        irreducible=True,
    )


def _shrink(problem: Problem, decide: Callable[[Problem], Outcome]) -> tuple[np.ndarray, bool]:
    """Deletes neighbours in time, first many at once and last one by one, as long as it's infeasible.

    Returns:
      Indices of what is left, and whether it is known that nothing of it can be deleted.
    """
    kept, open_questions = np.argsort(problem.lower, kind="stable"), 0
    width = len(kept) // 2
    while width >= 1:
        start, open_questions = 0, 0
        while start < len(kept):
            rest = np.delete(kept, slice(start, start + width))
            outcome = decide(problem.take(rest))
            open_questions += not outcome.decided
            if outcome.infeasible:
                kept = rest
            else:
                start += width
        width //= 2
    return np.sort(kept), open_questions == 0


def _names(buffers: Sequence[Buffer]) -> str:
    more = f" and {len(buffers) - SHOWN} more" if len(buffers) > SHOWN else ""
    return ", ".join(str(b) for b in buffers[:SHOWN]) + more + "."
