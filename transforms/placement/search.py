"""`plan`: for one program and one budget, what is kept, made again, offloaded or encoded; checked by prediction."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
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
    memory_report,
    parse_bytes,
    predict,
)
from stowax.memory_planner import device as device_of
from stowax.pallas_kernels import codecs

from . import rewrite
from .baselines import BASELINES
from .flat import Flat, flatten
from .memory import host_type
from .plan import Kept, Plan, decided
from .residuals import Numbers, numbers, places
from .tiers import on_host, tiers

_REACHES = (2, 1, 4, 8)
_ROUNDS = 6
_COMPILATIONS = 4
_GAP = 1e-3  # of a solve, as a share


def plan(
    fn: Callable[..., Any],
    *args: Any,
    hbm: int | str | None = None,
    host: int | str = 0,
    device: str | Device = "h100",
    donate: int | Sequence[int] = (),
    encode: str = "",
    strategy: str = "optimal",
    measure: bool = False,
    correction: float = 1.0,
    time_limit: float = 30.0,
) -> Plan:
    """Plans the memory of a function: a gradient, a training step, a decode step.

    What a first half carries over to a second is kept, made again, offloaded or encoded. With `host` memory, arguments
    that only scans run over (stacked weights) and those that an elementwise update replaces (an optimizer's state) may
    live there and be fetched part by part. One choice is made of all.

    Args:
      fn: the function, differentiated already if it trains (`jax.value_and_grad(loss)`, or a whole step).
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      hbm: bytes of device memory for all of it, as a number or as "8GiB"; None is the device's own.
      host: bytes of host memory for residuals and arguments; 0 for none.
      device: a name of `memory_planner.device`, or a `Device`.
      donate: arguments whose memory may be reused, as in `jax.jit`.
      encode: name of a codec ("int8-g128") that values may be kept in; "" for none. The only choice that changes
        results.
      strategy: "optimal", or a baseline: one of `BASELINES`.
      measure: compile the planned program here and read the compiler's own peak; where that is above `hbm`, plan again
        for so much less, until it is not.
      correction: factor on predicted temporaries, from `Prediction.corrected` of a compiled program.
      time_limit: seconds for all solves together.

    Raises:
      ValueError: for a budget that can't be met, with the least that would do and what pins it; for unknown names.

    Example:
      >>> p = plan(jax.value_and_grad(loss), params, batch, hbm="6GiB", device="h100")
      >>> step = jax.jit(p.apply(jax.value_and_grad(loss)))
    """
    target = device_of(device) if isinstance(device, str) else device
    if strategy != "optimal" and strategy not in BASELINES:
        raise ValueError(
            f"`strategy` is {strategy!r}; expected 'optimal' or one of {sorted(BASELINES)}"
        )
    budget = target.hbm_bytes if hbm is None else parse_bytes(hbm, "hbm")
    flat = flatten(fn, args, {})
    search = _Search(
        flat, args, target, donate, parse_bytes(host, "host"), encode, correction, time_limit
    )
    if strategy != "optimal":
        return search.baseline(strategy)
    return _measured(search, budget, fn, args, donate) if measure else search(budget)


def _measured(search: _Search, budget: int, fn: Any, args: Any, donate: Any) -> Plan:
    """The plan whose compiled program is within the budget."""
    target, over = budget, 0
    for _ in range(_COMPILATIONS):
        found = search(target)
        given = found.placed(args, host_type)
        compiled = jax.jit(found.apply(fn), donate_argnums=donate).lower(*given).compile()
        peak = memory_report(compiled).peak
        if peak <= budget:
            return dataclasses.replace(found, budget=budget, measured=peak)
        over = peak - budget
        target -= over
    raise ValueError(
        f"`hbm` is {format_bytes(budget)}, and after {_COMPILATIONS} compilations the peak is still "
        f"{format_bytes(over)} above it: give {format_bytes(budget + over)}, or `host` memory"
    )


class _Search:
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
        self.leaves: list[Any] = [x for x in jax.tree.leaves(args) if hasattr(x, "shape")]
        self.tiers = tiers(flat) if host else []
        self.bits = self.codec.bits_per_weight((1, 4096)) if self.codec is not None else 0.0
        self.before = self.predicted(None)
        self.numbers = functools.cache(self.numbered)

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
        found: list[list[tuple[Choice, Prediction]]] = []
        for reach in self.reaches:
            found.append(self.for_reach(self.numbers(reach), budget))
            if any(p.peak <= budget for _, p in found[-1]):
                break
        tried = [c for choices in found for c in choices]
        best = min((c.seconds for c, p in tried if p.peak <= budget), default=math.inf)
        tried += [(c, self.predicted(c)) for c in self.simple if c.seconds < best]
        fitting = [c for c in tried if c[1].peak <= budget]
        if not fitting:
            least = min((p for _, p in tried), key=lambda p: p.peak)
            self.refuse(budget, least)
        choice, prediction = min(fitting, key=lambda c: c[0].seconds)
        bounds = [c.bound for choices in found for c, p in choices if p.peak <= budget]
        bound = min([choice.seconds, *bounds])
        return self.made("optimal", budget, dataclasses.replace(choice, bound=bound), prediction)

    @property
    def simple(self) -> list[Choice]:
        """What needs no solving: the baselines, those that offload only where there is a host."""
        choices = [rule(self.places, self.numbers(0)) for rule in BASELINES.values()]
        return [c for c in choices if c.host_nbytes <= self.host]

    @property
    def reaches(self) -> tuple[int, ...]:
        """How far recomputation may reach back: one way only where no single value crosses the program."""
        return _REACHES if self.numbers(1).problem.groups else (0,)

    def refuse(self, budget: int, least: Prediction) -> NoReturn:
        names = ", ".join(f"{b.name} ({format_bytes(b.nbytes)})" for b in least.at_peak[:5])
        ways = [] if self.host else ["give `host` memory to offload to"]
        ways += [] if self.codec else ["allow `encode`"]
        raise ValueError(
            f"`hbm` is {format_bytes(budget)}; the least that was reached is {format_bytes(least.peak)}: arguments and "
            f"outputs take {format_bytes(least.arguments + least.outputs)}, and at the peak there are {names}. To need "
            f"less, {' or '.join([*ways, 'make the batch smaller'])}."
        )

    def for_reach(self, labels: Numbers, budget: int) -> list[tuple[Choice, Prediction]]:
        """Choices for shares of the budget, nearer and nearer to the largest that fits.

        How much of what is kept is in memory at the peak is the compiler's affair, so shares are searched by what is
        predicted of the whole program.
        """
        given = sum(tier.site.options[0].nbytes for tier in self.tiers)
        total = given + sum(labels.problem.values[i].nbytes for i in labels.problem.required)
        base = self.before.arguments + self.before.outputs - given
        low, low_peak, high, high_peak = 0, base, total, self.before.peak
        tried: list[tuple[Choice, Prediction]] = []
        for _ in range(_ROUNDS):
            part = (budget - low_peak) / max(1, high_peak - low_peak)
            share = low + round((high - low) * min(0.5, max(0.1, part)))
            if budget >= self.before.peak and not tried:
                share = total
            try:
                choice = choose(
                    labels.problem, share, self.host, gap=_GAP, time_limit=self.limit / _ROUNDS
                )
            except InfeasibleError as error:
                share = error.least + error.least // 10_000 + 1  # the solver's tolerance
                if share >= high and tried:
                    break
                choice = choose(
                    labels.problem, share, self.host, gap=_GAP, time_limit=self.limit / _ROUNDS
                )
                low = share
            tried.append((choice, self.predicted(choice)))
            peak = tried[-1][1].peak
            if peak <= budget:
                low, low_peak = share, peak
            else:
                high, high_peak = min(share, choice.nbytes), peak
            if high - low <= 0.02 * total or 0.97 * budget <= peak <= budget:
                break
        return tried

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
            timelines=(_bytes_over_time(self.before), _bytes_over_time(prediction)),
        )


def _bytes_over_time(prediction: Prediction) -> tuple[int, ...]:
    return tuple(moment.nbytes for moment in prediction.timeline)
