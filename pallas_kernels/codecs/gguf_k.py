"""The GGUF types with blocks of 256 whose scales are quantized too: Q4_K, Q5_K and Q6_K.

The encoders are ours (the `gguf` package has none, and ggml's search for scales): every sub-block
gets the scale of its range, scales are rounded to the nearest multiple of the block's, and codes
are the nearest levels. Beyond half a step, an end of a sub-block's range may so lose half a step
of its scale.
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
    unpack_nibbles,
)
from .grouped import nonzero, round_scale

_BITS = np.arange(8, dtype=np.uint8)[:, None]
_PAIRS = np.array([[0], [2], [4], [6]], np.uint8)


@dataclasses.dataclass(frozen=True)
class Q4_K(BlockCodec):
    """``d * scale * code - dmin * min`` in 8 sub-blocks of 32.

    Bytes: float16 `d` and `dmin`, 12 bytes of 6-bit scales and mins, 128 bytes of codes.
    """

    block, block_bytes = 256, 144

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        step, low = _load_scales(blocks)
        codes = unpack_nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32))
        return _affine(codes.reshape(*blocks.shape[:-1], 8, 32), step, low)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, scales = _fit_scales(x.reshape(*x.shape[:-1], 8, 32), 15)
        low = pack_nibbles(codes.reshape(*x.shape[:-1], 4, 64))
        return jnp.concatenate([scales, low.reshape(*x.shape[:-1], 128)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q5_K(BlockCodec):
    """As `Q4_K`, with 32 bytes of fifth bits before the codes: bit `i` belongs to sub-block `i`."""

    block, block_bytes = 256, 176

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        step, low = _load_scales(blocks)
        codes = unpack_nibbles(blocks[..., 48:].reshape(*blocks.shape[:-1], 4, 32))
        fifth = (blocks[..., None, 16:48] >> _BITS) & 1
        return _affine(codes.reshape(*blocks.shape[:-1], 8, 32) | (fifth << 4), step, low)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        codes, scales = _fit_scales(x.reshape(*x.shape[:-1], 8, 32), 31)
        fifth = jnp.sum((codes >> 4) << _BITS, axis=-2, dtype=jnp.uint8)
        low = pack_nibbles(codes.reshape(*x.shape[:-1], 4, 64))
        return jnp.concatenate([scales, fifth, low.reshape(*x.shape[:-1], 128)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q6_K(BlockCodec):
    """``d * scale * (code - 32)`` in 16 sub-blocks of 16.

    Bytes: 128 of low nibbles, 64 of upper pairs of bits, 16 signed scales, float16 `d`.
    """

    block, block_bytes = 256, 210

    def decode_blocks(self, blocks: jax.Array) -> jax.Array:
        lead = blocks.shape[:-1]
        scales = lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
        step = lax.optimization_barrier(f16_at(blocks, 208) * scales)
        low = unpack_nibbles(blocks[..., :128].reshape(*lead, 2, 64))
        high = (blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> _PAIRS) & 3
        codes = low.reshape(*lead, 256) | (high.reshape(*lead, 256) << 4)
        levels = codes.astype(jnp.float32).reshape(*lead, 16, 16) - 32
        return (step[..., None] * levels).reshape(*lead, 256)

    def encode_blocks(self, x: jax.Array) -> jax.Array:
        lead, groups = x.shape[:-1], x.reshape(*x.shape[:-1], 16, 16)
        ideal = extreme(groups).squeeze(-1) / -32
        d = round_scale(extreme(ideal) / -128, "f16")
        scales = jnp.clip(jnp.round(ideal / nonzero(d)), -128, 127)
        levels = jnp.round(groups / nonzero(d * scales)[..., None])
        codes = (jnp.clip(levels, -32, 31) + 32).astype(jnp.uint8).reshape(*lead, 2, 128)
        low = pack_nibbles(codes).reshape(*lead, 128)
        pairs = (codes >> 4).reshape(*lead, 2, 4, 32) << _PAIRS
        high = jnp.sum(pairs, axis=-2, dtype=jnp.uint8).reshape(*lead, 64)
        scale_bytes = lax.bitcast_convert_type(scales.astype(jnp.int8), jnp.uint8)
        return jnp.concatenate([low, high, scale_bytes, f16_bytes(d)], axis=-1)


def _load_scales(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and offset of each sub-block of Q4_K and Q5_K, each float32 ``[..., 8, 1]``."""
    scales, mins, upper = jnp.split(blocks[..., 4:16], 3, axis=-1)
    scale = jnp.concatenate([scales & 63, (upper & 15) | ((scales >> 2) & 48)], axis=-1)
    low = jnp.concatenate([mins & 63, (upper >> 4) | ((mins >> 2) & 48)], axis=-1)
    step = f16_at(blocks, 0) * scale.astype(jnp.float32)
    offset = f16_at(blocks, 2) * low.astype(jnp.float32)
    # without the barrier XLA unpacks the scales again for every weight, seven times as slow
    return lax.optimization_barrier((step[..., None], offset[..., None]))


def _affine(codes: jax.Array, step: jax.Array, low: jax.Array) -> jax.Array:
    return (step * codes.astype(jnp.float32) - low).reshape(*codes.shape[:-2], -1)


def _fit_scales(groups: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
    """Codes ``uint8[..., 8, 32]`` of float32 `groups`, and the 16 bytes that hold their scales."""
    low = -jnp.minimum(jnp.min(groups, axis=-1), 0)
    range_ = jnp.maximum(jnp.max(groups, axis=-1), 0) + low
    d, scale = _quantize_six(range_ / last)
    dmin, offset = _quantize_six(low)
    shifted = groups + (dmin * offset)[..., None]
    levels = jnp.round(shifted / nonzero(d * scale)[..., None])
    codes = jnp.clip(levels, 0, last).astype(jnp.uint8)
    codes = jnp.where((scale == 0)[..., None], 0, codes)
    scale_bytes = _pack_six(scale.astype(jnp.uint8), offset.astype(jnp.uint8))
    return codes, jnp.concatenate([f16_bytes(d), f16_bytes(dmin), scale_bytes], axis=-1)


def _quantize_six(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Non-negative ``[..., 8]`` as a float16 unit ``[..., 1]`` times integers of 6 bits."""
    unit = round_scale(jnp.max(x, axis=-1, keepdims=True) / 63, "f16")
    return unit, jnp.clip(jnp.round(x / nonzero(unit)), 0, 63) * (unit != 0)


def _pack_six(scale: jax.Array, low: jax.Array) -> jax.Array:
    """Two ``uint8[..., 8]`` of 6 bits in 12 bytes: the last four lend their upper bits."""
    scales = scale[..., :4] | ((scale[..., 4:] >> 4) << 6)
    mins = low[..., :4] | ((low[..., 4:] >> 4) << 6)
    upper = (scale[..., 4:] & 15) | ((low[..., 4:] & 15) << 4)
    return jnp.concatenate([scales, mins, upper], axis=-1)
