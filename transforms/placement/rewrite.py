"""Runs a flat program by a plan: values that it would carry over are kept, offloaded, encoded, or made again.

Everything else runs as it was traced, operation by operation the same, so results are equal where nothing is encoded.
What is made again stands behind an optimization barrier together with a value of that moment, so that no compiler can
compute it earlier or share it with the first time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax

from stowax.memory_planner import ENCODE, KEEP, OFFLOAD
from stowax.pallas_kernels.codecs import Codec

from ..core import compat
from ..core.compat import is_literal
from . import updates
from .flat import Flat, body_of, environment, evaluate, scan, step
from .memory import DEVICE, HOST, on_host
from .residuals import Pair, Place
from .updates import Update


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """What becomes of the values of one place: how each is kept; all others are made again.

    Attributes:
      how: by variable: "keep", "offload" or "encode".
    """

    place: Place
    how: Mapping[Any, str]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value on its way: where it is, how to get it back."""

    how: str
    arrays: Any
    aval: Any


class Keeper:
    """Puts values away and gets them back."""

    def __init__(self, codec: Codec | None):
        self.codec = codec

    def put(self, x: jax.Array, how: str) -> Stored:
        aval = jax.ShapeDtypeStruct(x.shape, x.dtype)
        if how == OFFLOAD:
            return Stored(how, jax.device_put(x, HOST), aval)
        if how == ENCODE:
            assert self.codec is not None
            rows = x.reshape(-1, x.shape[-1] if x.ndim else 1).astype("float32")
            return Stored(how, self.codec.encode(rows), aval)
        return Stored(how, x, aval)

    def get(self, stored: Stored) -> jax.Array:
        if stored.how == OFFLOAD:
            return jax.device_put(stored.arrays, DEVICE)
        if stored.how == ENCODE:
            assert self.codec is not None
            width = stored.aval.shape[-1] if stored.aval.shape else 1
            rows = self.codec.decode(stored.arrays, width)
            return rows.reshape(stored.aval.shape).astype(stored.aval.dtype)
        return stored.arrays


def run(
    flat: Flat, decisions: Sequence[Decisions], codec: Codec | None, args: Sequence[Any]
) -> list[Any]:
    """The results of a flat program on `args`."""
    return _Run(flat, decisions, Keeper(codec))(args)


