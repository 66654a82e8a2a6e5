"""GGUF block types: fixed blocks of bytes, exactly as they lie in a file.

The one part is ``blocks: uint8[*lead, n_blocks * block_bytes]``, so a file's bytes are a tensor's
parts without any conversion (`BlockCodec.from_bytes`). Decoding gives the numbers of
`gguf.quants.dequantize` bit by bit.

Source: the block structs and reference quantizers of ggml, as implemented by the `gguf` package.
"""

from __future__ import annotations

import abc
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .base import Codec, Parts
from .check import is_concrete, validate

_NIBBLES = np.array([[0], [4]], np.uint8)


class BlockCodec(Codec):
    """A GGUF block type.

    Attributes:
      block: elements of a block; the encoded axis must be a multiple.
      block_bytes: bytes of a block.
    """

    block: ClassVar[int]
    block_bytes: ClassVar[int]

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abc.abstractmethod
    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        """``uint8[..., block_bytes]`` to float32 ``[..., block]``."""

    @abc.abstractmethod
    def encode_blocks(self, x: jax.Array) -> jax.Array:
        """Float32 ``[..., block]`` to ``uint8[..., block_bytes]``."""

    def encode(self, x: jax.Array, *, batch_dims: int = 0) -> Parts:
        x = jnp.asarray(x)
        validate(x, batch_dims=batch_dims)
        self._check_length(x.shape[-1])
        parts, finite, nonzero = _encode(self, x)
        if is_concrete(x):
            self._check_range(x, bool(finite), bool(nonzero))
        return parts

    def decode(self, parts: Parts, length: int) -> jax.Array:
        raw = parts["blocks"]
        blocks = raw.reshape(*raw.shape[:-1], -1, self.block_bytes)
        return self.decode_blocks(blocks).reshape(*raw.shape[:-1], length)

    def from_bytes(self, raw: np.ndarray | bytes, shape: tuple[int, ...]) -> Parts:
        """The parts of a tensor of storage shape `shape` from the bytes of a file.

        Args:
          raw: bytes, or a ``uint8`` array of any shape; copied.
          shape: ``[*lead, length]`` in elements, slowest axis first (GGUF's `ne` reversed).

        Raises:
          ValueError: if `raw` has not exactly the bytes that `shape` takes.
        """
        data = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else np.asarray(raw)
        if data.dtype != np.uint8:
            raise ValueError(f"`raw` has dtype {data.dtype}; expected uint8, the bytes of the file")
        self._check_length(shape[-1])
        lead, row = shape[:-1], shape[-1] // self.block * self.block_bytes
        if data.size != math.prod(lead) * row:
            raise ValueError(
                f"`raw` has {data.size} bytes; {self.name} of shape {tuple(shape)} takes"
                f" {math.prod(lead) * row}: the file is truncated or its shape or type is another"
            )
        return {"blocks": jnp.array(data.reshape(*lead, row))}

    def _check_length(self, length: int) -> None:
        if length % self.block or not length:
            raise ValueError(
                f"`length` of the encoded axis is {length}; {self.name} stores blocks of"
                f" {self.block} and needs a multiple of it: choose a codec with a smaller block"
                " (q8_0, q4_0: 32) or one that takes any length (int8, int4-g64)"
            )

    def _check_range(self, x: jax.Array, finite: bool, nonzero: bool) -> None:
        if finite and (nonzero or not bool(jnp.any(x != 0))):
            return
        largest = float(jnp.max(jnp.abs(x.astype(jnp.float32))))
        raise ValueError(
            f"the float16 scales of {self.name} {'underflow' if finite else 'overflow'}: `x`"
            f" reaches {largest:.3g}. Scale the tensor first or use a codec with float32 scales"
            " (int8-f32, int4-g64-f32)"
        )


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: BlockCodec, x: jax.Array) -> tuple[Parts, jax.Array, jax.Array]:
    """The parts of `x`, whether all that they decode to is finite, whether any of it is not 0."""
    blocks = codec.encode_blocks(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, codec.block))
    stored = codec.decode_blocks(blocks)
    parts = {"blocks": blocks.reshape(*x.shape[:-1], -1)}
    return parts, jnp.isfinite(stored).all(), jnp.any(stored != 0)


def f16_at(blocks: jax.Array, start: int) -> jax.Array:
    """The float16 at byte `start` of each block, as float32 ``[..., 1]``."""
    half = lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)
    return half.astype(jnp.float32)[..., None]


def f16_bytes(x: jax.Array) -> jax.Array:
    """Float32 ``[..., 1]`` as the two bytes of a float16, ``uint8[..., 2]``."""
    return lax.bitcast_convert_type(x.squeeze(-1).astype(jnp.float16), jnp.uint8)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """``uint8[..., n]`` to ``[..., 2 * n]``: all low nibbles, then all high ones."""
    nibbles = (packed[..., None, :] >> _NIBBLES) & 15
    return nibbles.reshape(*packed.shape[:-1], -1)


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Undoes `unpack_nibbles`; bits above the fourth are dropped."""
    low, high = jnp.split(codes & 15, 2, axis=-1)
    return low | (high << 4)


def reciprocal(d: jax.Array) -> jax.Array:
    """``1 / d``, and 0 where that is infinite."""
    inverse = 1 / jnp.where(d == 0, 1.0, d)
    return jnp.where((d == 0) | jnp.isinf(inverse), 0.0, inverse)


def extreme(x: jax.Array) -> jax.Array:
    """The first value of largest magnitude on the last axis, ``[..., 1]``, with its sign."""
    at = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.take_along_axis(x, at, axis=-1)
