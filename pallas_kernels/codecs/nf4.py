"""NormalFloat: 16 levels at quantiles of a normal distribution, one of them 0, an absmax scale.

Source: QLoRA (Dettmers et al., 2023, arXiv:2305.14314), appendix E.

Differs from bitsandbytes in: 1. scales are float16, not float32 or quantized themselves; 2. the
first code of a byte is in its low bits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .elements import lookup
from .scaled import FloatScaledCodec

# fmt: off
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(FloatScaledCodec):
    """``nf4[-g<group>|-tensor][-f32|-bf16]``; QLoRA's own group is 64."""

    @property
    def name(self) -> str:
        return "nf4" + self.suffix("f16")

    @property
    def bits(self) -> int:
        return 4

    @property
    def largest(self) -> float:
        return 1.0

    def nearest(self, x: jax.Array) -> jax.Array:
        codes = jnp.zeros(x.shape, jnp.uint8)
        for bound in BOUNDS:
            codes += x > bound
        return codes

    def level(self, codes: jax.Array) -> jax.Array:
        return lookup(LEVELS, codes)