class _Run:
    def __init__(self, flat: Flat, decisions: Sequence[Decisions], keeper: Keeper):
        self.flat, self.keeper = flat, keeper
        self.jaxpr = flat.jaxpr
        self.firsts: dict[int, list[Decisions]] = {}
        self.seconds: dict[int, list[Decisions]] = {}
        self.program: Decisions | None = None
        for d in decisions:
            pair = d.place.pair
            if pair is None:
                self.program = d
            else:
                self.firsts.setdefault(pair.first, []).append(d)
                self.seconds.setdefault(pair.second, []).append(d)
        self.stacks: dict[str, dict[Any, Stored]] = {}  # what the scans of a place kept
        self.env: dict[Any, Any] = {}
        self.updated: Any = None  # of the last update that ran in parts

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        self.env = dict(zip(self.jaxpr.constvars, self.flat.consts)) | dict(
            zip(self.jaxpr.invars, args)
        )
        lazy, inside = None, range(0)
        starts = {u.start: u for u in self.flat.updates}
        for i, eqn in enumerate(self.jaxpr.eqns):
            if self.program is not None and i == self.program.place.last:
                lazy = self.turn(self.program)
            if i in starts and any(on_host(self.env[v]) for v in starts[i].seeds):
                inside = range(i, starts[i].stop)
                self.env.update(self.update(starts[i], lazy))
            if i in inside:
                continue
            values = self.values(eqn, lazy)
            if i in self.firsts:
                out = self.first(eqn, values, self.firsts[i])
            elif i in self.seconds:
                out = self.second(eqn, values, self.seconds[i], lazy)
            else:
                out = step(eqn, values)
            self.env.update(zip(eqn.outvars, out))
            if lazy is not None:
                lazy.moment = next((x for x in out if isinstance(x, jax.Array)), lazy.moment)
        return [self.read(v, lazy) for v in self.jaxpr.outvars]

    def read(self, atom: Any, lazy: Lazy | None) -> Any:
        if is_literal(atom):
            return atom.val
        return self.env[atom] if atom in self.env else lazy(atom)  # pyright: ignore

    def values(self, eqn: compat.Eqn, lazy: Lazy | None) -> list[Any]:
        return [self.read(v, lazy) for v in eqn.invars]

    def update(self, update: Update, lazy: Lazy | None) -> dict[Any, Any]:
        """The results of an update of arguments in host memory, which starts when the one before it is done."""
        given = {v: self.read(v, lazy) for v in update.inputs}
        found = updates.run(self.jaxpr, update, given, self.updated)
        done = [x for x in found.values() if not on_host(x)]
        self.updated = done[0].ravel()[0] if done else self.updated
        return found

    def turn(self, decisions: Decisions) -> Lazy:
        """From here on values of the first half are had from what is kept of them."""
        place = decisions.place
        made = {v: i for i, eqn in enumerate(place.jaxpr.eqns[: place.last]) for v in eqn.outvars}
        kept = {v: self.keeper.put(self.env[v], how) for v, how in decisions.how.items()}
        free = {v: self.env[v] for v in place.free if v in self.env}
        moment = self.env[place.jaxpr.eqns[place.last - 1].outvars[0]]
        stacked = {
            v for d in (*self.firsts.values(),) for x in d for v in self.passed(x.place.pair)
        }
        for v in made:
            if v not in free and v not in stacked:
                self.env.pop(v, None)
        return Lazy(place, made, kept, free, self.keeper, moment)

    def passed(self, pair: Pair | None) -> list[Any]:
        """The variables through which a pair passes values: their values are in `stacks`."""
        assert pair is not None
        eqn = self.jaxpr.eqns[pair.first]
        carries = compat.scan_split(eqn)[1]
        return [eqn.outvars[carries + j] for j in pair.results.values()]

    def first(self, eqn: compat.Eqn, values: list[Any], decisions: list[Decisions]) -> list[Any]:
        """The first scan of pairs: it stacks what they keep, in the place of what it stacked."""
        body, consts = body_of(eqn)
        carries = compat.scan_split(eqn)[1]
        gone = {carries + j for d in decisions for j in d.place.pair.results.values()}  # pyright: ignore
        rest = [i for i in range(len(body.outvars)) if i not in gone]
        kept = list(dict.fromkeys((v, how) for d in decisions for v, how in d.how.items()))

        def run(args: list[Any]) -> list[Any]:
            env = environment(body, consts, args)
            out = compat.read(env, [body.outvars[i] for i in rest])
            stored = [self.keeper.put(env[v], how) for v, how in kept]
            layouts[:] = stored
            return [*out, *jax.tree.leaves([s.arrays for s in stored])]

        layouts: list[Stored] = []
        found = scan(eqn, values, run)
        tree = jax.tree.structure([s.arrays for s in layouts])
        arrays = jax.tree.unflatten(tree, found[len(rest) :])
        stacks = {v: Stored(how, x, s.aval) for (v, how), x, s in zip(kept, arrays, layouts)}
        for d in decisions:
            self.stacks[d.place.key] = {v: stacks[v] for v in d.how}
        given = dict(zip(rest, found))
        return [given.get(i, ()) for i in range(len(body.outvars))]

    def second(
        self, eqn: compat.Eqn, values: list[Any], decisions: list[Decisions], lazy: Lazy | None
    ) -> list[Any]:
        """The second scan of pairs: each run makes what it needs of its own layer again."""
        body, consts = body_of(eqn)
        start = sum(compat.scan_split(eqn))
        scanned, sources = list(values[start:]), []
        fixed = values[:start]
        replaced: dict[int, tuple[int, Any]] = {}
        for number, d in enumerate(decisions):
            pair = d.place.pair
            assert pair is not None
            first = self.jaxpr.eqns[pair.first]
            inner, _ = body_of(first)
            n_consts, n_carries = compat.scan_split(first)
            operands = [self.read(v, lazy) for v in first.invars]
            sources.append(
                (operands[:n_consts], operands[n_consts + n_carries :], self.stacks[d.place.key])
            )
            for k, j in pair.results.items():
                replaced[k] = number, inner.outvars[n_carries + j]
        rest = [k for k in range(len(scanned)) if k not in replaced]
        extra = [(own, [s.arrays for s in stack.values()]) for _, own, stack in sources]
        flat, tree = jax.tree.flatten(([scanned[k] for k in rest], extra))

        def run(args: list[Any]) -> list[Any]:
            own, more = jax.tree.unflatten(tree, args[start:])
            lazies = [
                self.layer(d, held, xs, arrays, stack)
                for d, (held, _, stack), (xs, arrays) in zip(decisions, sources, more)
            ]
            operands = dict(zip(rest, own))
            for k, (number, var) in replaced.items():
                operands[k] = var.val if is_literal(var) else lazies[number](var)
            args = [*args[:start], *(operands[k] for k in range(len(scanned)))]
            return evaluate(body, consts, *args)

        return scan(eqn, [*fixed, *flat], run, late=True)

    def layer(
        self, d: Decisions, held: Any, xs: Any, arrays: Any, stack: dict[Any, Stored]
    ) -> Lazy:
        """The values of one run of a first scan's body."""
        body, consts = body_of(self.jaxpr.eqns[d.place.pair.first])  # pyright: ignore
        n_consts, n_carries = compat.scan_split(self.jaxpr.eqns[d.place.pair.first])  # pyright: ignore
        free = dict(zip(body.constvars, consts)) | dict(zip(body.invars[:n_consts], held))
        free |= dict(zip(body.invars[n_consts + n_carries :], xs))
        made = {v: i for i, eqn in enumerate(body.eqns) for v in eqn.outvars}
        kept = {v: dataclasses.replace(s, arrays=x) for (v, s), x in zip(stack.items(), arrays)}
        return Lazy(d.place, made, kept, free, self.keeper, None)


