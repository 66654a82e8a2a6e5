"""What to keep, to recompute, to offload or to encode, and where arguments live: a mixed integer program.

A value that is needed again is kept, or made again by its operation, whose inputs are then needed too. Bytes kept are
bounded, time is least (Checkmate, https://arxiv.org/abs/1910.02653, without its stages: an operation runs again at most
once). Offloading overlaps with the computation around it; only what the link can't hide costs time (POET,
https://arxiv.org/abs/2207.07697). Of an argument (weights, a cache, an optimizer's state) one option is taken: a format
and a tier. Solved by HiGHS, with its bound.
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
class Option:
    """A way to have an argument.

    Attributes:
      name: for reports.
      nbytes: on the device.
      host: bytes on the host.
      down, up: bytes that each run moves to and from the host.
      seconds: what it costs beside these.
      loss: what is lost of its content, in any unit that all options share.
    """

    name: str
    nbytes: int
    host: int = 0
    down: int = 0
    up: int = 0
    seconds: float = 0.0
    loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Site:
    """An argument, or a part of one, of whose options one is taken."""

    name: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be chosen.

    Attributes:
      values, ops: by number.
      sites: arguments that can be had in several ways.
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
    sites: tuple[Site, ...] = ()


def gap_of(seconds: float, bound: float) -> float:
    """How far `seconds` can be from the least, as a share."""
    return (seconds - bound) / max(seconds, 1e-12)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A decision for each value that is kept in some form; the others are made again or not needed.

    Attributes:
      how: by number of the value: "keep", "offload" or "encode".
      again: numbers of the operations that run again.
      nbytes, host_nbytes: on the device and on the host.
      seconds: of recomputation, traffic and transfers that are not hidden.
      bound: no choice takes less (none with so little loss, where that is what is least).
      options: for each site the number of its option.
    """

    how: dict[int, str]
    again: frozenset[int]
    nbytes: int
    host_nbytes: int
    seconds: float
    bound: float
    options: tuple[int, ...] = ()

    @property
    def gap(self) -> float:
        """How far `seconds` can be from the least, as a share."""
        return gap_of(self.seconds, self.bound)


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
    problem: Problem,
    budget: int,
    host: int = 0,
    *,
    least: str = "seconds",
    gap: float = 1e-4,
    time_limit: float = 60.0,
) -> Choice:
    """The fastest choice within a budget.

    Args:
      problem: the values, operations and sites.
      budget: bytes on the device for what is kept, and for the sites.
      host: bytes on the host.
      least: "seconds"; or "loss": of the choices that lose least, the fastest.
      gap: stop when the choice is proven to be so near to the best, as a share.
      time_limit: seconds; then the best choice that was found, with the bound that was proven.

    Raises:
      InfeasibleError: the budget is too small, by how much, and what pins it.
    """
    program = _Program(problem, budget, host, gap, time_limit)
    if least == "loss" and (lossless := program.solve(program.losses)) is not None:
        program.keep_losses(lossless)
    found = program.solve(program.seconds)
    if found is None:
        smallest = _Program(problem, None, host, gap, time_limit)
        least_found = smallest.solve(smallest.sizes)
        if least_found is None:
            raise InfeasibleError(budget, sum(v.nbytes for v in problem.values), [])
        kept = sorted(least_found.how, key=lambda i: -problem.values[i].nbytes)
        names = [problem.values[i].name for i in kept]
        raise InfeasibleError(budget, least_found.nbytes, names)
    return found


