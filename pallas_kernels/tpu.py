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


def lookup(x: jax.Array, lanes: jax.Array) -> jax.Array:
    """``x[i, lanes[i, j]]``, both ``[n, LANES]``; `jnp.take_along_axis` would spend instructions on negative lanes."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(x, lanes[..., None], numbers, (1, 1), mode=mode)


def loadable(x: jax.Array) -> jax.Array:
    """`x`, float16 as its bits."""
    return lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x


def as_float32(x: jax.Array) -> jax.Array:
    """What `loadable` gave."""
    return finite(widened(x)) if x.dtype == jnp.int16 else x.astype(jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """What `loadable` gave in 32 bits, float16 still as bits."""
    return x.astype(jnp.int32 if x.dtype == jnp.int16 else jnp.float32)


def finite(x: jax.Array) -> jax.Array:
    """Of `widened` float32, where infinities and NaN become anything finite."""
    return _half(x) if x.dtype == jnp.int32 else jnp.where(jnp.abs(x) < jnp.inf, x, 0)


def _half(bits: jax.Array) -> jax.Array:
    """Float16 bit patterns, sign-extended, to float32. TPUs flush float32's subnormals, not these."""
    value = lax.bitcast_convert_type(((bits & 0x7FFF) << 13) + ((127 - 15) << 23), jnp.float32)
    value -= jnp.maximum(2.0**-14 - value, 0)  # a subnormal has no leading 1, and the exponent 1
    sign = bits & jnp.int32(-(2**31))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) | sign, jnp.float32)
