"""Some rows of x on Hopper: `mosaic_gpu`, whose blocks take several strips of 64 rows of the weight.

What a block copies of x serves all its strips: with one strip a block, 64 rows of x are more bytes for a multiprocessor
to take in than 4-bit codes are. A warpgroup of its own starts the copies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..hopper import ROWS
from . import mosaic_gpu
from .mosaic_gpu import FewRows, Warpgroup

REGISTERS = {2: (232, 40), 4: (112, 32)}  # a thread's, by strips: of those that multiply and fetch


@dataclasses.dataclass(frozen=True)
class Config(mosaic_gpu.Config):
    """How a matmul is cut into blocks; `split` is 1.

    Attributes:
      strips: of a block, 2 or 4: a warpgroup each. The weight has at least as many rows as they.
    """

    split: int = 1
    strips: int = 2

    @property
    def kind(self) -> type[FewRows]:
        return Tall


class Tall(FewRows):
    """The product of some rows, by blocks of several strips."""

    config: Config

    @property
    def body(self) -> type[mosaic_gpu.Body]:
        return Body

    @property
    def scales_sums(self) -> bool:
        return False

    @property
    def warpgroups(self) -> int:
        return self.config.strips + 1

    def scratch(self) -> dict[str, Any]:
        c = self.config
        return super().scratch() | {
            "empty": plgpu.Barrier(num_arrivals=c.strips, num_barriers=c.stages),
            "words": plgpu.SMEM((c.strips, 1), jnp.int32),
        }


class Body(mosaic_gpu.Body):
    def __call__(self, *refs: Any, **scratch: Any) -> None:
        x, codes, *tables, out = refs
        p, strips = self.problem, self.config.strips
        wg, z = lax.axis_index("wg"), lax.axis_index("z")
        # the last block begins earlier instead of ending later
        column = jnp.minimum(lax.axis_index("n") * p.height, p.n - p.height)
        one = Strip(
            body=self, x=x, codes=codes, tables=tables, out=out, scratch=scratch, wg=wg,
            entry=z // self.config.grid_k, column=column + lax.rem(wg, strips) * ROWS,
            row=lax.axis_index("m") * self.config.block_m,
            first=lax.rem(z, self.config.grid_k) * p.mine,
        )  # fmt: skip
        hopper.fill_lookup(scratch.get("lookup"), self.plan, p.dtype, strips + 1)

        @pl.when(wg == strips)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[strips][1], action="decrease")
            one.fetch_all()

        @pl.when(wg < strips)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[strips][0], action="increase")
            one.store(one.product(), z * self.out_m)


class Strip(Warpgroup):
    """A warpgroup and its strip; the one that fetches has the first one's."""

    @property
    def ring(self) -> int:
        return 0

    @property
    def rows(self) -> Any:
        return pl.ds(self.wg * ROWS, ROWS)

    def fetch_all(self) -> None:
        stages = self.c.stages

        def step(i: Any, carry: None) -> None:
            empty = self.barrier("empty", lax.rem(i, stages))
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty))
            self.fetch(i)

        lax.fori_loop(0, self.last, step, None)

    def release(self, i: Any) -> None:
        """Says that stage `i` was read, to the one that refills its slot."""
        hopper.sync(self.interpret)
        empty = self.barrier("empty", lax.rem(i, self.c.stages))
        pl.when(i + self.c.stages < self.last)(lambda: plgpu.barrier_arrive(empty))

    def settled(self, acc: Any) -> jax.Array:
        return hopper.settled(acc[...], self.scratch["words"].at[self.wg], self.interpret)
