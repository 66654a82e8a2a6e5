"""How values came to be: the equation and the operands of everything that a rewriting computes.

Some values are the same in every call: weights, constants, and what is made of them alone. Some depend on nothing else
but integers: masks, rotary angles. `integers` tells both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core import compat
from ..core.program import is_packed
from .expr import is_node, is_rooted, walk


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A computed value (held, so that its id stays its own), its equation, and its place in order."""

    value: Any
    eqn: compat.Eqn
    out: int
    inputs: tuple[Any, ...]
    order: int


class History:
    """See the module; nothing is noted unless it is `kept`."""

    def __init__(self, kept: bool):
        self.kept = kept
        self.made: dict[int, Made] = {}
        self.known: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def of(self, value: Any) -> Made | None:
        return self.made.get(id(value))

    def note(self, eqn: compat.Eqn, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        if not self.kept:
            return
        found = self._union(inputs)
        for i, value in enumerate(results):
            if is_node(value) or id(value) in self.made:
                continue
            self.made[id(value)] = Made(value, eqn, i, tuple(inputs), len(self.made))
            if found is not None and not (found and is_scalar(value)):
                self.known[id(value)] = value, found

    def fix(self, values: Iterable[Any]) -> None:
        """Says that values are the same in every call."""
        if self.kept:
            self.known.update((id(v), (v, ())) for v in values)

    def inherit(self, outer: Sequence[Any], inner: Sequence[Any]) -> None:
        """The operands of an inner program are fixed where those outside are."""
        if self.kept:
            self.fix(y for x, y in zip(outer, inner) if not is_node(y) and self.is_fixed(x))

    def is_fixed(self, x: Any) -> bool:
        """Whether a value is the same in every call."""
        return self.integers(x) == ()

    def integers(self, x: Any) -> tuple[Any, ...] | None:
        """The integers that a value is made of beside what is the same in every call; None where there is more."""
        if is_node(x):
            nodes = walk(x)
            leaves = [v for n in nodes for v in n.inputs if not is_node(v)]
            return None if any(map(is_rooted, nodes)) else self._union(leaves)
        if id(x) in self.known:
            return self.known[id(x)][1]
        if not isinstance(x, jax.Array) and not is_packed(x):
            return ()
        return (x,) if not is_packed(x) and is_scalar(x) else None

    def _union(self, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
        found: dict[int, Any] = {}
        for x in inputs:
            mine = self.integers(x)
            if mine is None:
                return None
            found.update((id(i), i) for i in mine)
        return tuple(found.values())


def is_scalar(x: Any) -> bool:
    """Whether `x` is one integer."""
    return jnp.issubdtype(x.dtype, jnp.integer) and x.size == 1
