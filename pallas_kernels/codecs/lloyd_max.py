"""Levels that are best for a normal distribution (Lloyd-Max), around a mean.

``x' = mean + scale * level[code]`` for each group. The levels minimize the squared error on N(0, 1) (Max, "Quantizing
for minimum distortion", 1960). Mean and scale are refitted by least squares to the codes that they give, a few times.
They start from the group's own mean and deviation, or in a short group from its ends: its least and greatest value say
more of the best scale than its deviation does, and fewer rounds get further (a fifth less squared error at 4 bits in
groups of 32; more where one value is far from all others). At 2 bits the error on normal data is about half of a
uniform grid's from least to greatest value.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

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
SHORT, SHORT_ROUNDS = 32, 2  # elements of a group that starts from its ends, and its rounds
MARGIN = 0.97  # of the greatest level at a group's ends, where those are near


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
        there = groups != 0  # zeros may be padding
        count = jnp.maximum(there.sum(-1, keepdims=True, dtype=jnp.float32), 1)
        mean = groups.sum(-1, keepdims=True) / count
        short = self.bits > 1 and groups.shape[-1] <= SHORT
        start = (
            self._from_ends(groups, there) if short else _from_deviation(groups, mean, there, count)
        )
        refit = lambda _, params: self._refit(groups, mean, there, count, params)
        rounds = SHORT_ROUNDS if short else ROUNDS
        params = jax.lax.fori_loop(0, rounds, refit, start, unroll=True)  # a kernel rolls it again
        params["scale"] = params["scale"] * shrink
        return {name: round_scale(x, self.scale_dtype) for name, x in params.items()}

    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        away = x - params["mean"]
        beyond = [(jnp.abs(away) > edge).astype(jnp.uint8) for edge in self._edges(params)]
        place = sum(beyond, start=jnp.zeros(away.shape, jnp.uint8))
        half = jnp.uint8(len(LEVELS[self.bits]))
        return jnp.where(away > 0, half + place, half - 1 - place)

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

    def _edges(self, params: Params) -> list[jax.Array]:
        """Where a level ends and the next one, further from the mean, begins: distances from the mean."""
        half = LEVELS[self.bits]
        return [(a + b) / 2 * nonzero(params["scale"]) for a, b in itertools.pairwise(half)]

    def _level(self, x: jax.Array, params: Params) -> jax.Array:
        """The level of the code of `x`."""
        half, away = LEVELS[self.bits], x - params["mean"]
        size = jnp.full(away.shape, half[0], jnp.float32)
        for edge, level in zip(self._edges(params), half[1:]):
            size = jnp.where(jnp.abs(away) > edge, level, size)
        return jnp.where(away > 0, size, -size)

    def _from_ends(self, groups: jax.Array, there: jax.Array) -> Params:
        """The middle between the ends, and the scale by which those are at the greatest level, or where the ends of as
        many normal numbers are expected (Blom, 1958), whichever is less."""
        n, top = groups.shape[-1], LEVELS[self.bits][-1]
        expected = statistics.NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
        greatest = jnp.where(there, groups, -jnp.inf).max(-1, keepdims=True)
        least = jnp.where(there, groups, jnp.inf).min(-1, keepdims=True)
        some = greatest >= least
        half = jnp.where(some, (greatest - least) / 2, 0)
        mean = jnp.where(some, (greatest + least) / 2, 0)
        return {"scale": half / max(top / MARGIN, expected), "mean": mean}

    def _refit(
        self, groups: jax.Array, mean: jax.Array, there: jax.Array, count: jax.Array, params: Params
    ) -> Params:
        """Mean and scale by least squares for the codes that `params` give; `mean` is that of the groups.

        The three sums do not wait for each other.
        """
        level = jnp.where(there, self._level(groups, params), 0)
        terms = level, level**2, level * (groups - mean)
        total, squares, product = (x.sum(-1, keepdims=True) for x in terms)
        mean_l = total / count
        spread = squares - total * mean_l
        some = spread > 1e-5 * squares  # else there is one level, but for rounding
        scale = jnp.where(some, product / jnp.where(some, spread, 1), params["scale"])
        return {"scale": scale, "mean": mean - scale * mean_l}


def _from_deviation(
    groups: jax.Array, mean: jax.Array, there: jax.Array, count: jax.Array
) -> Params:
    variance = jnp.where(there, (groups - mean) ** 2, 0).sum(-1, keepdims=True) / count
    return {"scale": jnp.sqrt(variance), "mean": mean}
