"""Updates of arguments, element by element: an optimizer's moments, averages of parameters.

An argument that comes back as a result, and from which no matrix product follows, needs to be on the device only a part
at a time. The elementwise equations of such an update are put together at the end of the program. Where one of its
arguments lies in host memory they run in a loop over parts of the first axis: each part is fetched, updated, and
written back to where it came from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stowax.memory_planner import tree_nbytes

from ..core import compat
from .memory import HOST, fetched, on_host

PART = 16 << 20  # bytes of an array that are on the device at a time, where its first axis allows

_ELEMENTWISE = frozenset((
    "abs", "add", "add_any", "and", "atan2", "broadcast_in_dim", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "one_minus_square", "or", "pow", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor",
))  # fmt: skip
_HEAVY = frozenset(
    ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "gather")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """Equations that compute arrays of one shape from arrays of that shape and scalars.

    Attributes:
      shape: theirs.
      start, stop: numbers of the equations in the program.
      inputs: what they read that is not their own: arrays of the shape, and scalars.
      results: what is read elsewhere, or returned.
      targets: for results that replace an argument, which.
      seeds: the arguments that may be in host memory.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]
    targets: Mapping[Any, Any]
    seeds: tuple[Any, ...]

    @functools.cached_property
    def parts(self) -> int:
        """How many runs the loop makes: the fewest of equal sizes whose arrays take at most `PART` bytes.

        Two at least: of a loop with one run compilers make none, and fetch when they like.
        """
        largest = max(tree_nbytes(v.aval) for v in (*self.inputs, *self.results))
        rows = self.shape[0]
        divisors = (n for n in range(2, rows + 1) if rows % n == 0)
        return next((n for n in divisors if largest <= n * PART), rows)


def run(
    jaxpr: compat.Jaxpr, update: Update, given: Mapping[Any, Any], after: Any
) -> dict[Any, Any]:
    """The results of an update, part by part; those that replace an argument are where that is.

    Args:
      given: values of its inputs.
      after: a value on the device before which nothing is fetched; None for none.
    """
    others = [v for v in update.results if v not in update.targets]
    rows = update.shape[0] // update.parts
    first = jnp.int32(0) if after is None else lax.optimization_barrier((jnp.int32(0), after))[0]

    def part(carry: list[Any], i: Any) -> Any:
        at = first + i * rows
        cut = lambda x: lax.dynamic_slice_in_dim(x, at, rows, 0) if jnp.ndim(x) else x
        now = {**given, **dict(zip(update.targets.values(), carry))}
        found = {v: fetched(cut(x)) for v, x in now.items()}
        for eqn in jaxpr.eqns[update.start : update.stop]:
            found[eqn.outvars[0]] = _of_rows(eqn, compat.read(found, eqn.invars), rows)
        back = [_replaced(x, found[v], at) for v, x in zip(update.targets, carry)]
        return back, [found[v] for v in others]

    start = [given[v] for v in update.targets.values()]
    carry, stacks = lax.scan(part, start, jnp.arange(update.parts, dtype="int32"))
    stacks = [x.reshape(update.shape) for x in stacks]
    return dict(zip((*update.targets, *others), (*carry, *stacks)))


def _of_rows(eqn: compat.Eqn, values: Sequence[Any], rows: int) -> Any:
    """An elementwise equation on so many rows."""
    if eqn.primitive.name == "broadcast_in_dim":
        return jnp.broadcast_to(values[0], (rows, *compat.shape_of(eqn.outvars[0])[1:]))
    return compat.bind(eqn, values)[0]


def _replaced(whole: Any, rows: Any, start: Any) -> Any:
    rows = jax.device_put(rows, HOST) if on_host(whole) else rows
    return lax.dynamic_update_slice_in_dim(whole, rows, start, 0)


def gathered(
    jaxpr: compat.Jaxpr, replaced: Mapping[int, int]
) -> tuple[compat.Jaxpr, tuple[Update, ...]]:
    """The program with the equations of each update put together, behind all that depends on none.

    Args:
      replaced: of results, by number, the numbers of the arguments whose new values they are.
    """
    targets = {
        jaxpr.outvars[j]: jaxpr.invars[i]
        for j, i in replaced.items()
        if not compat.is_literal(jaxpr.outvars[j])
    }
    groups = _Groups(jaxpr, targets)
    found = groups.found()
    own = {i for group in found for i in group}
    first = [e for i, e in enumerate(jaxpr.eqns) if i not in own | groups.after]
    last = [e for i, e in enumerate(jaxpr.eqns) if i in groups.after]
    eqns, updates = first, []
    for group in found:
        inside = groups.closed(group)
        updates.append(groups.update(group, inside, len(eqns)))
        eqns = [*eqns, *inside]
    return jaxpr.replace(eqns=[*eqns, *last]), tuple(updates)