class _Program:
    """Variables: of each value keep, offload, encode; of each operation again; the options; two transfers that show.

    Attributes:
      sizes, at_host, losses, seconds: what each variable costs, as it is; the last two seconds are those that show.
    """

    def __init__(self, problem: Problem, budget: int | None, host: int, gap: float, limit: float):
        self.p, self.budget, self.host = problem, budget, host
        self.settings = {"mip_rel_gap": gap, "time_limit": limit}
        self.options = [option for site in problem.sites for option in site.options]
        n, m, k = len(problem.values), len(problem.ops), len(self.options)
        self.n, self.ops, self.size = n, 3 * n, 3 * n + m + k + 2
        self.first = self.ops + m  # of the options
        self.rows: list[tuple[list[int], list[float]]] = []
        self.low: list[float] = []
        self.needs()
        value_sizes = np.array([v.nbytes for v in problem.values], float)
        encoded = [v.encode * v.nbytes for v in problem.values]
        self.sizes = self.costs(
            [value_sizes, problem.staged * value_sizes, encoded], [o.nbytes for o in self.options]
        )
        self.at_host = self.costs([0, value_sizes, 0], [o.host for o in self.options])
        self.losses = self.costs([0, 0, 0], [o.loss for o in self.options])
        self.seconds = self.seconds_of(value_sizes)
        self.scale = max(1.0, float(self.sizes.max(initial=1)))  # coefficients near 1
        self.unit = max(float(self.seconds[:-2].max(initial=0)), 1e-12)
        self.limits: list[Any] = self.constraints(value_sizes)

    def costs(self, values: Any, options: Any, ops: Any = 0, shown: float = 0) -> np.ndarray:
        """A coefficient for each variable."""
        out = np.zeros(self.size)
        for i, part in enumerate(values):
            out[i * self.n : (i + 1) * self.n] = part
        out[self.ops : self.first] = ops
        out[self.first : -2] = options
        out[-2:] = shown
        return out

    def seconds_of(self, sizes: np.ndarray) -> np.ndarray:
        p = self.p
        keep = np.array([v.seconds for v in p.values])
        encode = np.array([v.encode for v in p.values]) * keep + p.encode_seconds * sizes
        options = [o.seconds for o in self.options]
        return self.costs([keep, 0, encode], options, [op.seconds for op in p.ops], 1)

    def kept(self, v: int) -> list[int]:
        """The variables of which one is set where the value is kept."""
        return [v, self.n + v, 2 * self.n + v]

    def at_least(self, columns: Sequence[int], factors: Sequence[float], low: float) -> None:
        self.rows.append((list(columns), list(factors)))
        self.low.append(low)

    def needs(self) -> None:
        for v in self.p.required:
            self.available(v, [], 1)
        for o, op in enumerate(self.p.ops):
            for v in dict.fromkeys(op.inputs):
                self.available(v, [self.ops + o], 0)
        for group in self.p.groups:
            columns = [c for v in group for c in self.kept(v)]
            self.at_least(columns, [1] * len(columns), 1)
        first = self.first
        for site in self.p.sites:
            columns = range(first, first := first + len(site.options))
            self.at_least(columns, [1] * len(columns), 1)
            self.at_least(columns, [-1] * len(columns), -1)

    def available(self, v: int, user: list[int], low: int) -> None:
        value = self.p.values[v]
        if value.free:
            return
        columns = self.kept(v) + ([] if value.producer is None else [self.ops + value.producer])
        self.at_least([*columns, *user], [1] * len(columns) + [-1] * len(user), low)

    def constraints(self, sizes: np.ndarray) -> list[Any]:
        """All of them; bytes over bytes/s times `slow` are seconds, as both are scaled."""
        rows = [(r, c, f) for r, (cs, fs) in enumerate(self.rows) for c, f in zip(cs, fs)]
        found: list[Any] = []
        if rows:
            r, c, f = zip(*rows)
            matrix = coo_array((f, (r, c)), shape=(len(self.rows), self.size)).tocsr()
            found.append(LinearConstraint(matrix, np.array(self.low), np.inf))  # pyright: ignore
        room = np.inf if self.budget is None else self.budget / self.scale
        found.append(LinearConstraint(self.sizes / self.scale, -np.inf, room))  # pyright: ignore
        found.append(LinearConstraint(self.at_host / self.scale, -np.inf, self.host / self.scale))  # pyright: ignore
        ways = [(self.p.to_host, [o.down for o in self.options])]
        ways += [(self.p.from_host, [o.up for o in self.options])]
        for i, (speed, moved) in enumerate(ways):
            row = -self.costs([0, sizes, 0], moved) / speed / self.unit
            row[self.size - 2 + i] = 1
            found.append(LinearConstraint(row, -self.p.hidden / self.unit, np.inf))
        return found

    def keep_losses(self, choice: Choice) -> None:
        """From here on no choice may lose more than this one."""
        lost = self.loss(choice)
        unit = max(float(self.losses.max(initial=0)), 1e-12)
        limit = lost / unit * (1 + 1e-6) + 1e-9
        self.limits.append(LinearConstraint(self.losses / unit, -np.inf, limit))  # pyright: ignore

    def loss(self, choice: Choice) -> float:
        return sum(s.options[o].loss for s, o in zip(self.p.sites, choice.options))

    def solve(self, costs: np.ndarray) -> Choice | None:
        """The choice that costs least; None where there is none. Its seconds are of `seconds` in any case."""
        in_seconds = costs is self.seconds
        unit = self.unit if in_seconds else max(float(costs.max(initial=0)), 1e-12)
        scaled = costs / unit
        scaled[-2:] = costs[-2:]
        result = milp(
            scaled,
            integrality=np.append(np.ones(self.size - 2), [0, 0]),
            bounds=Bounds(0, self.upper()),  # pyright: ignore
            constraints=self.limits,
            options=self.settings,
        )
        if result.x is None:
            return None
        bits = np.append(np.round(result.x[:-2]), [0, 0]) > 0
        proven = result.fun if result.mip_dual_bound is None else result.mip_dual_bound
        return Choice(
            self.how(bits),
            frozenset(map(int, np.flatnonzero(bits[self.ops : self.first]))),
            int(self.sizes[bits].sum()),
            int(self.at_host[bits].sum()),
            float(result.fun * unit),
            float(min(result.fun, proven) * unit),
            self.taken(bits),
        )

    def upper(self) -> np.ndarray:
        """1 for what is allowed, 0 for what isn't; transfers that show have no bound."""
        allowed = [[v.keep, v.offload, v.encode > 0] for v in self.p.values]
        flags = np.array(allowed, float).reshape(self.n, 3).T
        return self.costs(flags, 1, 1, np.inf)

    def how(self, bits: np.ndarray) -> dict[int, str]:
        kinds = enumerate((KEEP, OFFLOAD, ENCODE))
        own = [
            (v, word)
            for k, word in kinds
            for v in np.flatnonzero(bits[k * self.n : (k + 1) * self.n])
        ]
        return {int(v): word for v, word in own if not self.p.values[v].free}

    def taken(self, bits: np.ndarray) -> tuple[int, ...]:
        """Of each site the option that is set."""
        first, found = self.first, []
        for site in self.p.sites:
            found.append(int(np.argmax(bits[first : first + len(site.options)])))
            first += len(site.options)
        return tuple(found)
