"""`plan`: for one program and one budget, what is kept, made again, offloaded or encoded; checked by prediction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from stowax.memory_planner import (
    Device,
    choose,
    format_bytes,
    memory_report,
    parse_bytes,
)
from stowax.memory_planner import device as device_of

from ..core.program import position
from . import options
from .baselines import BASELINES
from .flat import flatten
from .formats import Format, Roles, composed, converted
from .memory import placement
from .plan import Plan
from .search import BudgetError, Search, by_shares
from .timeline import bands

_COMPILATIONS = 4
_NEAR = 0.95  # of a budget: a plan that needs less than that was not held back by it


def plan(
    fn: Callable[..., Any],
    *args: Any,
    hbm: int | str | None = None,
    host: int | str = 0,
    device: str | Device = "h100",
    donate: int | Sequence[int] = (),
    encode: str = "",
    strategy: str = "optimal",
    measure: bool | None = None,
    correction: float = 1.0,
    time_limit: float = 30.0,
    weights: Sequence[str] = (),
    caches: Sequence[str] = (),
    params: int | str = 0,
    cache: int | str | None = None,
    least: str = "loss",
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
      measure: compile the planned program and read the compiler's own peak; where that is above `hbm`, or far below,
        plan again with what was learned. None does so where jax runs on `device`.
      correction: factor on predicted temporaries, from `Prediction.corrected` of a compiled program.
      time_limit: seconds for all solves together.
      weights: codecs that the weights may be stored in, the best liked first: ``("int8", "int4-g128")``. Before them
        all is what they are stored in now. Each weight gets one.
      caches: recipes that KV caches may be kept by, the same: ``("int8", "kv4")``; names of `sx.recipes`.
      params, cache: the arguments that hold them.
      least: "loss": of what fits, that which goes least far down in the order, byte for byte, and of such plans the
        fastest; or "seconds": the fastest. With `host` memory the first has weights there before it has fewer bits.

    Raises:
      ValueError: for a budget that can't be met, with the least that would do and what pins it; for unknown names.

    Example:
      >>> p = plan(jax.value_and_grad(loss), params, batch, hbm="6GiB", device="h100")
      >>> step = jax.jit(p.apply(jax.value_and_grad(loss)))

      >>> formats = {"weights": ("int8", "int4-g128"), "caches": ("int8", "kv4"), "cache": 2}
      >>> p = plan(step, params, token, cache, hbm="6GiB", **formats)
      >>> small = p.apply(step)
      >>> params, token, cache = small.prepare(params, token, cache)
      >>> logits, cache = jax.jit(small, donate_argnums=2)(params, token, cache)
    """
    target = device_of(device) if isinstance(device, str) else device
    if strategy != "optimal" and strategy not in BASELINES:
        raise ValueError(
            f"`strategy` is {strategy!r}; expected 'optimal' or one of {sorted(BASELINES)}"
        )
    if measure and not target.is_here:
        raise ValueError(
            f"`measure` compiles here, for {jax.devices()[0].device_kind}, and `device` is {target.name}: plan on "
            "such a device, or leave `measure` out"
        )
    if least not in ("loss", "seconds"):
        raise ValueError(f"`least` is {least!r}; expected 'loss' or 'seconds'")
    budget = target.hbm_bytes if hbm is None else parse_bytes(hbm, "hbm")
    room = parse_bytes(host, "host")

    def search(fn: Callable[..., Any], args: Sequence[Any]) -> Search:
        flat = flatten(fn, tuple(args), {})
        return Search(flat, args, target, donate, room, encode, correction, time_limit)

    own = search(fn, args)
    if strategy != "optimal":
        return own.baseline(strategy)
    if weights or caches:
        at = [None if key is None else _place(fn, key, len(args)) for key in (params, cache)]
        roles = Roles(at[0] or 0, at[1])
        shapes = _shapes(args)
        table = options.table(fn, shapes, roles, weights, caches, own)
        make = lambda budget: _joint(fn, shapes, roles, table, own, search, budget, least)
    else:
        make = own
    measured = target.is_here if measure is None else measure
    compiled = functools.partial(_compiled_peak, fn=fn, args=args, donate=donate)
    return _measured(make, budget, compiled, own.advice) if measured else make(budget)


def _place(fn: Callable[..., Any], key: int | str, count: int) -> int:
    at = position(fn, key)
    if not isinstance(at, int) or not -count <= at < count:
        raise ValueError(
            f"argument {key!r} is none of the {count} given; expected its position or name"
        )
    return at % count


