"""Uniform integer grids of 1 to 8 bits, symmetric or with a zero point.

Asymmetric: ``x' = scale * (code - zero)`` with ``scale = (max - min) / (2**bits - 1)`` over a
range that is made to hold 0, and an integer zero point ``round(-min / scale)``; both are stored
(the zero point as float16 too, so that solvers may move it off the integers, as HQQ does). No
value is further than half a step from its level. A group that already lies on a grid with a float
minimum (weights that a file held in 4 bits, such as GGUF's Q4_1) keeps that grid and its values.

Symmetric: ``x' = scale * (code - 2**(bits-1))``. The full range is used: the scale takes the sign
that maps the value of largest magnitude to the code 0, that is to level ``-2**(bits-1)``
(llama.cpp's Q4_0 does the same); a value of the other sign and as large may be one step from its
level. One bit is ``+-scale / 2`` with twice the mean magnitude as scale (XNOR-Net), exact zeros
not counted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .base import Parts
from .grouped import (
    SCALE_DTYPES,
    GroupCodec,
    Params,
    check_activations,
    check_granularity,
    check_scale_dtype,
    granularity_suffix,
    nonzero,
    reduce_axes,
    round_scale,
    scale_dtype_suffix,
)

ON_GRID = 0.03  # of a step: as far as a value may be from its level to count as lying on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(GroupCodec):
    """``int<bits>[-g<group>|-tensor][-sym|-asym][-f32|-bf16][-a8]``.

    Attributes:
      bits: 1 to 8.
      symmetric: no zero point. By default 8 bits and 1 bit are symmetric and the others are not:
        a zero point buys more there than the same bytes spent on smaller groups.
      per_tensor: one scale for the whole tensor (for each batch entry).
      scale_dtype: what scales and zero points are stored in: ``f16``, ``bf16`` or ``f32``.
      activations: 8 to round what is multiplied with the weight to 8 bits, a scale for each token (`matmul.w8a8`); None
        to leave it as it is. With 4 or 8 symmetric bits only, and no groups.
    """

    bits: int = 8  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    symmetric: bool | None = None
    per_tensor: bool = False
    scale_dtype: str = "f16"
    activations: int | None = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` is {self.bits}; expected 1 to 8")
        check_granularity(self.group, self.per_tensor)
        check_scale_dtype(self.scale_dtype)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self._symmetric_by_default)
        fits = self.bits in (4, 8) and bool(self.symmetric)
        check_activations(self.activations, fits, self.group)

    @property
    def name(self) -> str:
        kind = "-sym" if self.symmetric else "-asym"
        kind = "" if self.symmetric == self._symmetric_by_default else kind
        dtype = scale_dtype_suffix(self.scale_dtype)
        kind += dtype + ("-a8" if self.activations else "")
        return f"int{self.bits}{granularity_suffix(self.group, self.per_tensor)}{kind}"

    @property
    def last(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> float:
        """The code of zero in a symmetric grid; between the two codes of one bit."""
        return 0.5 if self.bits == 1 else 2 ** (self.bits - 1)

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        axes = reduce_axes(groups, self.per_tensor, batch_dims)
        if self.symmetric and self.bits == 1:
            return {"scale": self._round(2 * _mean_magnitude(groups, axes) * shrink)}
        low = jnp.minimum(jnp.min(groups, axis=axes, keepdims=True), 0) * shrink
        high = jnp.maximum(jnp.max(groups, axis=axes, keepdims=True), 0) * shrink
        if self.symmetric:
            extreme = jnp.where(high > -low, high, low)
            return {"scale": self._round(-extreme / self.middle)}
        scale = self._round(high / self.last - low / self.last)  # high - low could overflow
        zero = jnp.clip(jnp.round(-low / nonzero(scale)), 0, self.last)
        params = {"scale": scale, "zero": zero}
        return self._keep_grid(groups, axes, params) if isinstance(shrink, float) else params

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        level = x / nonzero(params["scale"]) + params.get("zero", self.middle)
        return jnp.clip(jnp.round(level), 0, self.last).astype(jnp.uint8)

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        zero = params.get("zero", jnp.asarray(self.middle, jnp.float32))
        return (codes.astype(jnp.float32) - zero) * params["scale"]

    def store(self, params: Params) -> Parts:
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {k: v.squeeze(-1).astype(dtype) for k, v in params.items()}

    def load(self, parts: Parts) -> Params:
        return {k: v.astype(jnp.float32)[..., None] for k, v in parts.items()}

    def _keep_grid(self, groups: jax.Array, axes: tuple[int, ...], params: Params) -> Params:
        """Where a group already lies on a grid from its least to its greatest value, that grid."""
        low = jnp.min(groups, axis=axes, keepdims=True)
        high = jnp.max(groups, axis=axes, keepdims=True)
        scale = self._round(high / self.last - low / self.last)
        zero = round_scale(-low / nonzero(scale), self.scale_dtype)
        level = groups / nonzero(scale) + zero
        off = jnp.max(jnp.abs(level - jnp.round(level)), axis=axes, keepdims=True)
        kept = (off < ON_GRID) & (scale > 0) & (jnp.abs(zero) < 2**10)
        own = {"scale": scale, "zero": zero}
        return {name: jnp.where(kept, own[name], value) for name, value in params.items()}

    @property
    def _symmetric_by_default(self) -> bool:
        return self.bits in (1, 8)

    def _round(self, scale: jax.Array) -> jax.Array:
        return round_scale(scale, self.scale_dtype)


def _mean_magnitude(groups: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    count = jnp.sum(groups != 0, axis=axes, keepdims=True)  # zeros may be padding
    return jnp.sum(jnp.abs(groups), axis=axes, keepdims=True) / jnp.maximum(count, 1)
