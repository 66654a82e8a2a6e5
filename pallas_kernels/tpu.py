"""What TPU kernels have in common: four bytes to a word, and the float16 that Mosaic cannot load."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a register, and columns of a tile
VMEM_BYTES = 100 * 2**20  # of 128 MiB, on v5e and v6e


def is_named() -> bool:
    """Whether jax knows for which TPU it lowers: elsewhere than on one, by `jax.sharding.use_abstract_mesh`."""
    try:
        pltpu.get_tpu_info()
    except ValueError:
        return False
    return True


def four_bytes(value: int) -> jax.Array:
    """A word of four equal bytes."""
    return jnp.int32(int.from_bytes(bytes([value] * 4), signed=True))


def loadable(x: jax.Array) -> jax.Array:
    """`x`, float16 as its bits."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def as_float32(x: jax.Array) -> jax.Array:
    """What `loadable` gave."""
    return _half(x.astype(jnp.int32)) if x.dtype == jnp.uint16 else x.astype(jnp.float32)


def _half(bits: jax.Array) -> jax.Array:
    """Float16 bit patterns to float32; subnormals by way of integers, since TPUs flush them."""
    size = bits & 0x7FFF
    normal = lax.bitcast_convert_type((size << 13) + ((127 - 15) << 23), jnp.float32)
    value = jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits > 0x7FFF, -value, value)
