"""What stands in for a cache: pytrees that hold its rows compressed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs.static import Static

from ..core.program import Stored
from .method import Method
from .spec import Group


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class KVState(Stored):
    """The compressed caches of one attention, in the place of the first of its leaves.

    Attributes:
      arrays: the buffers; each begins with the stacked axes (layers), then the batch.
      group: the geometry of the caches.
      method: how they are stored.
      guessed: the layout was guessed from names and shapes; the first call decides.
    """

    arrays: Any
    group: Group
    method: Method
    guessed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the leaf that it replaces."""
        return self.group.leaves[0][1]

    @property
    def dtype(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return jnp.dtype(self.group.leaves[0][2])

    @property
    def nbytes(self) -> int:
        """True bytes of the buffers."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.arrays))

    def __repr__(self) -> str:
        g = self.group
        return (
            f"KVState({g.name}: {self.method.name}, {g.layers} x [B={g.batch}, K={g.heads}, S={g.length}], "
            f"{self.nbytes:,} of {g.nbytes:,} bytes)"
        )

    @functools.cached_property
    def _static(self) -> Static:
        return Static((self.group, self.method, self.guessed))

    def tree_flatten(self):
        return (self.arrays,), self._static

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("arrays"), self.arrays)], self._static

    @classmethod
    def tree_unflatten(cls, aux, children) -> KVState:
        state = cls(children[0], *aux.value)
        state.__dict__["_static"] = aux
        return state


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Moved(Stored):
    """In the place of a cache's other leaves: their rows are in the `KVState` at path `to`."""

    to: str
    shape: tuple[int, ...]
    dtype: Any

    nbytes = 0

    def tree_flatten(self):
        return (), (self.to, self.shape, self.dtype)

    def tree_flatten_with_keys(self):
        return [], (self.to, self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Moved:
        return cls(*aux)


def is_state(x: Any) -> bool:
    return isinstance(x, (KVState, Moved))
