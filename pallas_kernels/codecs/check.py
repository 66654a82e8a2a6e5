"""Refusing what no codec can store: NaN and inf by name, scales that overflow, empty tensors.

Values can only be looked at when they are there: under `jax.jit` (on tracers) only shapes and
dtypes are checked, and the caller validates before.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def validate(x: jax.Array, name: str = "x", *, batch_dims: int = 0) -> None:
    """Raises unless `x` is a non-empty float array of finite values.

    Args:
      x: array ``[*lead, length]``; a tracer is checked for shape and dtype only.
      name: what to call it in the error (a pytree path helps the reader).
      batch_dims: see `Codec.encode`.

    Raises:
      ValueError: counts NaN and inf and gives the first index; or names a bad shape or dtype.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` has dtype {x.dtype}; codecs store floats: convert it or leave it out"
        )
    if x.ndim == 0 or x.size == 0:
        raise ValueError(
            f"`{name}` has shape {x.shape}; expected [*lead, length] with at least one element"
        )
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(
            f"`batch_dims` is {batch_dims}; expected 0 to {x.ndim - 1}, the number of leading axes"
            f" of `{name}` {x.shape}"
        )
    if is_concrete(x) and not bool(_all_finite(x)):
        raise ValueError(_not_finite(x, name))


def validate_params(params: Mapping[str, jax.Array], x: jax.Array, codec: str) -> None:
    """Raises where a scale of concrete `x` left the range of its storage dtype."""
    if not is_concrete(x) or not all(is_concrete(p) for p in params.values()):
        return
    largest, finite, nonzero = _ranges(x, dict(params))
    for name, ok in finite.items():
        if not ok:
            raise ValueError(
                f"the `{name}` of {codec} overflows its dtype: `x` reaches {largest:.3g}. Store"
                " scales in float32 (add `-f32` to the codec) or scale the tensor down first"
            )
    if largest > 0 and not any(nonzero[name] for name in nonzero if name != "zero"):
        raise ValueError(
            f"the `scale` of {codec} underflows to zero: `x` reaches only {largest:.3g}. Store"
            " scales in float32 (add `-f32` to the codec) or scale the tensor up first"
        )


def is_concrete(x: jax.Array) -> bool:
    """Whether the values of `x` can be looked at now."""
    return not isinstance(x, Tracer)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()  # not max: XLA's on the CPU may lose a NaN


@jax.jit
def _ranges(x: jax.Array, arrays: dict[str, jax.Array]) -> tuple:
    """The largest |x|; for each array whether all of it is finite, and whether any is not 0."""
    finite = {k: jnp.isfinite(v).all() for k, v in arrays.items()}
    nonzero = {k: jnp.any(v != 0) for k, v in arrays.items()}
    return jnp.max(jnp.abs(x.astype(jnp.float32))), finite, nonzero


def _not_finite(x: jax.Array, name: str) -> str:
    values = np.asarray(x).astype(np.float32)
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    return (
        f"`{name}` holds {nan} NaN and {inf} infinite of {values.size} values, the first at index"
        f" {first}; codecs store finite values only: repair the tensor or leave it out"
    )