class _Groups:
    """Finds the equations of updates. Variables that are computed from each other elementwise are in one group."""

    def __init__(self, jaxpr: compat.Jaxpr, targets: Mapping[Any, Any]):
        self.jaxpr, self.targets = jaxpr, targets
        self.returned = {v for v in jaxpr.outvars if not compat.is_literal(v)}
        self.users: dict[Any, list[int]] = {}
        self.maker: dict[Any, compat.Eqn] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            self.maker.update(dict.fromkeys(eqn.outvars, eqn))
            for v in compat.variables(eqn):
                self.users.setdefault(v, []).append(i)
        self.seeds = _light_followed(jaxpr, targets.values())
        self.parent: dict[Any, Any] = {v: v for v in self.seeds}
        self.members: dict[int, Any] = {}  # by equation, a variable of its group
        self.source: dict[Any, frozenset[Any]] = {}
        self.after: set[int] = set()  # equations that depend on a group and are in none

    def found(self) -> list[list[int]]:
        """Numbers of the equations of each group whose arguments are all replaced by it."""
        self.grow()
        self.pull()
        groups: dict[Any, list[int]] = {}
        for i in sorted(self.members):
            groups.setdefault(self.root(self.members[i]), []).append(i)
        made = {v for i in self.members for v in self.jaxpr.eqns[i].outvars}
        bad = {
            self.root(v) for out, v in self.targets.items() if v in self.parent and out not in made
        }
        return [group for root, group in groups.items() if root not in bad]

    def root(self, v: Any) -> Any:
        while self.parent[v] is not v:
            v = self.parent[v]
        return v

    def join(self, i: int, variables: Sequence[Any]) -> None:
        out = self.jaxpr.eqns[i].outvars[0]
        self.parent.setdefault(out, out)
        self.members[i] = out
        for v in variables:
            self.parent[self.root(v)] = self.root(out)

    def grow(self) -> None:
        """Takes in what is elementwise in a variable of a group."""
        late: set[Any] = set()
        for i, eqn in enumerate(self.jaxpr.eqns):
            read = compat.variables(eqn)
            own = [v for v in read if v in self.parent]
            if own and late.isdisjoint(read) and _is_elementwise(eqn, compat.shape_of(own[0])):
                self.join(i, own)
            elif own or not late.isdisjoint(read):
                self.after.add(i)
                late.update(eqn.outvars)

    def pull(self) -> None:
        """Takes in what makes inputs of one group only, unless more arrays would have to wait for it."""
        for i in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[i]
            out = eqn.outvars[0]
            users = self.users.get(out, [])
            if i in self.members or i in self.after or out in self.returned or not users:
                continue
            groups = {self.root(self.members[u]) for u in users if u in self.members}
            inside = len(groups) == 1 and all(u in self.members for u in users)
            if (
                inside
                and _is_elementwise(eqn, compat.shape_of(out))
                and len(self.sources(out)) <= 1
            ):
                self.join(i, [self.jaxpr.eqns[users[0]].outvars[0]])

    def sources(self, v: Any) -> frozenset[Any]:
        """The arrays that a value is elementwise in; arguments, which are there anyway, are not counted."""
        if v not in self.source:
            eqn = self.maker.get(v)
            if eqn is None or not compat.shape_of(v):
                self.source[v] = frozenset()
            elif _is_elementwise(eqn, compat.shape_of(v)):
                self.source[v] = frozenset().union(*map(self.sources, compat.variables(eqn)))
            else:
                self.source[v] = frozenset((v,))
        return self.source[v]

    def closed(self, group: Sequence[int]) -> list[compat.Eqn]:
        """The equations of a group with their own copies of broadcasts and widening casts that others use too."""
        done = eqns = [self.jaxpr.eqns[i] for i in group]
        made = {v for eqn in done for v in eqn.outvars}
        for v in dict.fromkeys(v for eqn in eqns for v in compat.variables(eqn)):
            maker = None if v in made else self.maker.get(v)
            if maker is not None and _is_cheap(maker):
                copy = compat.fresh(v)
                done = [maker.replace(outvars=[copy]), *(_with(eqn, v, copy) for eqn in done)]
        return done

    def update(self, group: Sequence[int], eqns: Sequence[compat.Eqn], start: int) -> Update:
        made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
        read = dict.fromkeys(v for eqn in eqns for v in compat.variables(eqn))
        inputs = tuple(v for v in read if v not in made)
        inside = set(group)
        outside = lambda v: v in self.returned or not inside.issuperset(self.users.get(v, ()))
        results = tuple(v for v in made if outside(v))
        targets = {v: self.targets[v] for v in results if self.targets.get(v) in inputs}
        seeds = tuple(v for v in inputs if v in self.seeds)
        shape = compat.shape_of(seeds[0])
        return Update(shape, start, start + len(eqns), inputs, results, targets, seeds)


def _light_followed(jaxpr: compat.Jaxpr, arguments: Any) -> list[Any]:
    """The arguments of at least one axis that no matrix product and no inner program depends on."""
    heavy: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        own = eqn.primitive.name in _HEAVY or compat.has_program(eqn)
        if own or not heavy.isdisjoint(eqn.outvars):
            heavy.update(compat.variables(eqn))
    return [v for v in dict.fromkeys(arguments) if compat.shape_of(v) and v not in heavy]


def _is_elementwise(eqn: compat.Eqn, shape: tuple[int, ...]) -> bool:
    """Whether it makes one array of the shape from arrays of the shape and scalars."""
    shapes = {compat.shape_of(atom) for atom in eqn.invars}
    made = [compat.shape_of(v) for v in eqn.outvars]
    if eqn.primitive.name not in _ELEMENTWISE or made != [shape]:
        return False
    if eqn.primitive.name == "broadcast_in_dim":
        return shapes == {()}
    return shapes <= {(), shape}


def _is_cheap(eqn: compat.Eqn) -> bool:
    """Whether its result had better be computed twice than written."""
    source, out = eqn.invars[0], eqn.outvars[0]
    if eqn.primitive.name == "broadcast_in_dim":
        return compat.shape_of(source) == ()
    widens = tree_nbytes(source.aval) < tree_nbytes(out.aval)
    return eqn.primitive.name == "convert_element_type" and compat.shape_of(out) != () and widens


def _with(eqn: compat.Eqn, old: Any, new: Any) -> compat.Eqn:
    if not any(v is old for v in eqn.invars):
        return eqn
    return eqn.replace(invars=[new if v is old else v for v in eqn.invars])
