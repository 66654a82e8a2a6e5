"""The search for the largest share of a budget whose plan fits, by prediction of the rewritten program."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from stowax.memory_planner import (
    ENCODE,
    Choice,
    Device,
    InfeasibleError,
    Prediction,
    choose,
    format_bytes,
    predict,
    rules_for,
)
from stowax.pallas_kernels import codecs

from . import rewrite
from .baselines import BASELINES
from .flat import Flat, on_device
from .memory import host_type
from .plan import Kept, Plan, decided
from .residuals import Numbers, numbers, places
from .tiers import on_host, tiers
from .timeline import bands, boxes

_REACHES = (2, 1, 4, 8)
_ROUNDS = 6
_GAP = 1e-3  # of a solve, as a share


class BudgetError(ValueError):
    """No plan fits. `least` is the smallest peak that was reached, bytes."""

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


def by_shares[T](
    attempt: Callable[[int], tuple[T, int, int]],
    budget: int,
    total: int,
    low_peak: int,
    high_peak: int,
) -> list[T]:
    """What was tried for shares of `total`, nearer and nearer to the largest whose peak fits.

    How much of what is chosen is in memory at the peak is the compiler's affair, so shares are searched by what is
    predicted of the whole program.

    Args:
      attempt: for a share, what was found, its peak, and the bytes that it took. Raises InfeasibleError.
      low_peak, high_peak: of the shares 0 and `total`.
    """
    low, high = 0, total
    tried: list[T] = []
    for _ in range(_ROUNDS):
        part = (budget - low_peak) / max(1, high_peak - low_peak)
        share = low + round((high - low) * min(0.5, max(0.1, part)))
        if budget >= high_peak and not tried:
            share = total
        try:
            found, peak, taken = attempt(share)
        except InfeasibleError as error:
            share = error.least + error.least // 10_000 + 1  # the solver's tolerance
            if share >= high and tried:
                break
            found, peak, taken = attempt(share)
            low = share
        tried.append(found)
        if peak <= budget:
            low, low_peak = share, peak
        else:
            high, high_peak = min(share, taken), peak
        if high - low <= 0.02 * min(budget, total) or 0.97 * budget <= peak <= budget:
            break
    return tried


class Search:
    """Solves for shares of the budget until the predicted peak of the rewritten program fits."""

    def __init__(
        self, flat: Flat, args: Any, device: Device, donate: Any, host: int, encode: str, correction: float,
        limit: float,
    ):  # fmt: skip
        self.flat, self.args, self.device, self.host = flat, args, device, host
        self.donate, self.correction, self.limit = donate, correction, limit
        self.codec = codecs.get(encode) if encode else None
        self.encode = encode
        self.places = places(flat)
        self.leaves: list[Any] = [
            on_device(x) for x in jax.tree.leaves(args) if hasattr(x, "shape")
        ]
        self.tiers = tiers(flat) if host else []
        self.bits = self.codec.bits_per_weight((1, 4096)) if self.codec is not None else 0.0
        self.before = self.predicted(None)
        self.numbers = functools.cache(self.numbered)
        self.met: list[tuple[Choice, Prediction]] = []  # for any budget

    def numbered(self, reach: int) -> Numbers:
        """The problem in numbers, arguments among them. Transfers of a program that carries nothing over hide in it."""
        found = numbers(
            self.places, self.device, reach=reach, offload=self.host > 0, bits=self.bits
        )
        hidden = found.problem.hidden or self.device.overlap * self.before.seconds
        sites = tuple(tier.site for tier in self.tiers)
        problem = dataclasses.replace(found.problem, hidden=hidden, sites=sites)
        return dataclasses.replace(found, problem=problem)

    def as_function(self, how: Mapping[int, str] | None) -> Callable[..., list[Any]]:
        decisions = [] if how is None else decided(self.places, self.numbers(0), how)
        return lambda *leaves: rewrite.run(self.flat, decisions, self.codec, leaves)

    def predicted(self, choice: Choice | None) -> Prediction:
        how = None if choice is None else choice.how
        hosted = on_host(self.tiers, () if choice is None else choice.options)
        sizes = [len([x for x in jax.tree.leaves(a) if hasattr(x, "shape")]) for a in self.args]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        given = (self.donate,) if isinstance(self.donate, int) else self.donate
        donated = [starts[i] + j for i in given for j in range(sizes[i])]
        return predict(
            self.as_function(how),
            *(host_type(x) if i in hosted else x for i, x in enumerate(self.leaves)),
            donate=donated,
            device=self.device,
            correction=self.correction,
        )

    def __call__(self, budget: int) -> Plan:
        if not self.carries and self.before.peak <= budget:
            return self.unchanged(budget)
        found: list[list[tuple[Choice, Prediction]]] = []
        for reach in self.reaches:
            found.append(self.for_reach(self.numbers(reach), budget))
            if any(p.peak <= budget for _, p in found[-1]):
                break
        self.met += [c for choices in found for c in choices]
        best = min((c.seconds for c, p in self.met if p.peak <= budget), default=math.inf)
        self.met += [(c, self.predicted(c)) for c in self.simple if c.seconds < best]
        fitting = [c for c in self.met if c[1].peak <= budget]
        if not fitting:
            self.refuse(budget, min((p for _, p in self.met), key=lambda p: p.peak))
        choice, prediction = min(fitting, key=lambda c: c[0].seconds)
        bounds = [c.bound for choices in found for c, p in choices if p.peak <= budget]
        bound = min([choice.seconds, *bounds])
        return self.made("optimal", budget, dataclasses.replace(choice, bound=bound), prediction)

    @property
    def carried(self) -> int:
        """Bytes that the program carries over."""
        problem = self.numbers(0).problem
        return sum(problem.values[i].nbytes for i in problem.required)

    @property
    def carries(self) -> bool:
        """Whether that is worth a thought."""
        return 100 * self.carried >= self.before.peak

    @property
    def movable(self) -> int:
        """Bytes that a plan could do without: what is carried over, and arguments that may be on the host."""
        return self.carried + sum(tier.site.options[0].nbytes for tier in self.tiers)

    @property
    def simple(self) -> list[Choice]:
        """What needs no solving: the baselines, those that offload only where there is a host."""
        if not self.carries:
            return []
        choices = [rule(self.places, self.numbers(0)) for rule in BASELINES.values()]
        return [c for c in choices if c.host_nbytes <= self.host]

    @property
    def reaches(self) -> tuple[int, ...]:
        """How far recomputation may reach back: one way only where no single value crosses the program."""
        return _REACHES if self.numbers(1).problem.groups else (0,)

    def refuse(self, budget: int, least: Prediction) -> NoReturn:
        names = ", ".join(f"{b.name} ({format_bytes(b.nbytes)})" for b in least.at_peak[:5])
        raise BudgetError(
            f"`hbm` is {format_bytes(budget)}; the least that was reached is {format_bytes(least.peak)}: arguments and "
            f"outputs take {format_bytes(least.arguments + least.outputs)}, and at the peak there are {names}. "
            f"{self.advice}",
            least.peak,
        )

    @property
    def advice(self) -> str:
        """How to need less."""
        ways = [] if self.host else ["give `host` memory to offload to"]
        ways += [] if self.codec else ["allow `encode`"]
        return f"To need less, {' or '.join([*ways, 'make the batch smaller'])}."

    def for_reach(self, labels: Numbers, budget: int) -> list[tuple[Choice, Prediction]]:
        """Choices for shares of the budget."""
        problem, limit = labels.problem, self.limit / _ROUNDS
        total = self.movable
        base = self.before.arguments + self.before.outputs + self.carried - total

        def attempt(share: int) -> tuple[tuple[Choice, Prediction], int, int]:
            choice = choose(problem, share, self.host, gap=_GAP, time_limit=limit)
            prediction = self.predicted(choice)
            return (choice, prediction), prediction.peak, choice.nbytes

        return by_shares(attempt, budget, total, base, self.before.peak)

    def unchanged(self, budget: int) -> Plan:
        """The plan of a program that fits and carries nothing worth a thought."""
        choice = BASELINES["keep-all"](self.places, self.numbers(0))
        bound = choose(self.numbers(0).problem, self.movable, self.host, gap=_GAP).bound
        choice = dataclasses.replace(choice, bound=min(choice.seconds, bound))
        return self.made("optimal", budget, choice, self.before)

    def baseline(self, name: str) -> Plan:
        choice = BASELINES[name](self.places, self.numbers(0))
        return self.made(name, None, choice, self.predicted(choice))

    def made(
        self, strategy: str, budget: int | None, choice: Choice, prediction: Prediction
    ) -> Plan:
        labels = self.numbers(0)
        p = labels.problem
        kept = tuple(
            Kept(p.values[i].name, labels.variables[i][1].aval.str_short(), how, p.values[i].nbytes)
            for i, how in sorted(choice.how.items())
        )
        again = tuple(
            f"{self.places[labels.equations[o][0]].key}/{labels.equations[o][1]}"
            for o in sorted(choice.again)
        )
        encoded = any(k.how == ENCODE for k in kept)
        return Plan(
            device=self.device.name,
            budget=budget,
            strategy=strategy,
            kept=kept,
            again=again,
            before=self.before.peak,
            after=prediction.peak,
            seconds=choice.seconds,
            bound=choice.bound,
            step_before=self.before.seconds,
            step_after=prediction.seconds,
            host=choice.host_nbytes,
            streamed=tuple(
                self.flat.names[i].removeprefix("0/")
                for i in sorted(on_host(self.tiers, choice.options))
            ),
            codec=self.encode if encoded else "",
            fingerprint=self.flat.fingerprint,
            timelines=(bands(self.before), bands(prediction)),
            boxes=boxes(prediction),
            accuracy=rules_for(self.device.backend).accuracy,
        )
