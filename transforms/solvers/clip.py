"""Clip search: give up a little of each group's range for a finer grid.

For each group the range is multiplied by every factor of a grid, and the one with the least
`sum(weight * |w - w'|**p)` is kept. The full range is always among them, so that no group ends
worse than rounding by this measure. Factors above 1 are for floats in blocks, whose largest level
lies below the top of the block's range (MX), or whose levels fit better when the top is left out
(NVFP4).

Then `refit` steps of Lloyd's method: the scale (and the zero point, where the codec has one) that
fits the chosen codes best by weighted least squares, and the nearest codes again; each group keeps
its best.

References: the `mse` option of GPTQ, https://arxiv.org/abs/2210.17323; OMSE,
https://arxiv.org/abs/1902.06822.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stowax.pallas_kernels.codecs import Codec, GroupCodec, Params, Parts

from .base import Solved, Solver, check_inputs, errors, require_groups


@dataclasses.dataclass(frozen=True)
class ClipSearch(Solver):
    """See `clip_search`."""

    steps: int = 40
    least: float = 0.4
    most: float = 1.6
    p: float = 4.0
    refit: int = 5

    name: ClassVar[str] = "clip"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be 1 or more; got {self.steps}.")
        if not 0 < self.least <= 1 <= self.most:
            raise ValueError(
                f"`least` must lie in (0, 1] and `most` be 1 or more; got {self.least}, {self.most}."
            )
        if self.p <= 0:
            raise ValueError(f"`p` must be positive; got {self.p}.")
        if self.refit < 0:
            raise ValueError(f"`refit` must be 0 or more steps; got {self.refit}.")

    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        codec = require_groups(self.name, codec)
        w, hessian = check_inputs(w, hessian)
        parts = _solve(w, hessian, codec=codec, search=self)
        return Solved(parts, errors(w, codec, parts, hessian))


def clip_search(
    steps: int = 40, least: float = 0.4, most: float = 1.6, p: float = 4.0, refit: int = 5
) -> ClipSearch:
    """Searches each group's range for the least error; needs no data.

    With a hessian the error of each weight counts by its input's mean square, `diag(H)`.

    Args:
      steps: how many factors of the range are tried, evenly from `least` to `most`.
      least: the smallest factor, in (0, 1].
      most: the largest factor, 1 or more.
      p: the power of the error.
      refit: steps of least squares after the search.
    """
    return ClipSearch(steps, least, most, p, refit)


def fit_clipped(
    groups: jax.Array, weights: jax.Array, codec: GroupCodec, search: ClipSearch
) -> Params:
    """The best parameters of each group.

    Args:
      groups: `f32[rows, n_groups, group]` of `codec.split`.
      weights: broadcast against `groups`; 0 where the last group is padded.
    """
    full = codec.fit(groups)
    size = _max_like(jnp.abs(groups), full)
    size = jnp.where(size == 0, 1.0, size)

    def keep_best(best: Params, least: jax.Array, params: Params, codes: jax.Array):
        error = jnp.abs(groups - codec.values(codes, params))
        error /= size  # so that high powers of small errors do not vanish
        loss = sum_like(power(error, search.p) * weights, params)
        return _choose(loss < least, params, best), jnp.minimum(loss, least)

    def try_factor(state: tuple[Params, jax.Array], factor: jax.Array):
        params = _choose(jnp.ones_like(size, bool), codec.fit(groups, shrink=factor), full)
        return keep_best(*state, params, codec.codes(groups, params)), None

    def try_refit(state: tuple[Params, Params, jax.Array], _):
        params, best, least = state
        codes = codec.codes(groups, params)
        best, least = keep_best(best, least, params, codes)
        return (refit(groups, codes, weights, codec, params), best, least), None

    factors = jnp.linspace(search.least, search.most, search.steps, dtype=jnp.float32)
    factors = jnp.concatenate([jnp.ones(1), factors])
    start = (full, jnp.full_like(size, jnp.inf))
    (best, least), _ = jax.lax.scan(try_factor, start, factors)
    if search.refit:
        # The first step only looks at where it stands.
        state = (best, best, least)
        (_, best, _), _ = jax.lax.scan(try_refit, state, length=search.refit + 1)
    return best


def refit(
    groups: jax.Array, codes: jax.Array, weights: jax.Array, codec: GroupCodec, params: Params
) -> Params:
    """The parameters that fit `codes` best, by weighted least squares.

    Every grid is `scale * level` or `scale * (level - zero)`: a line through the levels, without or
    with an intercept.
    """
    shifted = "zero" in params
    unit = params | {"scale": jnp.ones_like(params["scale"])}
    if shifted:
        unit |= {"zero": jnp.zeros_like(params["zero"])}
    level = codec.values(codes, unit)
    total = sum_like(jnp.broadcast_to(weights, groups.shape), params)

    def mean(x: jax.Array) -> jax.Array:
        return _ratio(sum_like(x * weights, params), total)

    zero = jnp.zeros_like(total)
    mean_level, mean_weight = (mean(level), mean(groups)) if shifted else (zero, zero)
    centred = level - mean_level
    slope = _ratio(mean(centred * (groups - mean_weight)), mean(jnp.square(centred)))
    slope = jnp.where(slope * params["scale"] > 0, slope, params["scale"])
    params = as_stored(params | {"scale": slope}, codec)
    if shifted:
        zero = mean_level - _ratio(mean_weight, params["scale"])
        params = as_stored(params | {"zero": zero}, codec)
    return params


def as_stored(params: Params, codec: GroupCodec) -> Params:
    """`params` rounded to the precision they are stored in."""
    return codec.load(codec.store(params))


def power(x: jax.Array, p: float) -> jax.Array:
    """``abs(x) ** p``, by products or by exp and log: XLA's own power is five times slower on the CPU."""
    if p == int(p):
        return lax.integer_pow(jnp.abs(x), int(p))
    return jnp.exp(p * jnp.log(jnp.abs(x)))


