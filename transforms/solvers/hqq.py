"""HQQ: half-quadratic search for each group's zero point, without data.

Minimises `sum |w - w'|**p` with `p < 1`, which lets a few large weights be wrong. The error is
split off as a variable of its own and both are solved in turn (letters as in the paper: `beta`
couples the two and grows by `kappa`):

    codes <- round(w / scale + zero)
    error <- shrink(w - scale * (codes - zero))          the proximal step of |.|**p
    zero  <- mean over the group of (codes - (w - error) / scale)

The proximal step gives 0 for errors below `beta**(-1 / (2 - p))`, 0.17 at the start: for weights of
ordinary size the errors stay whole, and the step makes the mean error of each group zero. That is
what helps: inputs of a layer have means, and an error that all weights of a group share adds up.

References: Half-Quadratic Quantization, https://mobiusml.github.io/hqq_blog/.
Differs from it in: 1. each group keeps its own best step, where it stops when the mean error of the
whole weight grows; 2. each group's range is searched first (`clip`), which it leaves at full.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import Codec, GroupCodec, Params, Parts

from .base import Solved, Solver, check_inputs, errors, require_groups
from .clip import ClipSearch, as_stored, fit_clipped, group_weights, power, sum_like

CLIP = ClipSearch(p=8.0, refit=0)


@dataclasses.dataclass(frozen=True)
class HQQ(Solver):
    """See `hqq`."""

    iters: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    clip: ClipSearch | None = CLIP

    name: ClassVar[str] = "hqq"

    def __post_init__(self):
        if self.iters < 0:
            raise ValueError(f"`iters` must be 0 or more; got {self.iters}.")
        for field, value in (("p", self.p), ("beta", self.beta), ("kappa", self.kappa)):
            if value <= 0:
                raise ValueError(f"`{field}` must be positive; got {value}.")

    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        codec = require_groups(self.name, codec)
        if {"scale", "zero"} - set(_params_of(codec)):
            raise ValueError(
                f"`codec` {codec.name!r} has no zero point, which is what solver {self.name!r} "
                'moves; use an asymmetric integer codec such as "int4-g64" or "int8-g64-asym", '
                'or solver "clip".'
            )
        w, hessian = check_inputs(w, hessian)
        parts = _solve(w, codec=codec, search=self)
        return Solved(parts, errors(w, codec, parts, hessian))


def hqq(
    iters: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    clip: ClipSearch | None = CLIP,
) -> HQQ:
    """Moves each group's zero point off the integers; asymmetric integer codecs only.

    Args:
      iters: steps at most; each group keeps the best of its own.
      p: the power of the error, below 1 for weights with heavy tails.
      beta: how closely the split-off error follows the real one, at the start.
      kappa: what multiplies `beta` in each step.
      clip: how each group's range is searched first; None starts from the full range.
    """
    return HQQ(iters, p, beta, kappa, clip)


def _params_of(codec: GroupCodec) -> Params:
    group = codec.group or 8
    return jax.eval_shape(codec.fit, jax.ShapeDtypeStruct((1, 1, group), jnp.float32))


def improve(
    groups: jax.Array, mask: jax.Array, codec: GroupCodec, params: Params, search: HQQ
) -> Params:
    """The best zero points on the way; `mask` is 1 on weights and 0 on the last group's padding."""
    count = jnp.maximum(sum_like(jnp.broadcast_to(mask, groups.shape), params), 1)
    scale = jnp.where(params["scale"] == 0, 1.0, params["scale"])

    def measure(zero: jax.Array):
        codes = codec.codes(groups, params | {"zero": zero})
        error = groups - codec.values(codes, params | {"zero": zero})
        return codes, error, sum_like(power(error, search.p) * mask, params)

    def step(state, _):
        zero, beta, best_zero, best_loss = state
        codes, error, loss = measure(zero)
        better = loss < best_loss
        best_zero, best_loss = (
            jnp.where(better, zero, best_zero),
            jnp.where(better, loss, best_loss),
        )
        size = jnp.abs(error)
        shrunk = jnp.sign(error) * jnp.maximum(size - power(size, search.p - 1) / beta, 0)
        shrunk = jnp.where(size == 0, 0, shrunk)
        target = codes.astype(jnp.float32) - (groups - shrunk) / scale
        zero = sum_like(target * mask, params) / count
        zero = as_stored(params | {"zero": zero}, codec)["zero"]
        return (zero, beta * search.kappa, best_zero, best_loss), None

    zero = params["zero"]
    start = (zero, jnp.float32(search.beta), zero, measure(zero)[2])
    (zero, _, best_zero, best_loss), _ = jax.lax.scan(step, start, length=search.iters)
    best_zero = jnp.where(measure(zero)[2] < best_loss, zero, best_zero)
    return params | {"zero": best_zero}


@functools.partial(jax.jit, static_argnames=("codec", "search"))
def _solve(w: jax.Array, *, codec: GroupCodec, search: HQQ) -> Parts:
    groups = codec.split(w)
    mask = group_weights(w.shape[-1], codec)
    if search.clip is None:
        params = codec.fit(groups)
    else:
        params = fit_clipped(groups, mask, codec, search.clip)
    params = improve(groups, mask, codec, params, search)
    codes = codec.join(codec.codes(groups, params), w.shape[-1])
    return codec.assemble(codes, params)
