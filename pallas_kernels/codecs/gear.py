"""GEAR (https://arxiv.org/abs/2403.05527): few bits, plus what they miss as a low-rank and a sparse part.

A block of rows ``[n, D]`` is stored as the extreme entries of each channel (or token) in 16 bits, a low-bit code of the
rest, and a rank-`rank` approximation of what that misses. Written from the paper; the low-rank part is made by power
iteration, and is that of one block of tokens (the paper's streaming buffer).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .base import Parts
from .rows import PerChannel, RowCodec

ROUNDS = 3  # of power iteration


@dataclasses.dataclass(frozen=True)
class Gear(RowCodec):
    """See the module.

    Attributes:
      inner: the low-bit code; per channel for keys, per token for values.
      rank: of the low-rank part.
      outliers: share of the entries that are stored apart, half of them the greatest and half the least.
      tokens: rows of a block, a multiple of the inner codec's.
    """

    inner: RowCodec
    rank: int = 4
    outliers: float = 0.02
    tokens: int = 64

    def __post_init__(self) -> None:
        if self.tokens % self.inner.block:
            raise ValueError(
                f"`tokens` is {self.tokens}; expected a multiple of the inner codec's {self.inner.block}"
            )
        if self.rank < 1 or not 0 <= self.outliers < 1:
            raise ValueError(
                f"`rank` is {self.rank} and `outliers` is {self.outliers}; expected 1 or more, and a share below 1"
            )

    @property
    def name(self) -> str:
        return f"gear({self.inner.name}, rank {self.rank}, {100 * self.outliers:g}% apart)"

    @property
    def block(self) -> int:
        return self.tokens

    @property
    def by_channel(self) -> bool:
        return isinstance(self.inner, PerChannel)

    def encode(self, rows: jax.Array) -> Parts:
        *lead, t, d = rows.shape
        x = rows.astype(jnp.float32).reshape(*lead, t // self.tokens, self.tokens, d)
        apart, values, places = self._outliers(x)
        rest = x - apart
        codes = self.inner.encode(rest)
        left, right = low_rank(rest - self.inner.decode(codes, d), self.rank)
        half = lambda v: v.astype(jnp.float16)
        fold = {f"code_{k}": v.reshape(*x.shape[:-2], -1) for k, v in codes.items()}
        return fold | {
            "apart": half(values),
            "place": places,
            "left": half(left),
            "right": half(right),
        }

    def decode(self, parts: Parts, width: int) -> jax.Array:
        lead = parts["left"].shape[:-2]
        shape = (*lead, self.tokens, width)
        like = self.inner.part_shapes(shape)
        codes = {k: parts[f"code_{k}"].reshape(s.shape) for k, s in like.items()}
        x = self.inner.decode(codes, width)
        full = lambda name: parts[name].astype(jnp.float32)
        x = x + jnp.einsum("...nr,...dr->...nd", full("left"), full("right"))
        x = x + self._scatter(full("apart"), parts["place"], shape)
        return x.reshape(*lead[:-1], -1, width)

    def _count(self, length: int) -> int:
        """Entries of a vector that are stored apart at each end."""
        return (
            round(self.outliers * length / 2)
            if self.outliers == 0
            else max(1, round(self.outliers * length / 2))
        )

    def _outliers(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The extreme entries in their places, their values and places ``[..., vectors, 2 * count]``."""
        y = x.swapaxes(-1, -2) if self.by_channel else x
        n = self._count(y.shape[-1])
        high, at_high = jax.lax.top_k(y, n)
        low, at_low = jax.lax.top_k(-y, n)
        values = jnp.concatenate([high, -low], axis=-1).astype(jnp.float16)
        places = jnp.concatenate([at_high, at_low], axis=-1).astype(jnp.uint8)
        return self._scatter(values.astype(jnp.float32), places, x.shape), values, places

    def _scatter(self, values: jax.Array, places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        length = shape[-2] if self.by_channel else shape[-1]
        hot = places[..., None] == jnp.arange(length, dtype=jnp.uint8)
        x = jnp.where(hot, values[..., None], 0.0).sum(-2)
        return x.swapaxes(-1, -2) if self.by_channel else x


def low_rank(x: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """``left [..., n, rank]`` and ``right [..., d, rank]`` with ``left @ right.T`` near `x`; power iteration."""
    right = jax.random.normal(jax.random.key(0), (x.shape[-1], rank))
    left = x @ right
    for _ in range(ROUNDS):
        left = _orthonormal(left)
        right = x.swapaxes(-1, -2) @ left
        left = x @ _orthonormal(right)
    left = _orthonormal(left)
    return left, x.swapaxes(-1, -2) @ left


def _orthonormal(x: jax.Array) -> jax.Array:
    """Gram-Schmidt on the columns; zero columns stay zero."""
    columns: list[jax.Array] = []
    for i in range(x.shape[-1]):
        v = x[..., i]
        for u in columns:
            v = v - (u * v).sum(-1, keepdims=True) * u
        norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
        columns.append(jnp.where(norm > 1e-12, v / jnp.maximum(norm, 1e-12), 0.0))
    return jnp.stack(columns, axis=-1)
