"""8 bits times 8 bits on Hopper for many rows of x: `tiles`, whose operands the tensor cores take as they are.

The weight's bytes pass through registers, where those of integers change their sign bit; both scales come on the
finished sum. int8 x int8 adds up in int32 without an error, E4M3 x E4M3 in what the tensor cores keep of float32.
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
from . import tiles
from .tiles import LINE, TALL, Item

STEPS = 2  # in a turn of the loop, so that their registers take turns


def refusal(w: Packed) -> str:
    """Why this kernel can't take a weight that is multiplied in 8 bits; "" where it can."""
    n, k = w.shape[-2:]
    if n < TALL or n % 8:
        return f"N = {n} is no multiple of 8 from {TALL} on"
    if k % LINE:
        return f"K = {k} is no multiple of {LINE}"
    return ""


def shared_bytes(config: tiles.Config) -> int:
    """Bytes of shared memory that a block takes, barriers not counted."""
    return tiles.shared_bytes(config) + config.stages * TALL * LINE


def matmul(
    codes: jax.Array, scale: jax.Array, w: Packed, config: tiles.Config, *, out_dtype: Any,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """``[B, M, K] x [B, N, K] -> [B, M, N]``.

    Args:
      codes: int8 or float8_e4m3fn, x over its scale.
      scale: float32 ``[B, M, 1]``, of the rows of x.
      w: int8 or fp8_e4m3, a scale for each row at most.
      out_dtype: of the result.
    """
    problem = _Problem.of(codes, w, config, out_dtype, interpret)
    own, (rows,) = problem.operands(w)
    columns = scales_of_tokens(problem, scale)
    if interpret:  # which reads nothing outside of an array; bulk copies give zeros there
        across = -problem.k % (STEPS * LINE)
        own, codes = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, across)]) for x in (own, codes))
    return problem.run(_Block, codes, own, rows, columns)


class _Problem(tiles.Tiles):
    @property
    def tiles_k(self) -> int:
        """Turns of the loop for a tile of the result."""
        return pl.cdiv(self.k, STEPS * LINE)

    def scratch(self) -> dict[str, Any]:
        shape = (self.config.stages, TALL, LINE)
        return super().scratch() | {
            "codes": plgpu.SMEM(shape, jnp.uint8, transforms=hopper.tiled(jnp.uint8)),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=self.config.stages),
        }


class _Block(tiles.Block):
    def fetch(self) -> None:
        p, c = self.problem, self.problem.config

        def one(t: Any, carry: Any) -> Any:
            item = self.item(t)
            rows = pl.ds(item.entry * p.n + item.column, TALL)

            def step(j: Any, carry: Any) -> Any:
                i, slot = carry
                for k in range(STEPS):
                    empty = lambda slot=slot: plgpu.barrier_wait(self.barrier("empty", slot))
                    pl.when(i * STEPS + k >= c.stages)(empty)
                    column = ((item.start + j) * STEPS + k) * LINE
                    self.fetch_x(slot, item, column)
                    source = self.codes.at[rows, pl.ds(column, LINE)]
                    to = self.scratch["codes"].at[slot]
                    plgpu.copy_gmem_to_smem(source, to, self.barrier("full", slot))
                    slot = self.after(slot)
                return i + 1, slot

            return lax.fori_loop(0, item.count, step, carry)

        total, _ = lax.fori_loop(0, self.mine, one, (jnp.int32(0), jnp.int32(0)))
        self.drain("empty", total * STEPS, c.stages)

    def multiply(self) -> None:
        def step(t: Any, state: Any) -> Any:
            item = self.item(t)
            total, state = self.product(item, t + 1 == self.mine, state)
            self.write(item, total)
            return state

        zero = jnp.int32(0)
        plgpu.barrier_wait(self.barrier("full", zero))
        lax.fori_loop(0, self.mine, step, (zero, self.weights(zero)))
        self.finish()

    def weights(self, slot: Any) -> jax.Array:
        """What a step multiplies."""
        p = self.problem
        own = self.scratch["codes"].at[slot, pl.ds(self.wg * ROWS, ROWS)]
        return hopper.load_bytes(own, p.dtype, p.interpret)

    def product(self, item: Item, is_last: Any, state: Any) -> tuple[jax.Array, Any]:
        """The sums of an item before scales, transposed, ``[64, block_m]``, and the slot and weights after it."""
        p, c = self.problem, self.problem.config
        staged = self.scratch["staged"].at[self.wg] if p.interpret else None

        def scope(acc: Any) -> Any:
            def step(j: Any, state: Any) -> Any:
                slot, weights = state
                ends = is_last & (j + 1 == item.count)
                for k in range(STEPS):
                    hopper.mma(acc, weights, self.scratch["x"].at[slot].T, staged)
                    plgpu.wgmma_wait(1)  # for the step before: the next bytes come beside this one
                    before = self.before(slot)
                    pl.when((j > 0) | (k > 0))(lambda before=before: self.release(before))
                    slot = self.after(slot)
                    full = lambda slot=slot: plgpu.barrier_wait(self.barrier("full", slot))
                    pl.when(~ends)(full) if k + 1 == STEPS else full()
                    weights = self.weights(slot)
                return slot, weights

            slot, weights = lax.fori_loop(0, item.count, step, state)
            total = self.settled(acc)
            self.release(self.before(slot))
            return total, (slot, weights)

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, c.block_m), p.sums))

    def write(self, item: Item, total: jax.Array) -> None:
        super().write(item, scaled(self, item, total))


def scaled(block: tiles.Block, item: Item, total: jax.Array, unit: float = 1.0) -> jax.Array:
    """The sums of an item times `unit` and the scales of rows and of tokens, the last two tables of a block."""
    p, (*_, rows, columns) = block.problem, block.tables
    row = item.entry * p.n + item.column + block.wg * ROWS
    own = hopper.load_table(rows, 1, row, jnp.int32(0), p.k, True, p.interpret)
    own = own.astype(jnp.float32) * unit if unit != 1 else own
    first = item.entry * block.out_m + item.row
    return hopper.scale_sums(total, own, columns, first, p.batch * block.out_m, p.interpret)


def scales_of_tokens(problem: tiles.Tiles, scale: jax.Array) -> jax.Array:
    """``[B, M, 1]`` as `scaled` reads them."""
    pad = -problem.m % (problem.config.block_m if problem.interpret else 8)
    return jnp.pad(scale[..., 0], ((0, 0), (0, pad))).reshape(-1)
