"""Rounding: the codec's own encoding, the nearest level of a grid over each group's full range."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from stowax.pallas_kernels.codecs import Codec

from .base import Solved, Solver, check_inputs, encode, errors


@dataclasses.dataclass(frozen=True)
class Rounding(Solver):
    """See `rounding`."""

    name: ClassVar[str] = "round"

    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        w, hessian = check_inputs(w, hessian)
        parts = encode(w, codec=codec)
        return Solved(parts, errors(w, codec, parts, hessian))


def rounding() -> Rounding:
    """Rounds every weight to the nearest level; works with every codec."""
    return Rounding()
