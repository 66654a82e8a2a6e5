"""Codes to the bfloat16 numbers that the TPU's matrix unit multiplies.

A word holds the bytes of four rows. A code of less than 8 bits is put into the mantissa of a power of two, for two
rows with one shift, one mask and one logical or, and that power becomes a part of the zero point. That is exact, needs
no conversion, and changes the order of the rows, which a contraction does not care for: `Levels.order`. 16 levels are
looked up for both codes of a byte at once: of 256 pairs half are negatives of the others, and 128 fill a register.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ..codecs.integer import Int
from ..codecs.lloyd_max import LEVELS, LloydMax
from ..tpu import LANES, four_bytes, lookup

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

    @property
    def looked_up(self) -> bool:
        return self.mean and self.bits == 4

    def constants(self) -> list[np.ndarray]:
        """What `of` wants besides codes: levels of both codes of a byte, as bits of bfloat16, ``i32[1, LANES]``."""
        if not self.looked_up:
            return []
        level = np.asarray((*(-x for x in reversed(LEVELS[4])), *LEVELS[4]), jnp.bfloat16)
        bits, byte = level.view(np.uint16).astype(np.uint32), np.arange(LANES)
        return [(bits[byte & 15] | bits[byte >> 4] << 16).view(np.int32)[None]]

    def of(self, codes: jax.Array, constants: list[jax.Array]) -> list[jax.Array]:
        """Levels ``bf16[n, lanes]`` of each piece of bytes ``[n, lanes]``."""
        words = pltpu.bitcast(codes, jnp.int32)
        if self.bits == 8:
            return [pltpu.bitcast(words ^ four_bytes(128), jnp.int8).astype(jnp.bfloat16)]
        if self.looked_up:
            pieces = _looked_up(words, *constants)
        else:
            pieces = [self._piece(words, i) for i in range(self.pieces)]
        return [jnp.concatenate(x, axis=0) for x in pieces]

    def _piece(self, words: jax.Array, piece: int) -> list[jax.Array]:
        """Rows of bytes 0 and 2, and of bytes 1 and 3, of the words."""
        start = piece * self.bits
        if self.mean:
            words = _three_and_ten((words >> start) & four_bytes(3))
            return [_pairs(words, 8 * half, 31, 32) for half in range(2)]
        mask, one = (3, 4) if self.bits == 2 else (15, 128)
        return [_pairs(words, start + 8 * half, mask, one) for half in range(2)]


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


def _looked_up(words: jax.Array, table: jax.Array) -> list[list[jax.Array]]:
    """For each piece, what `Levels._piece` gives."""
    high = jnp.int32(-(2**16))
    found = [_both_codes(words, i, table) for i in range(4)]
    pairs = list(zip(found[:2], found[2:]))
    lower = [a & ~high | b << 16 for a, b in pairs]
    upper = [lax.shift_right_logical(a, 16) | b & high for a, b in pairs]
    return [[pltpu.bitcast(x, jnp.bfloat16) for x in piece] for piece in (lower, upper)]


def _both_codes(words: jax.Array, byte: int, table: jax.Array) -> jax.Array:
    """Levels of the lower code of a byte, and above it of the upper one, as bits of bfloat16."""
    code = (words << (24 - 8 * byte) if byte < 3 else words) >> 24
    sign = code >> 31
    index, n = code ^ sign, words.shape[0]
    tiles = [index[:, i : i + LANES] for i in range(0, words.shape[1], LANES)]
    table = jnp.broadcast_to(table, (n, LANES))
    found = [lookup(table, x) for x in tiles]
    return jnp.concatenate(found, axis=1) ^ (sign & jnp.int32(-0x7FFF8000))
