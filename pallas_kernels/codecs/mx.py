"""Microscaling floats: blocks of 32 elements that share a power of two.

The scale is ``2**(floor(log2(max |x|)) - emax)``, ``emax`` the exponent of the element's largest
value; elements round to nearest, ties to even, and saturate. A block of zeros has the scale
``2**-127``.

Source: OCP Microscaling Formats (MX) specification 1.0, section 6.3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .base import Parts
from .elements import ELEMENTS, e8m0_from_bits, e8m0_to_bits
from .grouped import Params
from .scaled import ScaledCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mx(ScaledCodec):
    """``mxfp4``, ``mxfp8_e4m3`` and ``mxfp8_e5m2``; parts ``codes`` and the E8M0 bytes ``scale``.

    Attributes:
      element: ``e2m1``, ``e4m3`` or ``e5m2``.
    """

    group: int = dataclasses.field(default=32, init=False)
    element: str = "e2m1"

    def __post_init__(self):
        if self.element not in ELEMENTS:
            raise ValueError(f"`element` is {self.element!r}; expected one of {sorted(ELEMENTS)}")

    @property
    def name(self) -> str:
        return "mxfp4" if self.element == "e2m1" else f"mxfp8_{self.element}"

    @property
    def bits(self) -> int:
        return ELEMENTS[self.element].bits

    @property
    def largest(self) -> float:
        return ELEMENTS[self.element].largest

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        del batch_dims  # no scale reaches over a block
        largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) * shrink
        exponent = e8m0_to_bits(largest).astype(jnp.int32) - ELEMENTS[self.element].exponent
        return {"scale": e8m0_from_bits(jnp.maximum(exponent, 0).astype(jnp.uint8))}

    def nearest(self, x: jax.Array) -> jax.Array:
        return ELEMENTS[self.element].to_bits(x)

    def level(self, codes: jax.Array) -> jax.Array:
        return ELEMENTS[self.element].from_bits(codes)

    def store(self, params: Params) -> Parts:
        return {"scale": e8m0_to_bits(params["scale"]).squeeze(-1)}

    def load(self, parts: Parts) -> Params:
        return {"scale": e8m0_from_bits(parts["scale"])[..., None]}
