"""The GGUF types with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

Encoding gives the bytes of `gguf.quants.quantize`: codes are found with the scale before it is
rounded to float16, and with a product by its reciprocal. One byte may differ: a
minimum of zero is stored without its sign, which in the package depends on the order of the data.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .blocks import (
    BlockCodec,
    extreme,
    f16_at,
    f16_bytes,
    pack_nibbles,
    reciprocal,
    unpack_nibbles,
)

_BITS = np.arange(8, dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Q4_0(BlockCodec):
    """``d * (code - 8)``: float16 `d`, 16 bytes of codes."""

    block, block_bytes = 32, 18

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        return f16_at(blocks, 0) * (unpack_nibbles(blocks[..., 2:]).astype(jnp.float32) - 8)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, d = _signed_codes(x, 8)
        return jnp.concatenate([f16_bytes(d), pack_nibbles(codes)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q4_1(BlockCodec):
    """``d * code + m``: float16 `d` and `m`, 16 bytes of codes."""

    block, block_bytes = 32, 20

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        codes = unpack_nibbles(blocks[..., 4:]).astype(jnp.float32)
        return f16_at(blocks, 0) * codes + f16_at(blocks, 2)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, d, m = _offset_codes(x, 15)
        return jnp.concatenate([f16_bytes(d), f16_bytes(m), pack_nibbles(codes)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q5_0(BlockCodec):
    """``d * (code - 16)``: float16 `d`, 4 bytes of fifth bits, 16 bytes of low bits."""

    block, block_bytes = 32, 22

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        codes = unpack_nibbles(blocks[..., 6:]) | (_unpack_bits(blocks[..., 2:6]) << 4)
        return f16_at(blocks, 0) * (codes.astype(jnp.float32) - 16)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, d = _signed_codes(x, 16)
        fifth = _pack_bits(codes >> 4)
        return jnp.concatenate([f16_bytes(d), fifth, pack_nibbles(codes)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q5_1(BlockCodec):
    """``d * code + m``: float16 `d` and `m`, 4 bytes of fifth bits, 16 bytes of low bits."""

    block, block_bytes = 32, 24

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        codes = unpack_nibbles(blocks[..., 8:]) | (_unpack_bits(blocks[..., 4:8]) << 4)
        return f16_at(blocks, 0) * codes.astype(jnp.float32) + f16_at(blocks, 2)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, d, m = _offset_codes(x, 31)
        parts = [f16_bytes(d), f16_bytes(m), _pack_bits(codes >> 4), pack_nibbles(codes)]
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class Q8_0(BlockCodec):
    """``d * code``: float16 `d`, 32 signed bytes."""

    block, block_bytes = 32, 34

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        codes = lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
        return codes.astype(jnp.float32) * f16_at(blocks, 0)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        d = _divide(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 127)
        codes = _round_away(x * reciprocal(d)).astype(jnp.int8)
        return jnp.concatenate([f16_bytes(d), lax.bitcast_convert_type(codes, jnp.uint8)], axis=-1)


def _signed_codes(x: jax.Array, middle: int) -> tuple[jax.Array, jax.Array]:
    """Codes around `middle` and the scale that maps the extreme value to ``-middle``."""
    d = extreme(x) / -middle
    return _truncate(x, reciprocal(d), middle + 0.5, 2 * middle - 1), d


def _offset_codes(x: jax.Array, last: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes from the minimum at 0 to the maximum at `last`, the scale and the minimum."""
    low = jnp.min(x, axis=-1, keepdims=True)
    low = jnp.where(low == 0, 0.0, low)  # of 0.0 and -0.0 either may be the minimum
    d = _divide(jnp.max(x, axis=-1, keepdims=True) - low, last)
    return _truncate(x - low, reciprocal(d), 0.5, last), d, low


def _truncate(x: jax.Array, inverse: jax.Array, offset: float, last: int) -> jax.Array:
    # the barrier keeps XLA from fusing product and sum, which rounds otherwise than the reference
    level = lax.optimization_barrier(x * inverse) + offset
    return jnp.clip(jnp.trunc(level), 0, last).astype(jnp.uint8)


def _divide(x: jax.Array, by: int) -> jax.Array:
    # the barrier keeps XLA from multiplying with the rounded reciprocal of a constant
    return x / lax.optimization_barrier(jnp.float32(by))


def _round_away(x: jax.Array) -> jax.Array:
    """To the nearest integer, ties away from zero."""
    size = jnp.abs(x)
    whole = jnp.floor(size)
    return jnp.sign(x) * (whole + jnp.floor(2 * (size - whole)))


def _unpack_bits(packed: jax.Array) -> jax.Array:
    bits = (packed[..., None] >> _BITS) & 1
    return bits.reshape(*packed.shape[:-1], -1)


def _pack_bits(bits: jax.Array) -> jax.Array:
    bits = bits.reshape(*bits.shape[:-1], -1, 8)
    return jnp.sum(bits << _BITS, axis=-1, dtype=jnp.uint8)
