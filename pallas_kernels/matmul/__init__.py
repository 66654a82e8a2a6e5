"""Matmul with a packed right side.

Letters: ``M`` rows of `x`, ``K`` the contracted axis, ``N`` rows of the weight as it is stored, ``B`` batch axes.
"""

from __future__ import annotations

from typing import Any

import jax

from ..checks import check_implementation
from ..codecs import Packed
from . import dispatch
from .dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS


def matmul(
    x: jax.Array,
    w: Packed,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """``x @ w.T`` for a packed `w`, without holding more than a tile of the decoded `w`.

    Args:
      x: ``[*B, M, K]``, float.
      w: a packed ``[*B, N, K]``, encoded along K.
      precision: as in `jax.lax.dot_general`. By default `x` is rounded to bfloat16 on a TPU, and on a Hopper GPU one or
        two rows (up to 4 for 2 bits) to 16 bits, relative to the largest of 64 or 128 columns; else it is not.
      preferred_element_type: as in `jax.lax.dot_general`.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has for these shapes.

    Returns:
      ``[*B, M, N]``. Gradients flow to `x` and to the float parts of `w`; the decoded weight is not kept
      for the backward pass.

    Raises:
      ValueError: for shapes that do not fit, or an unknown `implementation`.
      NotImplementedError: where the named implementation can't take these operands, with the reason.
    """
    if x.ndim != w.ndim or x.shape[-1] != w.shape[-1] or x.shape[:-2] != w.shape[:-2]:
        raise ValueError(
            f"`x` {x.shape} and `w` {w.shape} do not fit: expected [*B, M, K] and [*B, N, K]"
        )
    check_implementation(implementation, IMPLEMENTATIONS)
    return dispatch.run(x, w, precision, preferred_element_type, implementation)


def kernel_name(x: Any, w: Packed) -> str:
    """What `matmul` will run for `x` (its shape and dtype) and `w` here, for reports."""
    return dispatch.describe(x, w)
