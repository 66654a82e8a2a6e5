"""Rows of a cache as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..codecs import RowCodec


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows ``[B, K, S, H]``.

    Attributes:
      parts: of the codec, each ``[B, K, S / block, ...]``.
      codec: how rows are stored.
      width: H.
    """

    parts: Any
    codec: RowCodec
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = jax.tree.leaves(self.parts)[0]
        return (*first.shape[:2], first.shape[2] * self.codec.block, self.width)

    @property
    def heads(self) -> int:
        return self.shape[1]

    @property
    def tokens(self) -> int:
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """True bytes of the parts."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.parts))

    def decode(self) -> jax.Array:
        """``f32[B, K, S, H]``."""
        return self.codec.decode(self.parts, self.width)

    def tree_flatten(self):
        return (self.parts,), (self.codec, self.width)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Rows:
        return cls(children[0], *aux)


class FullRows(NamedTuple):
    """Rows that are attended to as they are: sinks, or the newest tokens, or the new one.

    Attributes:
      keys, values: ``[B, K, E, H]``, float.
      seen: which of them are there: ``bool[B, E]`` or ``bool[B, K, E]``.
    """

    keys: jax.Array
    values: jax.Array
    seen: jax.Array


def heads_of(
    keys: Rows, lengths: jax.Array, seen: jax.Array | None, full: Sequence[FullRows]
) -> int:
    """Heads of the cache: those of its packed rows, or of all else where these are one pool for them."""
    if keys.heads > 1:
        return keys.heads
    by_head = [x for x, least in ((lengths, 2), (seen, 3)) if x is not None and x.ndim == least]
    return max([1, *(x.shape[1] for x in (*by_head, *(part.keys for part in full)))])


def pack_rows(x: jax.Array, codec: RowCodec) -> Rows:
    """Stores ``[B, K, S, H]``, S a multiple of the codec's block."""
    return Rows(codec.encode(x.astype(jnp.float32)), codec, x.shape[-1])