class Lazy:
    """Values of a place, each had when it is asked for: kept, there anyway, or made again.

    Attributes:
      moment: a value of now, to which what is made again is tied; None inside a loop, whose runs are apart anyway.
    """

    def __init__(
        self,
        place: Place,
        made: Mapping[Any, int],
        kept: Mapping[Any, Stored],
        free: Mapping[Any, Any],
        keeper: Keeper,
        moment: Any,
    ):
        self.place, self.made, self.kept, self.free = place, made, kept, free
        self.keeper, self.moment = keeper, moment
        self.had: dict[Any, Any] = {}  # as the program has it
        self.source: dict[Any, Any] = {}  # as what is made again reads it

    def __call__(self, var: Any) -> Any:
        """A value as the program itself wants it."""
        if var in self.free:
            return self.free[var]
        if var not in self.had:
            self.had[var] = self.back(var) if var in self.kept else self.again(var)
        return self.had[var]

    def back(self, var: Any) -> Any:
        stored = self.kept[var]
        if stored.how == KEEP:
            return stored.arrays
        return self.keeper.get(dataclasses.replace(stored, arrays=self.tied(stored.arrays)))

    def tied(self, x: Any) -> Any:
        if self.moment is None:
            return x
        return lax.optimization_barrier((x, self.moment))[0]

    def again(self, var: Any) -> Any:
        """Made again, with all that it needs, in the order of the program."""
        todo, needed = [self.made[var]], set()
        while todo:
            i = todo.pop()
            if i in needed:
                continue
            needed.add(i)
            for v in self.place.jaxpr.eqns[i].invars:
                if (
                    not is_literal(v)
                    and v not in self.free
                    and v not in self.kept
                    and v not in self.had
                ):
                    todo.append(self.made[v])
        for i in sorted(needed):
            eqn = self.place.jaxpr.eqns[i]
            values = [v.val if is_literal(v) else self.operand(v) for v in eqn.invars]
            for v, x in zip(eqn.outvars, step(eqn, values)):
                if v not in self.kept:
                    self.had.setdefault(v, x)
        return self.had[var]

    def operand(self, var: Any) -> Any:
        """An operand of what is made again, apart from the one that the first time read."""
        if var in self.had and var not in self.kept:
            return self.had[var]
        if var not in self.source:
            if var in self.free:
                self.source[var] = self.tied(self.free[var])
            else:
                x = self(var)
                self.source[var] = self.tied(x) if self.kept[var].how == KEEP else x
        return self.source[var]