def _joint(
    fn: Callable[..., Any], args: Sequence[Any], roles: Roles, table: Sequence[options.Row], own: Search,
    search: Callable[..., Search], budget: int, least: str,
) -> Plan:  # fmt: skip
    """The plan with a format for each weight and cache: chosen together with the rest, then planned as composed."""
    problem = options.problem(own, table)
    plain = sum(row.site.options[0].nbytes for row in table)
    required = sum(problem.values[i].nbytes for i in problem.required)
    total = required + sum(site.options[0].nbytes for site in problem.sites)
    made: dict[tuple[Format, ...], _Composed] = {}

    def attempt(share: int) -> tuple[tuple[float, _Composed], int, int]:
        choice = choose(problem, share, own.host, least=least, gap=1e-3, time_limit=own.limit / 6)
        chosen = tuple(row.formats[o] for row, o in zip(table, choice.options))
        if chosen not in made:
            small = composed(fn, chosen, roles)
            made[chosen] = _Composed(search(small, converted(small, args, roles)), chosen, budget)
        lost = sum(row.site.options[o].loss for row, o in zip(table, choice.options))
        return (lost, made[chosen]), made[chosen].peak, choice.nbytes

    tried = by_shares(attempt, budget, total, own.before.peak - plain - required, own.before.peak)
    fitting = [(lost if least == "loss" else 0.0, c) for lost, c in tried if c.peak <= budget]
    if not fitting:
        min((c for _, c in tried), key=lambda c: c.peak).refuse()
    best = min(fitting, key=lambda pair: (pair[0], pair[1].seconds))[1]
    return dataclasses.replace(
        best.plan,
        formats=best.formats,
        roles=roles,
        before=own.before.peak,
        step_before=own.before.seconds,
        timelines=(bands(own.before), best.plan.timelines[1]),
    )


class _Composed:
    """A program with formats, and whether it fits: as it is, or by a plan of its own.

    Attributes:
      peak, seconds: predicted, of that.
    """

    def __init__(self, search: Search, formats: tuple[Format, ...], budget: int):
        self.search, self.formats, self.budget = search, formats, budget
        self.peak, self.seconds = search.before.peak, search.before.seconds
        helps = search.carries or bool(search.tiers)
        if helps and budget < self.peak <= budget + search.movable:
            try:
                self.peak, self.seconds = self.plan.after, self.plan.step_after
            except BudgetError as error:
                self.peak = error.least

    @functools.cached_property
    def plan(self) -> Plan:
        return self.search(self.budget)

    def refuse(self) -> NoReturn:
        self.search.refuse(self.budget, self.search.before)


def _shapes(args: Any) -> Any:
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
    return jax.tree.map(shape, args)


def _measured(
    make: Callable[[int], Plan], budget: int, compiled: Callable[[Plan], int], advice: str
) -> Plan:
    """The fastest plan found whose compiled program is within the budget.

    What a prediction was off by is taken off the budget, or added to it, for the next. Where that leaves too little,
    what is predicted to need least is compiled.
    """
    tried: dict[str, Plan] = {}
    target, least, refused = budget, 0, None
    while len(tried) < _COMPILATIONS:
        try:
            found = make(target)
        except BudgetError as error:
            refused = refused or error
            if least:
                break
            target = least = error.least
            continue
        key = repr((found.kept, found.streamed, found.formats))
        if key in tried:
            break
        peak = compiled(found)
        tried[key] = dataclasses.replace(found, budget=budget, measured=peak)
        if peak <= budget and (peak >= _NEAR * budget or found.after < _NEAR * target):
            break
        target = max(least, budget + found.after - peak)
    if refused is not None and not tried:
        raise refused
    fitting = [found for found in tried.values() if found.peak <= budget]
    if not fitting:
        _refuse(budget, min(tried.values(), key=lambda found: found.peak), len(tried), advice)
    return min(fitting, key=lambda found: found.step_after)


def _refuse(budget: int, least: Plan, count: int, advice: str) -> NoReturn:
    moments = list(zip(*(band.nbytes for band in least.timelines[1])))
    sizes = zip(max(moments, key=sum), (band.name for band in least.timelines[1]))
    names = [f"{name} ({format_bytes(size)})" for size, name in sorted(sizes, reverse=True) if size]
    raise BudgetError(
        f"`hbm` is {format_bytes(budget)}, and the least peak of {count} compiled plans is "
        f"{format_bytes(least.peak)}: give so much. At its peak there are {', '.join(names)}. {advice}",
        least.peak,
    )


def _compiled_peak(plan: Plan, *, fn: Any, args: Any, donate: Any) -> int:
    planned = plan.apply(fn)
    given = planned.prepare(*_shapes(args))
    places = jax.tree.map(placement, given)
    jitted = jax.jit(planned, donate_argnums=donate, in_shardings=places)
    compiled = jitted.lower(*given).compile()
    return memory_report(compiled).peak
