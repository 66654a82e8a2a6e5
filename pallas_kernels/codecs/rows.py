"""How rows of a KV cache are stored: a codec, and what one of its groups covers.

Rows are ``[..., T, D]``: T tokens, D elements each. `PerToken` groups along the row, `PerChannel` groups the same
element of `block` consecutive tokens (KIVI's keys: channels have outliers that stay in their channel). Every part
keeps the leading axes and has ``T / block`` entries next, so that a cache is written block by block.
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .base import Codec, Parts
from .table import get


@dataclasses.dataclass(frozen=True)
class RowCodec(abc.ABC):
    """How rows are stored. Frozen and hashable.

    Attributes:
      block: tokens that are encoded together.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    def block(self) -> int:
        return 1

    @abc.abstractmethod
    def encode(self, rows: jax.Array) -> Parts:
        """Stores ``f32[..., T, D]``, T a multiple of `block`; parts are ``[..., T / block, ...]``."""

    @abc.abstractmethod
    def decode(self, parts: Parts, width: int) -> jax.Array:
        """The stored rows, ``f32[..., T, D]`` with D = `width`."""

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the parts of rows ``[..., T, D]`` of `shape`; T may be 0."""
        *lead, tokens, width = shape
        one = jax.ShapeDtypeStruct((*lead, max(tokens, self.block), width), jnp.float32)
        parts = jax.eval_shape(self.encode, one)
        if tokens:
            return parts
        at = len(lead)
        empty = lambda s: jax.ShapeDtypeStruct((*s.shape[:at], 0, *s.shape[at + 1 :]), s.dtype)
        return {name: empty(s) for name, s in parts.items()}


@dataclasses.dataclass(frozen=True)
class PerToken(RowCodec):
    """Each row by itself, in groups along it.

    Attributes:
      codec: stores one row.
      rotate: rows are turned by a Hadamard matrix first, which spreads outliers over the row (QuaRot,
        https://arxiv.org/abs/2404.00456); decoding turns them back.
    """

    codec: Codec
    rotate: bool = False

    @property
    def name(self) -> str:
        return ("hadamard " if self.rotate else "") + self.codec.name

    def encode(self, rows: jax.Array) -> Parts:
        return self.codec.encode(hadamard(rows) if self.rotate else rows)

    def decode(self, parts: Parts, width: int) -> jax.Array:
        rows = self.codec.decode(parts, width)
        return hadamard(rows) if self.rotate else rows


@dataclasses.dataclass(frozen=True)
class PerChannel(RowCodec):
    """Each channel of `tokens` consecutive rows, in groups along the tokens (KIVI, https://arxiv.org/abs/2402.02750)."""

    codec: Codec
    tokens: int = 32

    @property
    def name(self) -> str:
        return f"{self.codec.name} per channel of {self.tokens} tokens"

    @property
    def block(self) -> int:
        return self.tokens

    def encode(self, rows: jax.Array) -> Parts:
        *lead, t, d = rows.shape
        return self.codec.encode(
            rows.reshape(*lead, t // self.tokens, self.tokens, d).swapaxes(-1, -2)
        )

    def decode(self, parts: Parts, width: int) -> jax.Array:
        blocks = self.codec.decode(parts, self.tokens).swapaxes(-1, -2)
        *lead, n, t, d = blocks.shape
        return blocks.reshape(*lead, n * t, d)


def per_token(spec: str | Codec, *, rotate: bool = False) -> PerToken:
    """`PerToken` by the name of a codec."""
    return PerToken(get(spec), rotate)


def per_channel(spec: str, tokens: int = 32) -> PerChannel:
    """`PerChannel` by the name of a codec, one group for a block."""
    return PerChannel(get(spec), tokens)


def hadamard(x: jax.Array) -> jax.Array:
    """``x @ H`` with the orthonormal, symmetric Hadamard matrix of the last axis (its own inverse).

    Where the axis is no power of two, its pieces of the largest power of two that divides it are turned.
    """
    width = x.shape[-1]
    size = width & -width
    matrix = jnp.asarray(_matrix(size), x.dtype)
    y = x.reshape(*x.shape[:-1], width // size, size)
    return jnp.matmul(y, matrix, precision="highest").reshape(x.shape)


def hadamard_matrix(width: int) -> np.ndarray:
    """The matrix of `hadamard` for rows of `width`: ``f32[width, width]``."""
    size = width & -width
    return np.kron(np.eye(width // size, dtype=np.float32), _matrix(size))


@functools.cache
def _matrix(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(size)).astype(np.float32)
