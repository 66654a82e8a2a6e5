"""Grids that a scale stretches: ``x' = scale * level(code)``, fitted to the largest |x|."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from .base import Parts
from .grouped import (
    SCALE_DTYPES,
    GroupCodec,
    Params,
    check_granularity,
    check_scale_dtype,
    granularity_suffix,
    nonzero,
    reduce_axes,
    round_scale,
)


class ScaledCodec(GroupCodec):
    """A fixed set of levels, stretched so that its largest is the largest |x| of a group."""

    @property
    @abc.abstractmethod
    def largest(self) -> float:
        """The largest level."""

    @abc.abstractmethod
    def nearest(self, x: jax.Array) -> jax.Array:
        """The ``uint8`` codes of the levels nearest to `x`, saturating."""

    @abc.abstractmethod
    def level(self, codes: jax.Array) -> jax.Array:
        """The level of each code, float32."""

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        return self.nearest(x / nonzero(params["scale"]))

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        return self.level(codes) * params["scale"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatScaledCodec(ScaledCodec):
    """With a float scale for each group, channel or tensor.

    Attributes:
      per_tensor: one scale for the whole tensor (for each batch entry).
      scale_dtype: what scales are stored in: ``f16``, ``bf16`` or ``f32``.
    """

    per_tensor: bool = False
    scale_dtype: str = "f16"

    def __post_init__(self):
        check_granularity(self.group, self.per_tensor)
        check_scale_dtype(self.scale_dtype)

    def suffix(self, default_dtype: str) -> str:
        """What follows the head in the codec's name."""
        dtype = "" if self.scale_dtype == default_dtype else f"-{self.scale_dtype}"
        return granularity_suffix(self.group, self.per_tensor) + dtype

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        axes = reduce_axes(groups, self.per_tensor, batch_dims)
        largest = jnp.max(jnp.abs(groups), axis=axes, keepdims=True) * shrink
        return {"scale": round_scale(largest / self.largest, self.scale_dtype)}

    def store(self, params: Params) -> Parts:
        return {"scale": params["scale"].squeeze(-1).astype(SCALE_DTYPES[self.scale_dtype])}

    def load(self, parts: Parts) -> Params:
        return {"scale": parts["scale"].astype(jnp.float32)[..., None]}
