"""Rows that are packed token by token, as the kernel copies them: what keys and values have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper import ROWS
from .rows import Rows

Slot = tuple[tuple[int, ...], Any, tuple[Any, ...]]  # of a tile: shape, dtype, transforms


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows, a token each.

    Attributes:
      row_bytes: of codes.
      group, groups: elements that a scale covers, and scales of a row.
      width: elements of a row.
    """

    plan: hopper.Plan
    row_bytes: int
    group: int
    groups: int
    width: int

    @classmethod
    def of(cls, rows: Rows) -> Self:
        codec: Any = rows.codec.codec  # pyright: ignore[reportAttributeAccessIssue]
        groups, row_bytes = rows.parts["scale"].shape[-1], rows.parts["codes"].shape[-1]
        return cls(hopper.plan_of(codec), row_bytes, codec.group or rows.width, groups, rows.width)

    def arrays(self, rows: Rows) -> list[jax.Array]:
        """Codes ``[B K S, row_bytes]``, flat where those are less than 64, and flat tables."""
        shape = (-1, self.row_bytes) if self.row_bytes >= 64 else (-1,)
        tables = (rows.parts[name].reshape(-1) for name in self.plan.tables)
        return [rows.parts["codes"].reshape(shape), *tables]

    def slots(self, arrays: list[jax.Array]) -> list[Slot]:
        """Of a tile, for each of the arrays."""
        codes: Slot = (ROWS * self.row_bytes,), jnp.uint8, ()
        if self.row_bytes >= 64:
            codes = (ROWS, self.row_bytes), jnp.uint8, hopper.tiled(jnp.uint8, self.row_bytes)
        return [codes, *(((ROWS * self.groups,), x.dtype, ()) for x in arrays[1:])]
