"""What a program keeps for later, and what it could keep instead.

Two kinds of places: a scan that stacks values which another scan takes apart again (the layers of a differentiated
model), and the fullest point of the program itself, over which values are carried from the first half to the second.
At each, the values that are used later are needed again; everything computed before is a candidate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from stowax.memory_planner import (
    FUSED_SHARE,
    Candidate,
    Device,
    Problem,
    Recompute,
    is_light,
    recompute_seconds,
    tree_nbytes,
)  # fmt: skip

from ..core import compat
from ..core.compat import is_literal
from .flat import Flat, body_of

SMALLEST = 1 << 20  # bytes of what is worth a transfer
ENCODED = (
    1 << 16
)  # bytes of what is worth encoding; maxima and sums of a softmax are smaller, and must stay exact


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A scan that stacks values, and a later one that takes them.

    Attributes:
      first, second: numbers of the equations.
      results: for each operand of the second's body that comes from the first, by its place among the scanned ones:
        the place among the first's stacked results.
    """

    first: int
    second: int
    results: dict[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where values are carried over: the body of the first scan of a `pair`, or the program up to equation `cut`.

    Attributes:
      key: names the place.
      jaxpr: whose equations make the candidates.
      last: equations from here on are not candidates.
      required: variables that are needed again.
      free: variables that are there anyway.
      trips: runs of the body.
      pair: None for the program itself.
    """

    key: str
    jaxpr: compat.Jaxpr
    last: int
    required: tuple[Any, ...]
    free: frozenset[Any]
    trips: int = 1
    pair: Pair | None = None


def places(flat: Flat) -> list[Place]:
    """The places of a program, those of scans first."""
    jaxpr = flat.jaxpr
    pairs = _pairs(jaxpr)
    found = [_scan_place(jaxpr, pair, i) for i, pair in enumerate(pairs)]
    paired = {jaxpr.eqns[p.first].outvars[r] for p in pairs for r in _stacked_outputs(jaxpr, p)}
    read = {v for pair in pairs for v in jaxpr.eqns[pair.first].invars if not is_literal(v)}
    return [*found, *_program_place(flat, paired, read)]


def scanned_only(flat: Flat) -> list[int]:
    """The arguments that are nothing but run over by scans, by number: they can stay on the host as stacks."""
    jaxpr = flat.jaxpr
    elsewhere = {v for v in jaxpr.outvars if not is_literal(v)}
    stacks: set[Any] = set()
    for eqn in jaxpr.eqns:
        first = sum(compat.scan_split(eqn)) if eqn.primitive.name == "scan" else len(eqn.invars)
        elsewhere.update(v for v in eqn.invars[:first] if not is_literal(v))
        stacks.update(v for v in eqn.invars[first:] if not is_literal(v))
    return [i for i, v in enumerate(jaxpr.invars) if v in stacks and v not in elsewhere]


def _pairs(jaxpr: compat.Jaxpr) -> list[Pair]:
    scans = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == "scan"]
    made = {}
    for i in scans:
        _, carries = compat.scan_split(jaxpr.eqns[i])
        for j, var in enumerate(jaxpr.eqns[i].outvars[carries:]):
            made[var] = i, j
    uses: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in {v for v in eqn.invars if not is_literal(v)}:
            uses.setdefault(var, []).append(i)
    out = {v for v in jaxpr.outvars if not is_literal(v)}
    found: dict[tuple[int, int], dict[int, int]] = {}
    for i in scans:
        eqn = jaxpr.eqns[i]
        start = sum(compat.scan_split(eqn))
        for k, var in enumerate(eqn.invars[start:]):
            if is_literal(var) or var not in made or uses[var] != [i] or var in out:
                continue
            first, j = made[var]
            if jaxpr.eqns[first].params["length"] == eqn.params["length"]:
                found.setdefault((first, i), {})[k] = j
    return [Pair(first, second, results) for (first, second), results in found.items()]


def _stacked_outputs(jaxpr: compat.Jaxpr, pair: Pair) -> list[int]:
    _, carries = compat.scan_split(jaxpr.eqns[pair.first])
    return [carries + j for j in pair.results.values()]


def _scan_place(jaxpr: compat.Jaxpr, pair: Pair, number: int) -> Place:
    eqn = jaxpr.eqns[pair.first]
    body, _ = body_of(eqn)
    consts, carries = compat.scan_split(eqn)
    free = {*body.constvars, *body.invars[:consts], *body.invars[consts + carries :]}
    required = [body.outvars[carries + j] for j in dict.fromkeys(pair.results.values())]
    needed = tuple(v for v in required if not is_literal(v))
    return Place(
        f"scan{number}", body, len(body.eqns), needed, frozenset(free), eqn.params["length"], pair
    )


def _program_place(flat: Flat, paired: set[Any], read: set[Any]) -> list[Place]:
    """The point where the values that were made and are used later take the most bytes.

    What the first scans of pairs `read` is needed again, by what their second scans make again. What updates of
    arguments read (gradients) is there to the end, as results are.
    """
    jaxpr = flat.jaxpr
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not is_literal(v)}
    end = min((update.start for update in flat.updates), default=len(jaxpr.eqns))
    out = {v for v in jaxpr.outvars if not is_literal(v)}
    out |= {v for eqn in jaxpr.eqns[end:] for v in compat.variables(eqn)}
    change = [0] * (len(jaxpr.eqns) + 1)
    for i, eqn in enumerate(jaxpr.eqns[:end]):
        for v in eqn.outvars:
            if v in last and v not in paired and v not in out:
                change[i] += nbytes(v)
                change[last[v]] -= nbytes(v)
    total, best, cut = 0, 0, 0
    for i, delta in enumerate(change):
        total += delta
        if total > best:
            best, cut = total, i + 1
    made = [v for eqn in jaxpr.eqns[:cut] for v in eqn.outvars]
    later = lambda v: last.get(v, -1) >= cut or v in read
    required = tuple(v for v in made if later(v) and v not in paired and v not in out)
    free = frozenset({*jaxpr.constvars, *jaxpr.invars, *(v for v in made if v in out)})
    return [Place("program", jaxpr, cut, required, free)] if required else []


def nbytes(atom: Any) -> int:
    return tree_nbytes(atom.aval)


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """The problem of some places, and what its numbers stand for.

    Attributes:
      variables: place and variable of each value.
      equations: place and number of the equation of each operation.
    """

    problem: Problem
    variables: tuple[tuple[int, Any], ...]
    equations: tuple[tuple[int, int], ...]
    names: tuple[str, ...]


def numbers(
    found: Sequence[Place],
    device: Device,
    *,
    reach: int = 0,
    offload: bool = False,
    bits: float = 0.0,
) -> Numbers:
    """The problem in numbers.

    Args:
      reach: of the points in the program that a single value crosses, at least one in so many is kept; 0 for no rule.
      offload: whether values may go to the host.
      bits: of an encoded element; 0 where none may be encoded.
    """
    table = _Table(device, offload, bits)
    required: list[int] = []
    groups: list[tuple[int, ...]] = []
    for place in found:
        number = table.add(place)
        required += [number(v) for v in place.required if v not in place.free]
        if reach and place.pair is None:
            points = [number(v) for v in crossings(place)]
            groups += [tuple(points[i : i + reach]) for i in range(len(points) - reach + 1)]
    trips = max((place.trips for place in found), default=1)
    hidden = device.overlap * sum(op.seconds for op in table.ops)
    problem = Problem(
        tuple(table.values), tuple(table.ops), tuple(dict.fromkeys(required)), tuple(groups), device.to_host,
        device.from_host, hidden, min(1.0, 2 / trips), 2 / device.bandwidth,
    )  # fmt: skip
    names = tuple(v.name for v in table.values)
    return Numbers(problem, tuple(table.variables), tuple(table.equations), names)


class _Table:
    """Numbers values and operations, place by place."""

    def __init__(self, device: Device, offload: bool, bits: float):
        self.device, self.offload, self.bits = device, offload, bits
        self.values: list[Candidate] = []
        self.ops: list[Recompute] = []
        self.variables: list[tuple[int, Any]] = []
        self.equations: list[tuple[int, int]] = []
        self.count = 0

    def add(self, place: Place) -> Callable[[Any], int]:
        """Takes in the equations of a place; gives what numbers its variables."""
        eqns, first = place.jaxpr.eqns[: place.last], len(self.ops)
        made = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
        index: dict[Any, int] = {}
        p, self.count = self.count, self.count + 1

        def number(var: Any) -> int:
            if var not in index:
                index[var] = len(self.values)
                self.values.append(self.candidate(place, var, made.get(var), first))
                self.variables.append((p, var))
            return index[var]

        for i, eqn in enumerate(eqns):
            inputs = dict.fromkeys(number(v) for v in eqn.invars if not is_literal(v))
            seconds = place.trips * recompute_seconds(eqn, self.device)
            self.ops.append(Recompute(seconds, tuple(inputs)))
            self.equations.append((p, i))
        return number

    def candidate(self, place: Place, var: Any, producer: int | None, first: int) -> Candidate:
        size = nbytes(var) * place.trips
        eqn = None if producer is None else place.jaxpr.eqns[producer]
        keep = eqn is None or not is_light(eqn) or var in place.required
        keep = keep or (place.pair is None and var in crossings(place))
        encodes = keep and _is_float(var) and size >= ENCODED
        encode = self.bits / (8 * var.aval.dtype.itemsize) if encodes else 0.0
        # A scan writes what it stacks; elsewhere the compiler itself chooses what to write.
        share = 1.0 if place.pair is not None else FUSED_SHARE
        moved = share * 2 * size / self.device.bandwidth
        return Candidate(
            name=f"{place.key}/{_name(place, var, producer)}",
            nbytes=size,
            producer=None if producer is None or eqn.effects else first + producer,  # pyright: ignore
            free=var in place.free,
            keep=keep,
            offload=self.offload and keep and size >= SMALLEST,
            encode=encode,
            seconds=moved,
        )


def _is_float(var: Any) -> bool:
    return jax.numpy.issubdtype(var.aval.dtype, jax.numpy.floating)


def _name(place: Place, var: Any, producer: int | None) -> str:
    """Stable between traces of one program: the place of the equation, and what it is."""
    if producer is None:
        inputs = [*place.jaxpr.constvars, *place.jaxpr.invars]
        return f"input.{inputs.index(var)}" if var in inputs else "other"
    eqn = place.jaxpr.eqns[producer]
    part = f".{eqn.outvars.index(var)}" if len(eqn.outvars) > 1 else ""
    return f"{producer}:{eqn.primitive.name}{part}"


@functools.lru_cache(maxsize=16)
def crossings(place: Place) -> tuple[Any, ...]:
    """Values that alone cross a point of the first half: all before is used after it through them.

    What is cheap to make from arguments (masks, tables of angles) doesn't count.
    """
    eqns = place.jaxpr.eqns[: place.last]
    heavy: set[Any] = set()
    last: dict[Any, int] = {}
    for i, eqn in enumerate(eqns):
        inputs = [v for v in eqn.invars if not is_literal(v)]
        weighs = eqn.primitive.name in (
            "dot_general",
            "conv_general_dilated",
            "gather",
            "scan",
            "sort",
        )
        if weighs or any(v in heavy for v in inputs):
            heavy.update(eqn.outvars)
        last.update(dict.fromkeys(inputs, i))
    live: set[Any] = set()
    found: list[Any] = []
    for i, eqn in enumerate(eqns):
        live.update(v for v in eqn.outvars if v in heavy and last.get(v, -1) > i)
        live -= {v for v in live if last[v] <= i}
        if len(live) == 1 and (not found or found[-1] not in live):
            found.append(next(iter(live)))
    return tuple(_thinned(place, found))


def _thinned(place: Place, found: list[Any]) -> list[Any]:
    """Of neighbours with no matrix product between them, the last."""
    made = {v: i for i, eqn in enumerate(place.jaxpr.eqns) for v in eqn.outvars}
    kept: list[Any] = []
    for var in found:
        if kept:
            between = place.jaxpr.eqns[made[kept[-1]] + 1 : made[var] + 1]
            if not any(
                e.primitive.name in ("dot_general", "conv_general_dilated", "scan") for e in between
            ):
                kept.pop()
        kept.append(var)
    return kept
