"""What a solver is: it picks the codes and group parameters of one weight for a codec.

A solver sees one weight as `[rows, length]` (the last axis is the encoded and contracted one) and
knows nothing of programs or sites. `hessian` is the second moment of the layer's inputs, `H =
mean(x x^T)` over tokens, `[length, length]`, up to any positive factor: a change `E` of the weight
changes the output by `tr(E H E^T)` on average.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import Codec, GroupCodec, Parts

Info = dict[str, float | str]


@dataclasses.dataclass(frozen=True)
class Solved:
    """One solved weight.

    Attributes:
      parts: what `codec.encode` would give: same names, shapes and dtypes.
      info: plain numbers and words for a report. Always `weight_error`, the relative distance
        `||W - W'|| / ||W||`; with a hessian `output_error`, `tr(E H E^T) / tr(W H W^T)`. A solver
        adds its own; `fallback` names the solver that took over and `reason` says why.
    """

    parts: Parts
    info: Info


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """Picks codes and group parameters. Frozen and hashable.

    Attributes:
      name: what reports call it.
      needs: what `solve` must be given beside the weight: `{"hessian"}` or nothing.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        """Solves one weight; runs eagerly (jitted inside), because `info` holds plain numbers.

        Args:
          w: `f32[rows, length]`, finite.
          codec: how the weight will be stored.
          hessian: `f32[length, length]`; solvers that do not need it report the output error by it.

        Raises:
          ValueError: a wrong shape, NaN or infinity, or a codec that the solver does not know.
        """


def check_inputs(w: jax.Array, hessian: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Both as float32; refuses wrong shapes, NaN and infinity by name."""
    w = jnp.asarray(w, jnp.float32)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"`w` must be [rows, length], neither 0; got {w.shape}.")
    _check_finite("w", w)
    if hessian is None:
        return w, None
    hessian = jnp.asarray(hessian, jnp.float32)
    if hessian.shape != (w.shape[-1],) * 2:
        raise ValueError(
            f"`hessian` must be [length, length] = {(w.shape[-1],) * 2} for a weight of shape "
            f"{w.shape}; got {hessian.shape}."
        )
    _check_finite("hessian", hessian)
    return w, hessian


def _check_finite(name: str, x: jax.Array) -> None:
    bad = int(jnp.sum(~jnp.isfinite(x)))
    if bad:
        raise ValueError(
            f"`{name}` of shape {x.shape} has {bad} values that are NaN or infinite; "
            "look for the overflow that made them."
        )


def require_groups(solver: str, codec: Codec) -> GroupCodec:
    """The codec, if it is a grid with groups; only rounding works on the others."""
    if not isinstance(codec, GroupCodec):
        raise ValueError(
            f"`codec` {codec.name!r} is no grid of groups, so solver {solver!r} cannot pick "
            'its codes; use solver "round", or a codec such as "int4-g64", "nf4-g64" or "mxfp4".'
        )
    return codec


def errors(
    w: jax.Array,
    codec: Codec,
    parts: Parts,
    hessian: jax.Array | None,
    *,
    output: jax.Array | None = None,
) -> Info:
    """The errors every solver reports (see `Solved.info`); `output` is `energy(w, hessian)`, if known."""
    if hessian is not None and output is None:
        output = energy(w, hessian)
    found = _errors(w, parts, hessian, output, codec=codec)
    return {name: float(value) for name, value in found.items()}


@jax.jit
def energy(x: jax.Array, hessian: jax.Array) -> jax.Array:
    """`tr(X H X^T)`, what `X` adds to the output."""
    return jnp.vdot(jnp.matmul(x, hessian, precision=jax.lax.Precision.HIGHEST), x)


@functools.partial(jax.jit, static_argnames="codec")
def _errors(
    w: jax.Array,
    parts: Parts,
    hessian: jax.Array | None,
    output: jax.Array | None,
    *,
    codec: Codec,
) -> dict[str, jax.Array]:
    tiny = jnp.finfo(jnp.float32).tiny
    error = w - codec.decode(parts, w.shape[-1])
    found = {"weight_error": jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(w), tiny)}
    if hessian is not None and output is not None:
        found["output_error"] = energy(error, hessian) / jnp.maximum(output, tiny)
    return found


@functools.partial(jax.jit, static_argnames="codec")
def encode(w: jax.Array, *, codec: Codec) -> Parts:
    """`codec.encode`, jitted."""
    return codec.encode(w)
