"""Clip search: give up a little of each group's range for a finer grid.

For each group the range is shrunk by every factor of a grid and the one with the least
`sum(weight * |w - w'|**p)` is kept. The full range is always among them, so that no group ends
worse than rounding by this measure. `p` above 2 protects the large weights (GPTQ's own search uses
2.4).

References: the `mse` option of GPTQ, https://arxiv.org/abs/2210.17323; OMSE,
https://arxiv.org/abs/1902.06822.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import Codec, GroupCodec, Params, Parts

from .base import Solved, Solver, check_inputs, errors, require_groups


@dataclasses.dataclass(frozen=True)
class ClipSearch(Solver):
    """See `clip_search`."""

    steps: int = 40
    least: float = 0.4
    p: float = 2.4

    name: ClassVar[str] = "clip"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be 1 or more; got {self.steps}.")
        if not 0 < self.least <= 1:
            raise ValueError(f"`least` must lie in (0, 1]; got {self.least}.")
        if self.p <= 0:
            raise ValueError(f"`p` must be positive; got {self.p}.")

    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        codec = require_groups(self.name, codec)
        w, hessian = check_inputs(w, hessian)
        parts, shrink = _solve(w, hessian, codec=codec, search=self)
        return Solved(parts, errors(w, codec, parts, hessian) | {"shrink": float(shrink)})


def clip_search(steps: int = 40, least: float = 0.4, p: float = 2.4) -> ClipSearch:
    """Searches each group's range for the least error; needs no data.

    With a hessian the error of each weight counts by its input's mean square, `diag(H)`.

    Args:
      steps: how many shrink factors are tried, evenly from `least` to 1.
      least: the smallest factor tried, in (0, 1].
      p: the power of the error.
    """
    return ClipSearch(steps, least, p)


def fit_clipped(
    groups: jax.Array, weights: jax.Array, codec: GroupCodec, search: ClipSearch
) -> tuple[Params, jax.Array]:
    """The parameters with the best range of each group, and the shrink factors that gave them.

    Args:
      groups: `f32[rows, n_groups, group]` of `codec.split`.
      weights: broadcast against `groups`; 0 where the last group is padded.
    """

    def losses(params: Params) -> jax.Array:
        error = jnp.abs(groups - codec.values(codec.codes(groups, params), params))
        each = jnp.square(error) if search.p == 2 else error**search.p
        return sum_like(each * weights, params)

    def try_shrink(best: tuple[jax.Array, jax.Array], shrink: jax.Array):
        loss = losses(codec.fit(groups, shrink=shrink))
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, shrink, best[1])), None

    full = codec.fit(groups)
    start = losses(full)
    grid = jnp.linspace(1.0, search.least, search.steps, dtype=jnp.float32)[1:]
    (_, shrink), _ = jax.lax.scan(try_shrink, (start, jnp.ones_like(start)), grid)
    params = codec.fit(groups, shrink=shrink)
    # A parameter that several groups share may move when they all shrink at once: look again.
    worse = jnp.sum(losses(params)) > jnp.sum(start)
    params = jax.tree.map(lambda old, new: jnp.where(worse, old, new), full, params)
    return params, jnp.where(worse, 1.0, shrink)


def sum_like(x: jax.Array, params: Params) -> jax.Array:
    """Sums `x` over the axes that all `params` share, keeping them with size 1."""
    shape = jnp.broadcast_shapes(*(value.shape for value in params.values()))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True)


def group_weights(length: int, codec: GroupCodec, diagonal: jax.Array | None = None) -> jax.Array:
    """What each column counts, `f32[1, n_groups, group]`: `diagonal` or 1, and 0 for padding."""
    if diagonal is None:
        diagonal = jnp.ones(length, jnp.float32)
    diagonal = diagonal / jnp.maximum(jnp.mean(diagonal), jnp.finfo(jnp.float32).tiny)
    return codec.split(diagonal[None])


@functools.partial(jax.jit, static_argnames=("codec", "search"))
def _solve(
    w: jax.Array, hessian: jax.Array | None, *, codec: GroupCodec, search: ClipSearch
) -> tuple[Parts, jax.Array]:
    groups = codec.split(w)
    diagonal = None if hessian is None else jnp.diagonal(hessian)
    weights = group_weights(w.shape[-1], codec, diagonal)
    params, shrink = fit_clipped(groups, weights, codec, search)
    codes = codec.join(codec.codes(groups, params), w.shape[-1])
    return codec.assemble(codes, params), jnp.mean(shrink)
