"""Very few rows of x in two digits of 8 bits, on Hopper: `mosaic_gpu`, whose weights become int8.

Of every 64 or 128 columns a row of x is rounded to 16 bits, relative to its largest element there, and multiplied as
``256 * high + low``; a block does so with its part of x while its first codes come (`hopper.Split`). Four codes at a
time become int8 by shifts and masks, where two became 16-bit floats, and the tensor cores take 32 columns in the time
of 16. The integer sums are exact; scales and zero points come on them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..codecs import Packed
from ..hopper import ROWS
from .mosaic_gpu import Config, FewRows, Warpgroup
from .problem import in_halves


def refusal(w: Packed) -> str:
    """Why this kernel can't take a weight that `mosaic_gpu` can; "" where it can."""
    plan, k = hopper.plan_of(w.codec), w.shape[-1]
    if plan.kind != "int":
        return f"{w.codec.name} is no integer"
    if k // plan.pieces % hopper.LINE:
        return f"K = {k} is no multiple of {hopper.LINE * plan.pieces}"
    group = getattr(w.codec, "group", None) or k
    return f"groups of {group}" if group < k and group % 64 else ""


def matmul(
    x: jax.Array, w: Packed, config: Config, *, out_dtype: Any = None, interpret: bool = False
) -> jax.Array:
    """``[B, M, K] x [B, N, K] -> [B, M, N]``, summed in float32, of `out_dtype` (None: as x).

    Args:
      config: of `row_bytes` 128.
    """
    if x.dtype == jnp.float32:
        return in_halves(matmul, x, w, config, out_dtype, interpret)
    problem = _Digits.of(x, w, config, out_dtype, interpret)
    return problem(x.reshape(-1, x.shape[-1]), *problem.operands(w))


def shared_bytes(config: Config, plan: hopper.Plan, piece: int) -> int:
    """Bytes of shared memory that a block takes for pieces of so many columns, barriers not counted."""
    c = config
    stages = pl.cdiv(pl.cdiv(piece, c.row_bytes), c.split * c.grid_k)
    codes = c.stages * plan.streams * ROWS * c.row_bytes
    x = stages * plan.pieces * 2 * c.block_m * c.row_bytes
    facts = 4 * stages * plan.pieces * (c.row_bytes // 64) * plan.terms * c.block_m
    sums = (c.split - 1) * ROWS * 2 * c.block_m * 4
    return c.split * (codes + x + facts) + sums


class _Digits(FewRows):
    @property
    def warpgroup(self) -> type[Warpgroup]:
        return _Warpgroup

    @property
    def is_apart(self) -> bool:
        return False

    @property
    def columns(self) -> int:
        return 2 * self.config.block_m

    @property
    def copies(self) -> int:
        return self.plan.streams

    @property
    def split(self) -> hopper.Split:
        """What a warpgroup makes of its part of x."""
        _, factor = hopper.excess(self.plan)
        block = self.config.block_m
        return hopper.Split(
            rows=min(self.m, block), block=block, pieces=self.plan.pieces, piece=self.piece,
            stages=self.mine, unit=self.unit, factor=factor, terms=self.plan.terms,
        )  # fmt: skip

    def x_scratch(self) -> dict[str, Any]:
        own = self.config.split
        tiles = hopper.tiled(jnp.int8, 64)
        return {
            "x": plgpu.SMEM((own, *self.split.shape), jnp.int8, transforms=tiles),
            "facts": plgpu.SMEM((own, self.split.facts), jnp.float32),
        }

    def padded(self, x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.pad(codes, ((0, 0), (0, self.reach)))


class _Warpgroup(Warpgroup):
    @property
    def p(self) -> Any:  # a _Digits
        return self.body.problem

    def fetch_x(self, slot: Any, column: Any, full: Any) -> None:
        pass

    def start(self) -> None:
        super().start()
        p, own = self.p, (self.scratch[name].at[self.wg] for name in ("x", "facts"))
        row = self.entry * p.m
        p.split(self.x, *own, row + self.row, row + p.m - 1, self.first, self.interpret)

    def unit_sums(self, i: Any) -> list[Any]:
        return []

    def stage_sums(self, i: Any, s: Any, entries: Any, sums: Any, total: jax.Array) -> Any:
        p, c, plan = self.p, self.c, self.body.plan
        plgpu.barrier_wait(self.barrier("full", lax.rem(i, c.stages)))
        halves = c.row_bytes // 64 // p.stage_units
        for unit in range(p.stage_units):
            for first in range(0, plan.pieces, c.in_flight):
                pieces = range(first, min(first + c.in_flight, plan.pieces))
                found = self.products(i, range(unit * halves, (unit + 1) * halves), pieces)
                for piece, x in zip(pieces, found):
                    own = [
                        hopper.pick(t, s * p.stage_units + unit, self.interpret)
                        for t in entries[piece]
                    ]
                    total = self.added(total, x, own, p.split.fact(i, piece, unit))
        self.release(i)
        return sums, total

    def added(self, total: jax.Array, x: jax.Array, entries: list[jax.Array], at: Any) -> jax.Array:
        """With the sums of a unit, of which facts are at `at`."""
        facts, block = self.scratch["facts"].at[self.wg], self.c.block_m
        load = lambda term: hopper.load_for_digits(facts, at + term * block, block, self.interpret)
        scale, *zero = entries
        middle, _ = hopper.excess(self.body.plan)
        less = [zero[0] - middle, load(1)] if zero else []
        return hopper.add_digits(total, x, scale, load(0), self.interpret, less)

    def products(self, i: Any, halves: range, pieces: range) -> list[jax.Array]:
        """Integer sums of some pieces over some times 64 bytes of stage `i`."""
        p, c, plan, slot = self.p, self.c, self.body.plan, lax.rem(i, self.c.stages)
        staged = self.scratch["staged"].at[self.wg] if self.interpret else None
        codes = [self.scratch["codes"].at[self.wg, slot, s] for s in range(plan.streams)]
        form: dict[str, Any] = {"row_bytes": c.row_bytes, "interpret": self.interpret}

        def scope(*sums: Any) -> list[jax.Array]:
            for half in halves:
                made = hopper.expand_bytes(codes, half, plan, pieces, **form)
                for acc, piece, a in zip(sums, pieces, made):
                    b = self.scratch["x"].at[self.wg, i, piece, :, pl.ds(64 * half, 64)].T
                    hopper.mma(acc, a, b, staged)
            return [acc[...] for acc in sums]

        kind = plgpu.WGMMAAccumulatorRef((ROWS, p.columns), jnp.int32)
        return pl.run_scoped(scope, *[kind] * len(pieces))
