"""What a codec is: how a tensor is stored, byte by byte.

A codec sees a tensor as *storage*: ``[*lead, length]``. The last axis is the encoded one (groups
of weights that share a scale lie along it: the contracted axis of a matmul); every leading axis is
kept as an axis of every part, so parts can be sliced, gathered and scanned like the tensor itself.
A part whose value is shared along a leading axis keeps that axis with size 1.

Letters: ``length`` is the number of elements on the encoded axis, ``group`` the number of elements
one scale covers, ``n_groups = ceil(length / group)``.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

Parts = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """How a tensor is stored. Frozen and hashable: a codec is static data, never a JAX array."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The canonical spec, for example ``int4-g64``; ``codecs.get(codec.name) == codec``."""

    @abc.abstractmethod
    def encode(self, x: jax.Array, *, batch_dims: int = 0) -> Parts:
        """Stores `x`.

        Args:
          x: float array ``[*lead, length]``; computed on in float32.
          batch_dims: how many of the leading axes are batch axes (stacked layers, experts). Only
            codecs with a scale for a whole tensor care: they keep one for each batch entry.

        Returns:
          The parts, each ``[*lead, n]`` (a leading axis may be 1 where the part is shared along
          it).
        """

    @abc.abstractmethod
    def decode(self, parts: Parts, length: int) -> jax.Array:
        """Gives back the stored values as float32 ``[*lead, length]``."""

    def part_shapes(
        self, shape: tuple[int, ...], *, batch_dims: int = 0
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parts of a tensor of storage `shape`; nothing is computed."""
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(lambda y: self.encode(y, batch_dims=batch_dims), x)

    def nbytes(self, shape: tuple[int, ...], *, batch_dims: int = 0) -> int:
        """True bytes of a tensor of storage `shape`: codes, scales, zero points, all of it."""
        parts = self.part_shapes(shape, batch_dims=batch_dims)
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in parts.values())

    def bits_per_weight(self, shape: tuple[int, ...], *, batch_dims: int = 0) -> float:
        """Bits of storage for each element of a tensor of storage `shape`, scales counted."""
        return 8 * self.nbytes(shape, batch_dims=batch_dims) / math.prod(shape)
