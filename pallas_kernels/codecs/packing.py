"""Codes of 1 to 8 bits packed densely in bytes, without a float round trip.

A width that divides 8 is one *plane*: its bytes hold the row in ``8 // width`` equal pieces, one above the other.
With ``n = ceil(length * width / 8)`` bytes, code `i` sits in byte ``i % n``, the piece ``i // n`` in bits
``width * (i // n)`` and up. The other widths are split into such planes, high bits first (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1), and the planes' bytes follow each other.

Unpacking is a shift and a mask on contiguous bytes, which every backend vectorizes. Neighbours in one byte, the
other usual order, take XLA on the CPU six times as long in a scan over layers.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

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
    count = 8 // width  # pieces of the row, and codes in a byte
    if count == 1:
        return codes.astype(jnp.uint8)
    pad = -codes.shape[-1] % count
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]).astype(jnp.uint8)
    pieces = jnp.split(codes, count, axis=-1)
    return functools.reduce(jnp.bitwise_or, [p << (width * i) for i, p in enumerate(pieces)])


def _unpack_plane(packed: jax.Array, width: int, length: int) -> jax.Array:
    if width == 8:
        return packed
    pieces = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return jnp.concatenate(pieces, axis=-1)[..., :length]
