"""Keys as the kernel reads them: arrays that tiles of 64 tokens are copied from, and the operands made of a tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import hopper
from ..codecs import PerChannel, PerToken
from ..codecs.integer import Int
from ..codecs.lloyd_max import LloydMax
from ..hopper import ROWS
from .rows import Rows
from .token_rows import Slot, TokenRows


def plan_of(codec: Any) -> hopper.Plan | None:
    """The plan of a codec whose rows can be attended to, None where there is none."""
    if not isinstance(codec, Int | LloydMax) or codec.bits not in (2, 4, 8):
        return None
    return None if getattr(codec, "per_tensor", False) else hopper.plan_of(codec)


def keys_of(rows: Rows) -> TokenKeys | ChannelKeys:
    codec: Any = rows.codec
    if isinstance(codec, PerChannel):
        return ChannelKeys(hopper.plan_of(codec.codec), codec.tokens, rows.width)
    return TokenKeys.of(rows)


def refusal(rows: Rows, by_warps: bool) -> str:
    """Why keys can't be taken; "" where they can."""
    codec = rows.codec
    if isinstance(codec, PerChannel):
        return ChannelKeys.refusal(rows)
    if (reason := rows_refusal(rows)) or by_warps:
        return reason
    row_bytes = rows.width * plan_of(codec.codec).bits // 8  # pyright: ignore
    if row_bytes not in (64, 128):
        return f"rows of {rows.width} elements in {codec.name} are {row_bytes} bytes, not 64 or 128"
    return hopper.refusal(codec.codec, rows.width)  # pyright: ignore


def rows_refusal(rows: Rows) -> str:
    """Why rows, a token each, can't be taken; "" where they can."""
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


class TokenKeys(TokenRows):
    """Keys in rows."""

    @property
    def pieces(self) -> int:
        """Parts of q, each with columns of its own."""
        return self.plan.pieces

    @property
    def order(self) -> np.ndarray:
        """Of 64 columns of q in an operand's: which comes where."""
        with jax.ensure_compile_time_eval():
            return np.asarray(hopper.permute_columns(jnp.arange(64)))

    @property
    def warp_order(self) -> np.ndarray:
        """The same for `scores`."""
        return hopper.rows_order()

    @property
    def units(self) -> list[float]:
        """Of `hopper.load_queries`."""
        whole, pieces = hopper.unit_of(self.plan), range(0, self.width, 16)
        return [hopper.unit_of(self.plan, i // self.row_bytes) / whole for i in pieces]

    def sums(self, queries: list[jax.Array], scratch: Any, interpret: bool) -> list[jax.Array]:
        """What `scores` wants beside the queries."""
        return hopper.query_sums(
            queries, self.plan, row_bytes=self.row_bytes, group=self.group, interpret=interpret
        )

    def scores(
        self,
        queries: list[jax.Array],
        sums: list[jax.Array],
        refs: list[Any],
        tiles: int,
        interpret: bool,
    ) -> list[jax.Array]:
        """Of a step, by warps, ``f32[64, 8]`` for each tile.

        Args:
          queries: from `hopper.load_queries`.
        """
        codes, *tables = refs
        return hopper.multiply_rows(
            queries, sums, codes, tables, self.plan,
            tiles=tiles, row_bytes=self.row_bytes, group=self.group, groups=self.groups, interpret=interpret,
        )  # fmt: skip

    def operands(self, refs: list[Any], interpret: bool) -> Iterator[tuple[jax.Array, int, int]]:
        """Operands ``f16[64, 64]`` of the tile in `refs`, each with the piece and the column of q that it meets."""
        codes, *tables = refs
        piece = self.width // self.pieces
        whole = hopper.is_whole(self.group, piece, self.row_bytes, self.groups)
        terms = []
        for i in range(self.pieces):
            load = lambda t, at=i * piece: hopper.load_table(
                t, self.groups, jnp.int32(0), jnp.int32(at), self.group, whole, interpret
            )
            terms.append(hopper.terms_of(self.plan, i, [load(t) for t in tables], jnp.float16))
        for half in range(self.row_bytes // 64):
            made = hopper.expand(
                [codes], half, terms, self.plan,
                dtype=jnp.dtype(jnp.float16), row_bytes=self.row_bytes, interpret=interpret,
            )  # fmt: skip
            for i, a in enumerate(made):
                yield a, i, 64 * half


@dataclasses.dataclass(frozen=True)
class ChannelKeys:
    """Keys in blocks of tokens, channel by channel.

    Attributes:
      tokens: of a block.
      width: channels.
    """

    plan: hopper.Plan
    tokens: int
    width: int

    pieces = 1

    @classmethod
    def refusal(cls, rows: Rows) -> str:
        codec: Any = rows.codec
        plan = plan_of(codec.codec)
        if plan is None:
            return f"no kernel for {codec.name}"
        if codec.tokens not in (32, 64) or (codec.codec.group or codec.tokens) < codec.tokens:
            return f"{codec.name}: a block has 32 or 64 tokens and a channel one group"
        if codec.codec.scale_dtype != "f16":
            return f"{codec.name}: scales are not float16"
        return f"{rows.width} channels are no multiple of 64" if rows.width % 64 else ""

    @property
    def order(self) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(hopper.permute_channels(jnp.arange(64)))

    def arrays(self, rows: Rows) -> list[jax.Array]:
        """All flat."""
        return [rows.parts[name].reshape(-1) for name in ("codes", *self.plan.tables)]

    def slots(self, arrays: list[jax.Array]) -> list[Slot]:
        blocks = ROWS // self.tokens * self.width
        codes: Slot = (blocks * self.tokens * self.plan.bits // 8,), jnp.uint8, ()
        return [codes, *(((blocks,), x.dtype, ()) for x in arrays[1:])]

    def operands(self, refs: list[Any], interpret: bool) -> Iterator[tuple[jax.Array, int, int]]:
        codes, *tables = refs
        for chunk in range(self.width // 64):
            made = hopper.expand_channels(
                codes, tables, chunk, self.plan,
                tokens=self.tokens, width=self.width, interpret=interpret,
            )  # fmt: skip
            yield made, 0, 64 * chunk

    @property
    def units(self) -> list[float]:
        return [1.0] * (self.width // 16)

    @property
    def warp_order(self) -> np.ndarray:
        return self.order

    def sums(self, queries: list[jax.Array], scratch: Any, interpret: bool) -> list[jax.Array]:
        hopper.write_offsets(scratch, self.plan, [None], interpret)
        return scratch

    def scores(
        self,
        queries: list[jax.Array],
        sums: list[jax.Array],
        refs: list[Any],
        tiles: int,
        interpret: bool,
    ) -> list[jax.Array]:
        codes, *tables = refs
        return hopper.multiply_channels(
            queries, sums, codes, tables, self.plan,
            tiles=tiles, tokens=self.tokens, interpret=interpret,
        )  # fmt: skip
