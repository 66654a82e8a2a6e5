"""What the Hopper matmuls share: the static facts of a call, the tables, and a float32 `x`."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from .. import hopper
from ..codecs import Packed


@dataclasses.dataclass(frozen=True)
class Problem:
    """A matmul ``[B, M, K] x [B, N, K]``, and how it is cut.

    Attributes:
      config: of the kernel.
      group, n_groups: codes that a table entry covers, and entries of a row.
      dtype, out_dtype: of x and of the result.
    """

    config: Any
    plan: hopper.Plan
    batch: int
    m: int
    n: int
    k: int
    group: int
    n_groups: int
    dtype: Any
    out_dtype: Any
    interpret: bool

    @classmethod
    def of(cls, x: jax.Array, w: Packed, config: Any, out_dtype: Any, interpret: bool) -> Self:
        (batch, m, k), n = x.shape, w.shape[-2]
        plan = hopper.plan_of(w.codec)
        group = getattr(w.codec, "group", None) or k
        n_groups, out_dtype = w.parts[plan.tables[0]].shape[-1], jnp.dtype(out_dtype or x.dtype)
        return cls(config, plan, batch, m, n, k, group, n_groups, x.dtype, out_dtype, interpret)

    @property
    def piece(self) -> int:
        """Columns of a piece of a row: bytes of a stream."""
        return self.k // self.plan.pieces

    @property
    def decoded(self) -> hopper.Plan:
        """What weights are made by."""
        return self.plan

    @property
    def weight_unit(self) -> float:
        """What a weight is to what is made of its codes."""
        return hopper.weight_unit(self.decoded, self.dtype)

    def terms(self, entries: list[list[jax.Array]]) -> list[tuple[jax.Array, ...]]:
        """Of the table entries of each piece what decoding wants."""
        plan = self.decoded
        return [hopper.terms_of(plan, i, own, self.dtype) for i, own in enumerate(entries)]

    def operands(self, w: Packed) -> tuple[jax.Array, list[jax.Array]]:
        """Codes ``[B * N, bytes]``, and for each table an entry for each row and group, ``[B * N, n_groups]``."""
        b, n = self.batch, self.n
        table = lambda part: jnp.broadcast_to(part, (b, n, part.shape[-1])).reshape(b * n, -1)
        tables = [table(w.parts[name]) for name in self.plan.tables]
        return w.parts["codes"].reshape(b * n, -1), tables


def in_halves(
    run: Any, x: jax.Array, w: Packed, config: Any, out_dtype: Any, interpret: bool
) -> jax.Array:
    """A kernel's product with a float32 `x`, as two bfloat16 ones, its high and its low half: twice as many rows."""
    halves = jnp.concatenate(hopper.in_two(x), axis=1).astype(jnp.bfloat16)
    out = run(halves, w, config, out_dtype=jnp.float32, interpret=interpret)
    return (out[:, : x.shape[1]] + out[:, x.shape[1] :]).astype(out_dtype or x.dtype)
