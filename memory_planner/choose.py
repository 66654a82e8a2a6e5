"""Which values to keep, to recompute, to offload or to keep encoded: a mixed integer program.

A value that is needed again is kept, or made again by its operation, whose inputs are then needed too. Bytes kept are
bounded, time is least (Checkmate, https://arxiv.org/abs/1910.02653, without its stages: an operation runs again at most
once). Offloading overlaps with the computation around it; only what the link can't hide costs time (POET,
https://arxiv.org/abs/2207.07697). Solved by HiGHS, with its bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from .report import format_bytes

KEEP, OFFLOAD, ENCODE = "keep", "offload", "encode"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A value that may be kept.

    Attributes:
      name: for reports.
      nbytes: in memory, bytes; of a loop's, all trips together.
      producer: the number of the operation that makes it; None where nothing can make it again.
      free: it is there anyway (an argument).
      keep, offload: whether it may be kept so.
      encode: bytes of it encoded over its own; 0 where it may not be encoded.
      seconds: what keeping costs in traffic.
    """

    name: str
    nbytes: int
    producer: int | None
    free: bool = False
    keep: bool = True
    offload: bool = False
    encode: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Recompute:
    """An operation that may run again: its seconds, and the numbers of the values that it reads."""

    seconds: float
    inputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be chosen.

    Attributes:
      values, ops: by number.
      required: values that are needed again.
      groups: of each, one value at least is kept in some form: bounds how far recomputation reaches back.
      to_host, from_host: of the link, bytes/s.
      hidden: seconds of computation that transfers can hide behind, each way.
      staged: the share of an offloaded value that is on the device at a time.
      encode_seconds: for each byte, to encode and decode.
    """

    values: tuple[Candidate, ...]
    ops: tuple[Recompute, ...]
    required: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    to_host: float = 1.0
    from_host: float = 1.0
    hidden: float = 0.0
    staged: float = 0.0
    encode_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """A decision for each value that is kept in some form; the others are made again or not needed.

    Attributes:
      how: by number of the value: "keep", "offload" or "encode".
      again: numbers of the operations that run again.
      nbytes, host_nbytes: on the device and on the host.
      seconds: of recomputation, traffic and transfers that are not hidden.
      bound: no choice takes less.
    """

    how: dict[int, str]
    again: frozenset[int]
    nbytes: int
    host_nbytes: int
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How far `seconds` can be from the least, as a share."""
        return (self.seconds - self.bound) / max(self.seconds, 1e-12)


class InfeasibleError(ValueError):
    """No choice keeps so few bytes.

    Attributes:
      least: bytes that would do.
      pinned: names of the values that must be kept.
    """

    def __init__(self, budget: int, least: int, pinned: Sequence[str]):
        super().__init__(
            f"the budget for what is kept is {format_bytes(budget)}; at least {format_bytes(least)} are needed, for "
            f"{', '.join(pinned[:5]) or 'nothing that could be named'}{' and others' * (len(pinned) > 5)}"
        )
        self.least, self.pinned = least, tuple(pinned)


def choose(
    problem: Problem, budget: int, host: int = 0, *, gap: float = 1e-4, time_limit: float = 60.0
) -> Choice:
    """The fastest choice within a budget.

    Args:
      problem: the values and operations.
      budget: bytes on the device for what is kept.
      host: bytes on the host.
      gap: stop when the choice is proven to be so near to the best, as a share.
      time_limit: seconds; then the best choice that was found, with the bound that was proven.

    Raises:
      InfeasibleError: the budget is too small, by how much, and what pins it.
    """
    program = _Program(problem)
    found = program.solve(budget, host, gap, time_limit)
    if found is None:
        least = program.solve(budget, host, gap, time_limit, smallest=True)
        if least is None:
            raise InfeasibleError(budget, sum(v.nbytes for v in problem.values), [])
        names = [
            problem.values[i].name
            for i in sorted(least.how, key=lambda i: -problem.values[i].nbytes)
        ]
        raise InfeasibleError(budget, least.nbytes, names)
    return found