def _choose(condition: jax.Array, new: Params, old: Params) -> Params:
    """`new` where `condition` (a bool for each group) holds; what groups share stays old."""
    return {
        name: jnp.where(condition, new[name], value) if value.shape == condition.shape else value
        for name, value in old.items()
    }


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


def sum_like(x: jax.Array, params: Params) -> jax.Array:
    """Sums `x` over the axes that all `params` share, keeping them with size 1."""
    return jnp.sum(x, axis=_shared_axes(params), keepdims=True)


def _max_like(x: jax.Array, params: Params) -> jax.Array:
    return jnp.max(x, axis=_shared_axes(params), keepdims=True)


def _shared_axes(params: Params) -> tuple[int, ...]:
    shape = jnp.broadcast_shapes(*(value.shape for value in params.values()))
    return tuple(axis for axis, size in enumerate(shape) if size == 1)


def group_weights(length: int, codec: GroupCodec, diagonal: jax.Array | None = None) -> jax.Array:
    """What each column counts, `f32[1, n_groups, group]`: `diagonal` or 1, and 0 for padding."""
    if diagonal is None:
        diagonal = jnp.ones(length, jnp.float32)
    diagonal = diagonal / jnp.maximum(jnp.mean(diagonal), jnp.finfo(jnp.float32).tiny)
    return codec.split(diagonal[None])


@functools.partial(jax.jit, static_argnames=("codec", "search"))
def _solve(
    w: jax.Array, hessian: jax.Array | None, *, codec: GroupCodec, search: ClipSearch
) -> Parts:
    groups = codec.split(w)
    diagonal = None if hessian is None else jnp.diagonal(hessian)
    params = fit_clipped(groups, group_weights(w.shape[-1], codec, diagonal), codec, search)
    return codec.assemble(codec.join(codec.codes(groups, params), w.shape[-1]), params)
