"""Values as the kernel reads them: arrays that tiles of 64 tokens are copied from, and the operands made of a tile."""

from __future__ import annotations

from typing import Any

import jax

from .. import hopper
from ..hopper import ROWS
from .token_rows import TokenRows


class Values(TokenRows):
    """Values in rows."""

    @property
    def tiles(self) -> int:
        """64 elements of a row each."""
        return self.width // ROWS

    @property
    def spread(self) -> int:
        """float16 numbers of a tile's tables as `hopper.spread_scales` has them."""
        return self.groups * ROWS * self.plan.terms

    def stage(self, refs: list[Any], to: Any, interpret: bool) -> None:
        """The tile's tables as `operands` wants them; a barrier comes before that."""
        hopper.spread_scales(to, refs[1:], self.plan, self.groups, interpret)

    def operands(self, refs: list[Any], scales: Any, interpret: bool) -> list[jax.Array]:
        """``f16[64 elements, 64 tokens]`` for each 64 elements."""
        return hopper.expand_transposed(
            refs[0], scales, self.plan,
            group=self.group, row_bytes=self.row_bytes, interpret=interpret,
        )  # fmt: skip
