"""Codes of 1 to 8 bits packed densely in bytes, without a float round trip.

A width that divides 8 is one *plane*: code `i` sits in byte ``i // (8 // width)``, low bits first.
The other widths are split into such planes, high bits first (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 =
4 + 2 + 1), and the planes' bytes follow each other. Unpacking is shifts and masks on any backend.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of `length` codes of `bits` bits: each plane is padded to a whole byte."""
    return sum(math.ceil(length * width / 8) for width in PLANES[bits])


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Packs ``uint8[..., length]`` codes below ``2**bits`` into ``uint8[..., packed_bytes]``."""
    planes, shift = [], bits
    for width in PLANES[bits]:
        shift -= width
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=-1)


def unpack_bits(packed: jax.Array, bits: int, length: int) -> jax.Array:
    """The ``uint8[..., length]`` codes that `pack_bits` packed."""
    codes, start, shift = None, 0, bits
    for width in PLANES[bits]:
        shift -= width
        stop = start + math.ceil(length * width / 8)
        plane = _unpack_plane(packed[..., start:stop], width, length) << shift
        codes, start = plane if codes is None else codes | plane, stop
    assert codes is not None
    return codes


def _pack_plane(codes: jax.Array, width: int) -> jax.Array:
    count = 8 // width  # codes in a byte
    if count == 1:
        return codes.astype(jnp.uint8)
    pad = -codes.shape[-1] % count
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)])
    codes = codes.reshape(*codes.shape[:-1], -1, count).astype(jnp.uint8)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    return jnp.sum(codes << shifts, axis=-1, dtype=jnp.uint8)


def _unpack_plane(packed: jax.Array, width: int, length: int) -> jax.Array:
    if width == 8:
        return packed
    # 32-bit words: on the CPU three times as fast as bytes, whose shifts XLA does not vectorize
    pad = -packed.shape[-1] % 4
    if pad:
        packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, pad)])
    words = lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], -1, 4), jnp.uint32)
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    codes = ((words[..., None] >> shifts) & (2**width - 1)).astype(jnp.uint8)
    return codes.reshape(*packed.shape[:-1], -1)[..., :length]
