"""Levels that are best for a normal distribution (Lloyd-Max), around a mean.

``x' = mean + scale * level[code]`` for each group. The levels minimize the squared error on N(0, 1) (Max, "Quantizing
for minimum distortion", 1960); mean and scale start from the group's own and are refitted by least squares to the codes
that they give, a few times. At 2 bits the error on normal data is about half of a uniform grid's from least to
greatest value.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .base import Parts
from .grouped import (
    SCALE_DTYPES,
    GroupCodec,
    Params,
    check_granularity,
    check_scale_dtype,
    granularity_suffix,
    nonzero,
    round_scale,
    scale_dtype_suffix,
)

# the positive half; the other half mirrors it
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
ROUNDS = 4  # of refitting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LloydMax(GroupCodec):
    """``lm<bits>[-g<group>][-f32|-bf16]``, 1 to 4 bits, with a mean and a scale for each group."""

    bits: int = 2  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    scale_dtype: str = "f16"

    def __post_init__(self):
        if self.bits not in LEVELS:
            raise ValueError(f"`bits` is {self.bits}; expected one of {sorted(LEVELS)}")
        check_granularity(self.group, False)
        check_scale_dtype(self.scale_dtype)

    @property
    def name(self) -> str:
        dtype = scale_dtype_suffix(self.scale_dtype)
        return f"lm{self.bits}{granularity_suffix(self.group, False)}{dtype}"

    @property
    def levels(self) -> np.ndarray:
        """The levels in order, ``f32[2**bits]``."""
        half = np.asarray(LEVELS[self.bits], np.float32)
        return np.concatenate([-half[::-1], half])

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        there = (groups != 0).astype(jnp.float32)  # zeros may be padding
        count = jnp.maximum(there.sum(-1, keepdims=True), 1)
        mean = groups.sum(-1, keepdims=True) / count
        scale = jnp.sqrt((there * (groups - mean) ** 2).sum(-1, keepdims=True) / count)
        params = self._rounded(scale, mean)
        refit = lambda _, params: self._refit(groups, mean, there, count, params)
        params = jax.lax.fori_loop(0, ROUNDS, refit, params, unroll=True)  # a kernel rolls it again
        return params | {"scale": round_scale(params["scale"] * shrink, self.scale_dtype)}

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        z = (x - params["mean"]) / nonzero(params["scale"])
        levels = self.levels
        edges = (levels[1:] + levels[:-1]) / 2
        code = jnp.zeros(jnp.broadcast_shapes(x.shape, z.shape), jnp.uint8)
        for edge in edges:
            code += (z > edge).astype(jnp.uint8)
        return code

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        """Levels by comparisons rather than from a table, which every backend vectorizes."""
        half = len(LEVELS[self.bits])
        upper = codes >= half
        place = jnp.where(upper, codes - half, half - 1 - codes)
        size = jnp.full(codes.shape, LEVELS[self.bits][0], jnp.float32)
        for i, level in enumerate(LEVELS[self.bits][1:], 1):
            size = jnp.where(place >= i, level, size)
        return jnp.where(upper, size, -size) * params["scale"] + params["mean"]

    def store(self, params: Params) -> Parts:
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {k: v.squeeze(-1).astype(dtype) for k, v in params.items()}

    def load(self, parts: Parts) -> Params:
        return {k: v.astype(jnp.float32)[..., None] for k, v in parts.items()}

    def _refit(
        self, groups: jax.Array, mean: jax.Array, there: jax.Array, count: jax.Array, params: Params
    ) -> Params:
        """Mean and scale by least squares for the codes that `params` give; `mean` is that of the groups."""
        unit = {"scale": jnp.ones_like(params["scale"]), "mean": jnp.zeros_like(params["mean"])}
        level = self.values(self.codes(groups, params), unit) * there
        mean_l = level.sum(-1, keepdims=True) / count
        spread = (there * (level - mean_l) ** 2).sum(-1, keepdims=True)
        product = (there * (level - mean_l) * (groups - mean)).sum(-1, keepdims=True)
        scale = jnp.where(spread > 0, product / nonzero(spread), params["scale"])
        return self._rounded(scale, mean - scale * mean_l)

    def _rounded(self, scale: jax.Array, mean: jax.Array) -> Params:
        return {
            "scale": round_scale(scale, self.scale_dtype),
            "mean": round_scale(mean, self.scale_dtype),
        }
