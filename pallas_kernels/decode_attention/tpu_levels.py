"""Codes to the levels that the TPU's matrix unit multiplies, exactly where they are integers.

A code goes to the top bits of its byte, four bytes to a word, and its highest bit is inverted: read as int8 that is
``2**(8 - bits) * (code - middle)``, with no subtraction, and the same for any number of bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..codecs.integer import Int
from ..codecs.lloyd_max import LEVELS, LloydMax
from ..hopper.polynomial import odd_polynomial
from ..tpu import four_bytes


def levels_of(codec: Any) -> Levels | None:
    """None where a codec has none."""
    if isinstance(codec, Int) and codec.bits in (2, 4, 8) and not codec.per_tensor:
        return Levels(codec.bits, None if codec.symmetric else "zero")
    return Levels(codec.bits, "mean") if isinstance(codec, LloydMax) and codec.bits in (2, 4) else None


@dataclasses.dataclass(frozen=True)
class Levels:
    """What the codes of a group stand for: ``unit * scale * level``, with a zero point or a mean.

    Attributes:
      bits: of a code.
      offset: a second table beside "scale": "zero", taken from codes, or "mean", added to the product.
    """

    bits: int
    offset: str | None

    @property
    def pieces(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def tables(self) -> tuple[str, ...]:
        return ("scale", self.offset) if self.offset else ("scale",)

    @property
    def unit(self) -> float:
        if self.offset != "mean":
            return 2.0 ** (self.bits - 8)
        small, large = LEVELS[2]
        return (3 * small + 10 * large) / (3**2 + 10**2) if self.bits == 2 else 1.0

    def zero(self, stored: jax.Array) -> jax.Array:
        """The level of a zero point."""
        return (stored - 2 ** (self.bits - 1)) * 2.0 ** (8 - self.bits)

    def of(self, codes: jax.Array, dtype: Any) -> list[jax.Array]:
        """Levels ``[n, lanes]`` of each piece of bytes ``[n, lanes]``."""
        words = pltpu.bitcast(codes, jnp.int32)
        if self.offset == "mean" and self.bits == 2:
            bytes_of = self._three_and_ten
        else:
            words ^= four_bytes(sum(1 << (self.bits * i - 1) for i in range(1, self.pieces + 1)))
            bytes_of = self._top_bits
        pieces = [pltpu.bitcast(bytes_of(words, i), jnp.int8) for i in range(self.pieces)]
        if self.offset == "mean" and self.bits == 4:
            return [_sixteen(x).astype(dtype) for x in pieces]
        return [x.astype(dtype) for x in pieces]

    def _top_bits(self, words: jax.Array, piece: int) -> jax.Array:
        below = 8 - self.bits
        up = below - piece * self.bits
        words = words << up if up else words
        words = words & four_bytes((2**self.bits - 1) << below) if below else words
        # the odd numbers of a grid that mirrors itself
        return words | four_bytes(1 << (below - 1)) if self.offset == "mean" else words

    def _three_and_ten(self, words: jax.Array, piece: int) -> jax.Array:
        """Of two bits -10, -3, 3 and 10: the levels of `LEVELS` but for 0.07 %."""
        codes = (words >> 2 * piece) & four_bytes(3)
        high = (codes >> 1) & four_bytes(1)
        return ((codes << 3) - codes - high + four_bytes(128 - 10)) ^ four_bytes(128)


def _sixteen(odd: jax.Array) -> jax.Array:
    """Lloyd-Max levels of 8 times -15, -13, ... 15, by a polynomial; off by 0.12 % of the deviation."""
    half = LEVELS[4]
    down, coefficients = odd_polynomial((*(-x for x in reversed(half)), *half))
    x = odd.astype(jnp.float32)
    step = 2.0 ** -(4 + down)  # what a polynomial of the code less the middle, over 2**down, wants
    square, y = x * x, jnp.float32(0)
    for i in reversed(range(len(coefficients))):
        y = y * square + coefficients[i] * step ** (2 * i + 1)
    return y * x
