"""Small float formats as bit patterns in uint8: E4M3, E5M2, E2M1, and the scale format E8M0.

Bits to float32 goes through float16 or a table of 16, both several times faster on the CPU than
the cast that XLA emits, and exact. Float32 to bits rounds to nearest, ties to even, and saturates.

Source: OCP Microscaling Formats (MX) specification 1.0, and OCP 8-bit Floating Point 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# E2M1: the bounds between levels 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E2M1_UP_AFTER = (0.25, 1.25, 2.5, 5.0)
_E2M1_UP_FROM = (0.75, 1.75, 3.5)


class Element(NamedTuple):
    """A float format of at most 8 bits.

    Attributes:
      bits: of one element.
      largest: the largest finite value.
      to_bits: float32 to ``uint8`` patterns, saturating.
      from_bits: ``uint8`` patterns to float32, exact.
    """

    bits: int
    largest: float
    to_bits: Callable[[jax.Array], jax.Array]
    from_bits: Callable[[jax.Array], jax.Array]

    @property
    def exponent(self) -> int:
        """The exponent of the largest finite value (`emax` of the MX specification)."""
        return int(np.floor(np.log2(self.largest)))


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """``table[codes]`` for codes known to be in range."""
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _e4m3_to_bits(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)
    return lax.bitcast_convert_type(x, jnp.uint8)


def _e4m3_from_bits(bits: jax.Array) -> jax.Array:
    # exponent and mantissa at the place of float16's; its bias is greater by 8
    wide = bits.astype(jnp.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256


def _e5m2_to_bits(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -57344, 57344).astype(jnp.float8_e5m2)
    return lax.bitcast_convert_type(x, jnp.uint8)


def _e5m2_from_bits(bits: jax.Array) -> jax.Array:
    half = bits.astype(jnp.uint16) << 8  # the upper byte of a float16
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


def _e2m1_to_bits(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    code = jnp.signbit(x).astype(jnp.uint8) << 3
    for bound in _E2M1_UP_AFTER:
        code += size > bound
    for bound in _E2M1_UP_FROM:
        code += size >= bound
    return code


def _e2m1_from_bits(bits: jax.Array) -> jax.Array:
    return lookup(_E2M1, bits)


def e8m0_from_bits(bits: jax.Array) -> jax.Array:
    """Scale bytes to float32 powers of two; the byte 0 is ``2**-127``, subnormal in float32."""
    power = lax.bitcast_convert_type(bits.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(bits == 0, jnp.float32(2.0**-127), power)


def e8m0_to_bits(scale: jax.Array) -> jax.Array:
    """The byte of a float32 power of two, or of the next one below; 255 (NaN) is never made."""
    return (lax.bitcast_convert_type(scale, jnp.uint32) >> 23).astype(jnp.uint8)


ELEMENTS = {
    "e2m1": Element(4, 6.0, _e2m1_to_bits, _e2m1_from_bits),
    "e4m3": Element(8, 448.0, _e4m3_to_bits, _e4m3_from_bits),
    "e5m2": Element(8, 57344.0, _e5m2_to_bits, _e5m2_from_bits),
}
