"""4-bit integers on a grid of 8-bit ones: an integer scale for each group over a float scale for each channel.

``x' = channel_scale * (scale * (code - 8))`` with an integer ``scale`` from -15 to 16, so that the inner product fits
int8: a matmul with activations in 8 bits multiplies it as it is, and the float scale comes on the finished sum. The
group with the widest range of its channel has 16 for that range, the others the integer nearest to theirs, whose sign
maps their value of largest magnitude to the code 0. (The solver "clip" searches for the integer of the least error.)

Source: the progressive group quantization of QServe (Lin et al., 2024, arXiv:2405.04532). It differs: no zero point but
scales of either sign, and groups that are fitted to the weights, not to their 8-bit form.
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
    check_granularity,
    check_scale_dtype,
    nonzero,
    round_scale,
    scale_dtype_suffix,
)

LEAST, MOST = -15.0, 16.0  # of a group's scale: times -8 to 7 it fits int8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qoq4(GroupCodec):
    """``qoq4[-g<group>][-f32|-bf16]``; parts ``codes``, int8 ``scale`` of groups and float ``channel_scale``.

    Attributes:
      group: 128 by default.
      scale_dtype: what channel scales are stored in: ``f16``, ``bf16`` or ``f32``.
      activations: what is multiplied with the weight is rounded to 8 bits, a scale for each token (`matmul.w8a8`).
    """

    group: int = 128  # pyright: ignore[reportIncompatibleVariableOverride]
    scale_dtype: str = "f16"
    activations: int = dataclasses.field(default=8, init=False)

    def __post_init__(self):
        if self.group is None:
            raise ValueError(
                "`group` is None; qoq4 has groups: choose 'qoq4-g128', or 'int4-sym-a8' for channels"
            )
        check_granularity(self.group, False)
        check_scale_dtype(self.scale_dtype)

    @property
    def name(self) -> str:
        dtype = scale_dtype_suffix(self.scale_dtype)
        return f"qoq4-g{self.group}{dtype}"

    @property
    def bits(self) -> int:
        return 4

    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        del batch_dims  # no scale reaches over a channel
        low = jnp.min(groups, axis=-1, keepdims=True)
        high = jnp.max(groups, axis=-1, keepdims=True)
        ideal = jnp.where(high > -low, high, low) / -8
        widest = jnp.max(jnp.abs(ideal), axis=-2, keepdims=True)
        channel = round_scale(widest / MOST, self.scale_dtype)
        scale = _integer(ideal * shrink / nonzero(channel))
        return {"scale": jnp.where(channel == 0, 0.0, scale), "channel_scale": channel}

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        level = jnp.round(x / nonzero(params["scale"] * params["channel_scale"]))
        return (jnp.clip(level, -8, 7) + 8).astype(jnp.uint8)

    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        return (codes.astype(jnp.float32) - 8) * (params["scale"] * params["channel_scale"])

    def store(self, params: Params) -> Parts:
        channel = params["channel_scale"].squeeze(-1).astype(SCALE_DTYPES[self.scale_dtype])
        scale = _integer(params["scale"]) * (params["scale"] != 0)
        return {"scale": scale.squeeze(-1).astype(jnp.int8), "channel_scale": channel}

    def load(self, parts: Parts) -> Params:
        return {k: v.astype(jnp.float32)[..., None] for k, v in parts.items()}


def _integer(scale: jax.Array) -> jax.Array:
    """The nearest scale that is not 0."""
    scale = jnp.clip(jnp.round(scale), LEAST, MOST)
    return jnp.where(scale == 0, 1.0, scale)
