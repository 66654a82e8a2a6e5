"""Deferred values: what the interpreter holds instead of an array while it follows a cache.

A `Node` is an equation that was not run. Two kinds are deferred: what depends on a KV cache (it has `labels`), so that
attention can be seen whole before anything is emitted; and index arithmetic over the token axis (iotas,
comparisons, masks), so that a mask can be evaluated at the positions that a compressed cache holds. Running the
equations as they are (`Interpreter.array`) is always possible and always right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import compat
from .axes import Atom, Labels, fresh


@dataclasses.dataclass(eq=False)
class Node:
    """An equation's result, not computed.

    Attributes:
      shape, dtype: of the result.
      eqn: the equation; None for a cache itself.
      inputs: its operands, nodes or arrays.
      out: which of the equation's results.
      labels: axes, where it depends on a cache.
      view: the `View` of a cache that it is, where it is nothing but that; else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    eqn: compat.Eqn | None = None
    inputs: tuple[Any, ...] = ()
    out: int = 0
    labels: Labels | None = None
    view: Any = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def op(self) -> str:
        return self.eqn.primitive.name if self.eqn is not None else "cache"


@dataclasses.dataclass(frozen=True, eq=False)
class Write:
    """An update of a cache that has not been carried out.

    Attributes:
      kind: "rows" (at given positions), "grow" (concatenated), "roll" (shifted and concatenated).
      labels: axes of the cache where it is updated.
      value: the new rows, as an array or a function that gives it.
      sizes: the shape of `value`; as `labels`, but for the token axis and fixed axes.
      starts: for each dimension the index where it is written; None for a whole dimension.
      dim: the token dimension, where the kind tells.
      view: the part of the cache that is updated.
      grown: the token axis after a concatenation.
    """

    kind: str
    labels: Labels
    value: Any
    sizes: tuple[int, ...]
    starts: tuple[Any, ...]
    view: View
    grown: Atom | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A part of a cache, laid out by layout ops, with pending writes.

    Attributes:
      cell: the cache.
      fixed: axes of which one entry was taken, and its index.
      subs: axes of which a slice was taken.
      writes: what was written to the cache, in order.
      turned: an axis that was rotated, and by how many entries: entry i was i + n before.
    """

    cell: Cell
    fixed: tuple[tuple[Atom, Any], ...] = ()
    subs: tuple[Atom, ...] = ()
    writes: tuple[Write, ...] = ()
    turned: tuple[Atom, int] | None = None

    @property
    def done(self) -> bool:
        """Whether an inner program has updated it, and the update is carried out."""
        return DONE in self.writes

    def fix(self, atom: Atom, index: Any) -> View:
        return dataclasses.replace(self, fixed=(*self.fixed, (atom, index)))


class Cell:
    """One cache array while a program runs.

    Attributes:
      name: path of the leaf.
      shape, dtype: as the program sees it here (a scan over layers has taken its axis).
      labels: its axes.
      stack: sizes of the axes that scans took, outermost first.
      store: what holds its rows; shared by the cells of one attention.
      pages: where it is a paged pool, how it is a cache (see `paged.py`).
    """

    def __init__(self, name: str, shape: Any, dtype: Any, stack: tuple[int, ...], store: Any):
        self.name, self.shape, self.dtype = name, tuple(shape), jnp.dtype(dtype)
        self.stack, self.store = stack, store
        self.labels = fresh(self.shape)
        self.subs: dict[tuple[Atom, int, int], Atom] = {}
        self.pages: Any = None

    @property
    def rows(self) -> Labels:
        """Its axes as those of a cache: of a paged pool, batch and tokens."""
        return self.labels if self.pages is None else self.pages.labels(self.labels)

    def node(self, writes: tuple[Write, ...] = ()) -> Node:
        view = View(self, writes=writes)
        return Node(self.shape, self.dtype, labels=self.labels, view=view)

    def sub(self, atom: Atom, start: int, size: int) -> Atom:
        """The slice of an axis; the same atom each time."""
        key = (atom, start, size)
        if key not in self.subs:
            self.subs[key] = Atom(size, parent=atom, start=start)
        return self.subs[key]


DONE = Write("done", (), None, (), (), View(None))  # type: ignore[arg-type]


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


def is_rooted(x: Any) -> bool:
    """Whether a value depends on a cache."""
    return isinstance(x, Node) and x.labels is not None


def walk(node: Node) -> list[Node]:
    """Every node that `node` depends on, itself first, each once."""
    seen: dict[int, Node] = {}
    todo = [node]
    while todo:
        n = todo.pop()
        if id(n) not in seen:
            seen[id(n)] = n
            todo += [x for x in n.inputs if is_node(x)]
    return list(seen.values())


def shape_of(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if is_node(x) else tuple(np.shape(x))


def aval(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape_of(x), x.dtype if hasattr(x, "dtype") else jnp.result_type(x))
