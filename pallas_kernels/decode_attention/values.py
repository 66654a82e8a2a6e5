"""Values as the kernel reads them: arrays that tiles of 64 tokens are copied from, and the operands made of a tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper
from ..codecs import PerToken
from ..hopper import ROWS
from .keys import Slot, plan_of
from .rows import Rows


def refusal(rows: Rows) -> str:
    """Why values can't be taken; "" where they can."""
    codec = rows.codec
    plan = plan_of(codec.codec) if isinstance(codec, PerToken) else None
    if plan is None:
        return f"no kernel for {codec.name}"
    row_bytes, group = rows.width * plan.bits // 8, codec.codec.group  # pyright: ignore
    if rows.width % 64 or row_bytes not in (16, 32, 64, 128):
        return f"rows of {rows.width} elements in {codec.name} are {row_bytes} bytes, not 16, 32, 64 or 128"
    if group is not None and group < rows.width and group % 16:
        return f"groups of {group} are no multiple of 16"
    return ""


@dataclasses.dataclass(frozen=True)
class Values:
    """Values in rows.

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
    def of(cls, rows: Rows) -> Values:
        codec: Any = rows.codec.codec  # pyright: ignore[reportAttributeAccessIssue]
        groups, row_bytes = rows.parts["scale"].shape[-1], rows.parts["codes"].shape[-1]
        return cls(hopper.plan_of(codec), row_bytes, codec.group or rows.width, groups, rows.width)

    @property
    def tiles(self) -> int:
        """64 elements of a row each."""
        return self.width // ROWS

    @property
    def spread(self) -> int:
        """float16 numbers of a tile's tables as `hopper.spread_scales` has them."""
        return self.groups * ROWS * self.plan.terms

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

    def stage(self, refs: list[Any], to: Any, interpret: bool) -> None:
        """The tile's tables as `operands` wants them; a barrier comes before that."""
        hopper.spread_scales(to, refs[1:], self.plan, self.groups, interpret)

    def operands(self, refs: list[Any], scales: Any, interpret: bool) -> list[jax.Array]:
        """``f16[64 elements, 64 tokens]`` for each 64 elements."""
        return hopper.expand_transposed(
            refs[0], scales, self.plan,
            group=self.group, row_bytes=self.row_bytes, interpret=interpret,
        )  # fmt: skip
