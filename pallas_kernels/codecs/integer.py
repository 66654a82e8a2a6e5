"""Uniform integer grids of 1 to 8 bits, symmetric or with a zero point.

Asymmetric: ``x' = scale * (code - zero)`` with ``scale = (max - min) / (2**bits - 1)`` over a range that
is made to hold 0, and an integer zero point ``round(-min / scale)``; both are stored (the zero point
as float16 too, so that solvers may move it off the integers, as HQQ does).

Symmetric: ``x' = scale * (code - 2**(bits-1))``. The full range is used: the scale takes the sign that maps
the value of largest magnitude to the code 0, that is to level ``-2**(bits-1)`` (llama.cpp's Q4_0 does
the same). One bit is ``+-scale`` with the mean magnitude as scale (XNOR-Net).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .base import Parts
from .grouped import GroupCodec, Params


@dataclasses.dataclass(frozen=True)
class Int(GroupCodec):
    """``int<bits>[-g<group>|-tensor][-sym|-asym][-f32|-bf16]``.

    Attributes:
      bits_: 1 to 8.
      symmetric: no zero point. By default 8 bits are symmetric and fewer are not: below 8 bits a zero
        point buys more than the same bytes spent on smaller groups.
      per_tensor: one scale for the whole tensor (for each batch entry).
      scale_dtype: what scales and zero points are stored in.
    """

    bits_: int = 8
    symmetric: bool = True
    per_tensor: bool = False
    scale_dtype: str = "float16"
