"""Codes to the bfloat16 numbers that the TPU's matrix unit multiplies.

A word holds the bytes of four rows. A code of less than 8 bits is put into the mantissa of a power of two, for two
rows with one shift, one mask and one logical or, and that power becomes a part of the zero point. That is exact, needs
no conversion, and changes the order of the rows, which a contraction does not care for: `Levels.order`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from ..codecs.integer import Int
from ..codecs.lloyd_max import LEVELS, LloydMax
from ..hopper.polynomial import odd_polynomial
from ..tpu import four_bytes

THREE_AND_TEN = (0, 7, 13, 20)  # less 10: four Lloyd-Max levels, but for 0.07 %


def levels_of(codec: Any) -> Levels | None:
    """None where a codec has none."""
    if isinstance(codec, Int) and codec.bits in (2, 4, 8) and not codec.per_tensor:
        base = {2: 4, 4: 128, 8: -128}[codec.bits]  # 16 instead of 128 would cost a shift more
        if not codec.symmetric:
            return Levels(codec.bits, zero_table=True, zero=base)
        return Levels(codec.bits, zero=base + codec.middle)
    if isinstance(codec, LloydMax) and codec.bits == 2:
        small, large = LEVELS[2]
        unit = (3 * small + 10 * large) / (3**2 + 10**2)
        return Levels(2, zero=32 + 10, mean=True, unit=unit)
    return Levels(4, mean=True) if isinstance(codec, LloydMax) and codec.bits == 4 else None


@dataclasses.dataclass(frozen=True)
class Levels:
    """A group's values are ``unit * scale * (level - zero) + mean``.

    Attributes:
      bits: of a code.
      zero_table: a table holds the zero points; `zero` is added to them.
      zero: of all groups.
      mean: a table holds means; they are 0 otherwise.
    """

    bits: int
    zero_table: bool = False
    zero: float = 0
    mean: bool = False
    unit: float = 1

    @property
    def pieces(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def tables(self) -> list[str]:
        return ["scale", *["zero"] * self.zero_table, *["mean"] * self.mean]

    def load(self, tables: list[jax.Array]) -> list[jax.Array]:
        """Of float32 tables as stored: scales with their units, the zero points of levels, means."""
        scale, *rest = tables
        if self.zero_table:
            rest[0] = rest[0] + self.zero
        return [scale * self.unit, *rest]

    def order(self, n: int) -> np.ndarray:
        """Which code of ``[pieces, n]`` a row of the concatenated `of` holds, for n rows of bytes."""
        if self.bits == 8:
            return np.arange(n)
        rows = np.arange(self.pieces * n).reshape(self.pieces, n // 4, 2, 2)
        return rows.transpose(0, 3, 1, 2).reshape(-1)

    def of(self, codes: jax.Array) -> list[jax.Array]:
        """Levels ``bf16[n, lanes]`` of each piece of bytes ``[n, lanes]``."""
        words = pltpu.bitcast(codes, jnp.int32)
        if self.bits == 8:
            return [pltpu.bitcast(words ^ four_bytes(128), jnp.int8).astype(jnp.bfloat16)]
        return [jnp.concatenate(self._piece(words, i), axis=0) for i in range(self.pieces)]

    def _piece(self, words: jax.Array, piece: int) -> list[jax.Array]:
        """Rows of bytes 0 and 2, and of bytes 1 and 3, of the words."""
        start = piece * self.bits
        if self.mean and self.bits == 2:
            words = _three_and_ten((words >> start) & four_bytes(3))
            return [_pairs(words, 8 * half, 31, 32) for half in range(2)]
        mask, one = (3, 4) if self.bits == 2 else (15, 128)
        pairs = [_pairs(words, start + 8 * half, mask, one) for half in range(2)]
        return [_sixteen(x) for x in pairs] if self.mean else pairs


def _pairs(words: jax.Array, start: int, mask: int, one: int) -> jax.Array:
    """`one`, a power of two, and what two fields of a word hold from bits `start` and ``start + 16`` on."""
    low = 8 - one.bit_length()  # the bit of bfloat16 that is worth 1
    shift = start - low
    words = words >> shift if shift > 0 else words << -shift if shift < 0 else words
    both = lambda field: jnp.int32(field << 16 | field)
    return pltpu.bitcast(words & both(mask << low) | both((134 - low) << 7), jnp.bfloat16)


def _three_and_ten(codes: jax.Array) -> jax.Array:
    """`THREE_AND_TEN` of four codes of 2 bits, a byte each."""
    return (codes << 3) - codes - ((codes >> 1) & four_bytes(1))


def _sixteen(codes: jax.Array) -> jax.Array:
    """Lloyd-Max levels of 128 + code, by a polynomial; off by 0.12 % of the deviation."""
    half = LEVELS[4]
    down, coefficients = odd_polynomial((*(-x for x in reversed(half)), *half))
    x = codes.astype(jnp.float32) - (128 + 7.5)
    square, y = x * x, None
    for i in reversed(range(len(coefficients))):
        c = coefficients[i] * 2.0 ** (-down * (2 * i + 1))
        y = jnp.full(x.shape, c) if y is None else y * square + c
    assert y is not None
    return (y * x).astype(jnp.bfloat16)