class _Program:
    """Variables: for each value keep, offload, encode; for each operation again; two for transfers that show."""

    def __init__(self, problem: Problem):
        self.p = problem
        n, m = len(problem.values), len(problem.ops)
        self.n, self.m = n, m
        self.size = 3 * n + m + 2
        self.rows: list[tuple[list[int], list[float]]] = []
        self.low: list[float] = []
        self.needs()

    def kept(self, v: int) -> list[int]:
        """The variables of which one is set where the value is kept."""
        return [v, self.n + v, 2 * self.n + v]

    def at_least(self, columns: Sequence[int], factors: Sequence[float], low: float) -> None:
        self.rows.append((list(columns), list(factors)))
        self.low.append(low)

    def needs(self) -> None:
        again = 3 * self.n
        for v in self.p.required:
            self.available(v, [], 1)
        for o, op in enumerate(self.p.ops):
            for v in dict.fromkeys(op.inputs):
                self.available(v, [again + o], 0)
        for group in self.p.groups:
            columns = [c for v in group for c in self.kept(v)]
            self.at_least(columns, [1] * len(columns), 1)

    def available(self, v: int, user: list[int], low: int) -> None:
        value = self.p.values[v]
        if value.free:
            return
        columns = self.kept(v) + ([] if value.producer is None else [3 * self.n + value.producer])
        self.at_least([*columns, *user], [1] * len(columns) + [-1] * len(user), low)

    def bytes_of(self) -> np.ndarray:
        sizes = np.array([v.nbytes for v in self.p.values], float)
        encoded = [v.encode * v.nbytes for v in self.p.values]
        return np.concatenate([sizes, self.p.staged * sizes, encoded, np.zeros(self.m + 2)])

    def host_bytes(self) -> np.ndarray:
        out = np.zeros(self.size)
        out[self.n : 2 * self.n] = [v.nbytes for v in self.p.values]
        return out

    def seconds_of(self) -> np.ndarray:
        p, out = self.p, np.zeros(self.size)
        sizes = np.array([v.nbytes for v in p.values], float)
        out[: self.n] = [v.seconds for v in p.values]
        out[2 * self.n : 3 * self.n] = [
            v.encode * v.seconds for v in p.values
        ] + p.encode_seconds * sizes
        out[3 * self.n : -2] = [op.seconds for op in p.ops]
        return out

    def solve(
        self, budget: int, host: int, gap: float, limit: float, smallest: bool = False
    ) -> Choice | None:
        """The fastest choice, or the smallest one; None where there is none."""
        sizes, at_host, seconds = self.bytes_of(), self.host_bytes(), self.seconds_of()
        scale = max(1.0, float(sizes.max(initial=1)))  # coefficients near 1
        unit = max(float(seconds[:-2].max(initial=0)), 1e-12)
        costs = sizes / scale if smallest else np.append(seconds[:-2] / unit, [1, 1])
        room, slow, hidden = (
            np.inf if smallest else budget / scale,
            scale / unit,
            self.p.hidden / unit,
        )
        limits: Any = self.limits(sizes / scale, room, at_host / scale, host / scale, slow, hidden)
        upper: Any = self.upper()
        result = milp(
            costs,
            integrality=np.append(np.ones(self.size - 2), [0, 0]),
            bounds=Bounds(0, upper),
            constraints=limits,
            options={"mip_rel_gap": gap, "time_limit": limit},
        )
        if result.x is None:
            return None
        bits = np.append(np.round(result.x[:-2]), [0, 0]) > 0
        bound = (
            result.fun if result.mip_dual_bound is None else min(result.fun, result.mip_dual_bound)
        )
        return Choice(
            self.how(bits),
            frozenset(map(int, np.flatnonzero(bits[3 * self.n : -2]))),
            int(sizes[bits].sum()),
            int(at_host[bits].sum()),
            float(result.fun * unit),
            float(bound * unit),
        )

    def upper(self) -> np.ndarray:
        """1 for what is allowed, 0 for what isn't; transfers that show have no bound."""
        allowed = [[v.keep, v.offload, v.encode > 0] for v in self.p.values]
        flags = np.array(allowed, float).reshape(self.n, 3).T.reshape(-1)
        return np.concatenate([flags, np.ones(self.m), [np.inf, np.inf]])

    def limits(
        self,
        sizes: np.ndarray,
        room: float,
        at_host: np.ndarray,
        host: float,
        slow: float,
        hidden: float,
    ) -> list[LinearConstraint]:
        """All constraints; bytes over bytes/s times `slow` are seconds, as both are scaled."""
        rows = [(r, c, f) for r, (cs, fs) in enumerate(self.rows) for c, f in zip(cs, fs)]
        found: list[Any] = []
        if rows:
            r, c, f = zip(*rows)
            matrix = coo_array((f, (r, c)), shape=(len(self.rows), self.size)).tocsr()
            found.append(LinearConstraint(matrix, np.array(self.low), np.inf))  # pyright: ignore
        found.append(LinearConstraint(sizes, -np.inf, room))
        found.append(LinearConstraint(at_host, -np.inf, host))
        for i, speed in enumerate((self.p.to_host, self.p.from_host)):
            row = -at_host * slow / speed
            row[self.size - 2 + i] = 1
            found.append(LinearConstraint(row, -hidden, np.inf))
        return found

    def how(self, bits: np.ndarray) -> dict[int, str]:
        kinds = enumerate((KEEP, OFFLOAD, ENCODE))
        own = [
            (v, word)
            for k, word in kinds
            for v in np.flatnonzero(bits[k * self.n : (k + 1) * self.n])
        ]
        return {int(v): word for v, word in own if not self.p.values[v].free}
