"""Plain storage in a float dtype: the codecs ``f32``, ``f16`` and ``bf16``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .base import Codec, Parts
from .check import is_concrete, validate

DTYPES = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """The tensor itself, as the one part ``values``.

    Attributes:
      dtype: ``f32``, ``f16`` or ``bf16``.
    """

    dtype: str = "f32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; expected one of {sorted(DTYPES)}")

    @property
    def name(self) -> str:
        return self.dtype

    def encode(self, x: jax.Array, *, batch_dims: int = 0) -> Parts:
        x = jnp.asarray(x)
        validate(x, batch_dims=batch_dims)
        values = x.astype(DTYPES[self.dtype])
        if is_concrete(values) and not bool(jnp.isfinite(values).all()):
            largest = float(jnp.max(jnp.abs(x.astype(jnp.float32))))
            raise ValueError(
                f"`x` reaches {largest:.3g}, above the range of {self.name}: use `bf16` or `f32`"
            )
        return {"values": values}

    def decode(self, parts: Parts, length: int) -> jax.Array:
        return parts["values"].astype(jnp.float32)
