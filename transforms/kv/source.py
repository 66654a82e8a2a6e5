"""What keys and values are made of: one row a token, from which both can be computed again (XQuant).

The equations that made the new rows of an attention are walked back to the nearest value that all of them come from
by weights and by the place where they are written: the input of the layer after its norm, mostly. Rows of that value
are stored; keys and values of stored rows are made by the same equations, on T stored rows at a time, as if the program
had been called on them at their place. So rotary angles are those of the rows' own positions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from ..core.interpret import Interpreter
from .axes import Atom, fresh
from .defer import Deferral, Scalar, labels_of
from .expr import Node, is_node, is_rooted, shape_of, walk
from .history import History
from .match import Attention, Read, new_rows

_INLINED = (
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The value that keys and values of one attention are made of.

    Attributes:
      value: of the new rows, as the program has it.
      starts: the integers that say where they are written, as far as keys and values depend on them.
      sizes: of the axes of `value`, as far as they were split.
      order: those axes as batch, token, elements of a row.
      batch, rows, width: B, T, D.
    """

    value: Any
    starts: tuple[Any, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    batch: int
    rows: int
    width: int

    def to_rows(self, x: jax.Array) -> jax.Array:
        """``[B, 1, T, D]``."""
        x = x.reshape(self.sizes).transpose(self.order)
        return x.reshape(self.batch, 1, self.rows, self.width)

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """The value in the program's own shape and dtype."""
        x = rows.reshape([self.sizes[i] for i in self.order]).transpose(np.argsort(self.order))
        return x.reshape(shape_of(self.value)).astype(self.value.dtype)

    def rebuild(self, run: Any, found: Attention, rows: jax.Array) -> list[jax.Array]:
        """Rows ``[B, K, S, H]`` of each stream that `found` reads, from rows ``[B, 1, S, D]`` at 0 to S - 1."""
        b, _, s, d = rows.shape
        n = -(-s // self.rows)
        pad = jnp.pad(rows, ((0, 0), (0, 0), (0, n * self.rows - s), (0, 0)))
        parts = jnp.moveaxis(pad.reshape(b, 1, n, self.rows, d), 2, 0)

        def one(part: jax.Array, start: jax.Array) -> list[jax.Array]:
            known = {id(self.value): self.from_rows(part)}
            for x in self.starts:
                known[id(x)] = start.astype(x.dtype).reshape(shape_of(x))
            values = [again(run, _written(r), known) for r in found.reads]
            return [new_rows(run, r, found.token, v) for r, v in zip(found.reads, values)]

        made = jax.vmap(one)(parts, jnp.arange(n, dtype=jnp.int32) * self.rows)
        joined = [jnp.moveaxis(x, 0, 2) for x in made]
        return [x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :s] for x in joined]


def again(run: Any, value: Any, known: dict[int, Any]) -> Any:
    """`value`, computed again with `known` values (by id) in the place of others."""
    if id(value) in known:
        return known[id(value)]
    made = run.history.of(value)
    if not is_node(value) and (made is None or run.history.is_fixed(value)):
        return value
    inputs = [again(run, x, known) for x in (value.inputs if is_node(value) else made.inputs)]
    if is_node(value):
        out = compat.bind(value.eqn, inputs)[value.out]
    else:
        out = Interpreter.step(run, made.eqn, inputs)[made.out]
    known[id(value)] = out
    return out


def find_source(run: Any, found: Attention) -> Source:
    """Raises LayoutError where keys and values can't be computed again."""
    heads = [_written(r) for r in found.reads]
    if isinstance(found.start, str) or any(x is None or callable(x) for x in heads):
        raise LayoutError("its rows are not written by a `dynamic_update_slice` at one place")
    why = ""
    for value, starts in sorted(_ancestors(run.history, heads), key=lambda pair: _size(pair[0])):
        try:
            _check_starts(run.history, starts, found.start)
            return _laid_out(run, found, value, tuple(starts))
        except LayoutError as error:
            why = why or str(error)
    raise LayoutError(why)


def _written(read: Read) -> Any:
    """The new rows of a stream as the program has them; None where it is read before they are written."""
    return None if read.write is None else read.write.value


def _ancestors(history: History, heads: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Values that all of `heads` come from, the nearest first, each with the other integers that they depend on."""
    front: dict[int, Any] = {}
    integers: dict[int, Any] = {}
    found: list[tuple[Any, list[Any]]] = []

    def add(x: Any) -> None:
        mine = history.integers(x)
        if mine is not None:
            integers.update((id(i), i) for i in mine)
        elif is_node(x) and not is_rooted(x):
            for leaf in {id(v): v for n in walk(x) for v in n.inputs if not is_node(v)}.values():
                add(leaf)
        else:
            front[id(x)] = x

    for head in heads:
        add(head)
    while front:
        if len(front) == 1:
            (only,) = front.values()
            if not is_node(only) and jnp.issubdtype(only.dtype, jnp.floating):
                found.append((only, list(integers.values())))
        ends = [x for x in front.values() if history.of(x) is None]
        if len(ends) > 1 or len(ends) == len(front):
            if not found:
                what = ", ".join(sorted(f"{x.dtype}{list(shape_of(x))}" for x in front.values()))
                raise LayoutError(
                    "its keys and values are not made of one value by weights and positions: there are "
                    f"{what}, which are not known for tokens of other calls"
                )
            break
        last = max((history.made[i] for i in front if i in history.made), key=lambda m: m.order)
        del front[id(last.value)]
        for x in last.inputs:
            add(x)
    return found


def _size(x: Any) -> int:
    return math.prod(shape_of(x))


def _check_starts(history: History, starts: list[Any], start: Any) -> None:
    """Raises where positions come from anything but the place where rows are written."""
    place = _unwrapped(history, start)
    if any(_unwrapped(history, x) is not place for x in starts):
        raise LayoutError(
            "its keys depend on positions that come from another value than the place where they are written"
        )


def _unwrapped(history: History, x: Any) -> Any:
    """The integer behind a start: through casts, layout, and the wrap of negative indices."""
    while True:
        if isinstance(x, Scalar):
            x = x.value
            continue
        made = x if is_node(x) else history.of(x)
        if made is None or made.eqn is None:
            return x
        op = made.eqn.primitive.name
        if op in ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim"):
            x = made.inputs[0]
        elif op == "select_n":
            x = made.inputs[1]  # select_n(i < 0, i, i + size)
        else:
            return x


def _laid_out(run: Any, found: Attention, value: Any, starts: tuple) -> Source:
    """The source with its axes told apart. Raises LayoutError where a row is not made of one token's row."""
    follow = _Follow(run.history, value)
    tokens: list[Atom] = []
    batch: list[Atom] = []
    for read in found.reads:
        node = follow(_written(read))
        assert read.write is not None
        if not is_rooted(node):
            raise LayoutError("its keys or values do not depend on it")
        for dim, theirs in zip(read.write.labels, node.labels):
            atoms = run.axes.resolve(dim)
            if atoms == (found.token,):
                tokens += theirs
            elif atoms and set(atoms) <= set(_batch(read)):
                batch += theirs
    here = [a for dim in follow.axes.labels(labels_of(follow.root)) for a in dim]
    ours = [list(dict.fromkeys(follow.axes.resolve(atoms))) for atoms in (batch, tokens)]
    rest = [a for a in here if a not in ours[0] and a not in ours[1]]
    follow.check(set(ours[1]))
    sizes = [math.prod(a.size for a in atoms) for atoms in ours]
    if sizes != [found.reads[0].batch, found.rows] or not {*ours[0], *ours[1]} <= set(here):
        raise LayoutError("a row of its keys or values is not made of one token's row")
    order = tuple(here.index(a) for a in (*ours[0], *ours[1], *rest))
    width = math.prod(a.size for a in rest)
    axes = tuple(a.size for a in here)
    return Source(value, starts, axes, order, sizes[0], sizes[1], width)


def _batch(read: Any) -> list[Atom]:
    """The axes of the batch among those that batch and heads share."""
    out, left = [], read.batch
    for atom in read.lead:
        if left == 1:
            break
        out.append(atom)
        left //= atom.size
    return out


class _Follow(Deferral):
    """Follows the axes of a value through the equations that were made of it."""

    def __init__(self, history: History, value: Any):
        super().__init__()
        self.history = history
        self.root = Node(shape_of(value), value.dtype, labels=fresh(shape_of(value)))
        self.known: dict[Any, Any] = {id(value): self.root}
        self.steps: list[tuple[compat.Eqn, list[Any], list[Any]]] = []

    def same(self, a: Any, b: Any) -> bool:
        return a is b

    def __call__(self, x: Any) -> Any:
        """A node where `x` depends on the value, else `x`."""
        if id(x) in self.known:
            return self.known[id(x)]
        made = x if is_node(x) else self.history.of(x)
        if made is None or made.eqn is None or self.history.integers(x) is not None:
            return x
        key = (id(made.eqn), *map(id, made.inputs))
        if key not in self.known:
            self.known[key] = self.step(made.eqn, [self(v) for v in made.inputs])
        out = self.known[key][made.out]
        self.known[id(x)] = out if is_rooted(out) else x
        return self.known[id(x)]

    def step(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        if not any(map(is_rooted, values)):
            return [v.aval for v in eqn.outvars]
        if eqn.primitive.name in _INLINED:
            return self.inlined(compat.inner_jaxprs(eqn)[0], values)
        out = self.nodes(eqn, values)
        self.steps.append((eqn, values, out))
        return out

    def inlined(self, jaxpr: Any, values: list[Any]) -> list[Any]:
        body, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip((*body.constvars, *body.invars), (*consts, *values)))
        for eqn in body.eqns:
            env.update(zip(eqn.outvars, self.step(eqn, compat.read(env, eqn.invars))))
        return compat.read(env, body.outvars)

    def check(self, tokens: set[Atom]) -> None:
        """Raises where an equation does not leave the token axis as it is."""
        atoms = lambda node: {a for dim in self.axes.labels(node.labels) for a in dim}
        for eqn, values, out in self.steps:
            kept = all(tokens <= atoms(v) for v in (*filter(is_rooted, values), *out))
            if not kept or (tokens and eqn.primitive.name == "rev"):
                raise LayoutError(f"`{eqn.primitive.name}` mixes tokens")
