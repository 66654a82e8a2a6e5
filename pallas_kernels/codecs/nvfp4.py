"""NVFP4: E2M1 elements in blocks of 16 with an E4M3 scale, and one float32 scale for the tensor.

``x' = level * (scale * tensor_scale)``, ``tensor_scale = max |x| / (6 * 448)`` over the tensor
(over each batch entry), ``scale`` the E4M3 number nearest to ``max |block| / 6 / tensor_scale``.

Source: NVIDIA, Pretraining Large Language Models with NVFP4 (2025, arXiv:2509.25149).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from .base import Parts
from .elements import ELEMENTS
from .grouped import Params, nonzero, reduce_axes
from .scaled import ScaledCodec

_E2M1, _E4M3 = ELEMENTS["e2m1"], ELEMENTS["e4m3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nvfp4(ScaledCodec):
    """``nvfp4``; parts ``codes``, the E4M3 bytes ``scale`` and ``tensor_scale``."""

    group: int = dataclasses.field(default=16, init=False)

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def bits(self) -> int:
        return 4

    @property
    def largest(self) -> float:
        return _E2M1.largest

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        size = jnp.abs(groups)
        axes = reduce_axes(groups, True, batch_dims)
        tensor = jnp.max(size, axis=axes, keepdims=True) / (_E2M1.largest * _E4M3.largest)
        block = jnp.max(size, axis=-1, keepdims=True) * shrink / _E2M1.largest
        scale = _E4M3.from_bits(_E4M3.to_bits(block / nonzero(tensor)))
        return {"scale": scale, "tensor_scale": tensor}

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        return self.nearest(x / nonzero(params["scale"] * params["tensor_scale"]))

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        return self.level(codes) * (params["scale"] * params["tensor_scale"])

    def nearest(self, x: jax.Array) -> jax.Array:
        return _E2M1.to_bits(x)

    def level(self, codes: jax.Array) -> jax.Array:
        return _E2M1.from_bits(codes)

    def store(self, params: Params) -> Parts:
        return {
            "scale": _E4M3.to_bits(params["scale"]).squeeze(-1),
            "tensor_scale": params["tensor_scale"].squeeze(-1),
        }

    def load(self, parts: Parts) -> Params:
        return {
            # the barrier keeps XLA from decoding the scale again for every weight
            "scale": lax.optimization_barrier(_E4M3.from_bits(parts["scale"]))[..., None],
            "tensor_scale": parts["tensor_scale"][..., None],
        }
