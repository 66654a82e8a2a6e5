"""Weight-only matmul on Hopper for many rows of x: `tiles`, whose codes are decoded on the way.

The two warpgroups that multiply decode the next 64 columns in their registers while the tensor cores work on these.
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
from ..codecs import Packed
from ..hopper import ROWS
from . import tiles
from .problem import in_halves
from .tiles import TALL, WORKERS, Item

STEP = 64  # columns of a step, of x in 16 bits


@dataclasses.dataclass(frozen=True)
class Config(tiles.Config):
    """How a matmul is cut; see `tiles.Config`.

    Attributes:
      code_stages: of the ring of packed weights.
    """

    code_stages: int = 2


def refusal(w: Packed) -> str:
    """Why this kernel can't take what `mosaic_gpu` can; "" where it can."""
    n, k = w.shape[-2:]
    group = getattr(w.codec, "group", None) or k
    if n < TALL:
        return f"N = {n} is below {TALL}"
    if group % STEP and STEP % group and group < k:
        return f"groups of {group}"
    plan = hopper.plan_of(w.codec)
    if k // plan.pieces % wide(plan):
        return f"K = {k} is no multiple of {wide(plan) * plan.pieces}"
    return ""


def shared_bytes(config: Config, plan: hopper.Plan) -> int:
    """Bytes of shared memory that a block takes, barriers not counted."""
    codes = config.code_stages * plan.streams * TALL * wide(plan)
    return tiles.shared_bytes(config) + codes + hopper.lookup_bytes(plan)


def wide(plan: hopper.Plan, step: int = STEP) -> int:
    """Bytes of a row in a tile of codes: at least two steps, whose registers take turns."""
    return step * max(1, 2 // plan.pieces)


def matmul(
    x: jax.Array, w: Packed, config: Config, *, out_dtype: Any = None, interpret: bool = False
) -> jax.Array:
    """``[B, M, K] x [B, N, K] -> [B, M, N]``, summed in float32, of `out_dtype` (None: as x)."""
    if x.dtype == jnp.float32:
        return in_halves(matmul, x, w, config, out_dtype, interpret)
    problem = Problem.of(x, w, config, out_dtype, interpret)
    codes, tables = problem.operands(w)
    return problem.run(Block, x, codes, *tables)


class Problem(tiles.Tiles):
    @property
    def wide(self) -> int:
        """Bytes of a row in a tile of codes."""
        return wide(self.plan, self.step)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Of a tile of codes: which bytes of it, and which piece of them."""
        return [(h, i) for h in range(self.wide // self.step) for i in range(self.plan.pieces)]

    @property
    def tiles_k(self) -> int:
        """Tiles of codes for a tile of the result."""
        return self.piece // self.wide

    def scratch(self) -> dict[str, Any]:
        c, shape = self.config, (TALL, self.wide)
        return super().scratch() | {
            "codes": plgpu.SMEM(
                (c.code_stages, self.plan.streams, *shape),
                jnp.uint8,
                transforms=hopper.tiled(jnp.uint8, self.wide),
            ),
            "packed": plgpu.Barrier(num_arrivals=self.plan.streams, num_barriers=c.code_stages),
            "taken": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=c.code_stages),
            "full": plgpu.Barrier(num_barriers=c.stages),
            **hopper.lookup_scratch(self.plan, self.interpret),
        }


class Block(tiles.Block):
    def prepare(self) -> None:
        p = self.problem
        hopper.fill_lookup(self.scratch.get("lookup"), p.plan, p.dtype, WORKERS + 1)

    # the warpgroup that fetches

    def fetch(self) -> None:
        p, c = self.problem, self.problem.config

        def one(t: Any, carry: Any) -> Any:
            item = self.item(t)

            def step(j: Any, carry: Any) -> Any:
                i, slot = carry
                column = (item.start + j) * p.wide
                place = lax.rem(i, c.code_stages)
                taken = lambda: plgpu.barrier_wait(self.barrier("taken", place))
                pl.when(i >= c.code_stages)(taken)
                self.fetch_codes(place, item, column)
                for k, (half, piece) in enumerate(p.steps):
                    empty = lambda slot=slot: plgpu.barrier_wait(self.barrier("empty", slot))
                    pl.when(i * len(p.steps) + k >= c.stages)(empty)
                    self.fetch_x(slot, item, piece * p.piece + column + half * p.step)
                    slot = self.after(slot)
                return i + 1, slot

            return lax.fori_loop(0, item.count, step, carry)

        total, _ = lax.fori_loop(0, self.mine, one, (jnp.int32(0), jnp.int32(0)))
        self.drain("taken", total, c.code_stages)
        self.drain("empty", total * len(p.steps), c.stages)

    def fetch_codes(self, slot: Any, item: Item, column: Any) -> None:
        p = self.problem
        rows = pl.ds(item.entry * p.n + item.column, TALL)
        for stream in range(p.plan.streams):
            source = self.codes.at[rows, pl.ds(stream * p.piece + column, p.wide)]
            to = self.scratch["codes"].at[slot, stream]
            plgpu.copy_gmem_to_smem(source, to, self.barrier("packed", slot))

    # those that multiply

    def multiply(self) -> None:
        zero = jnp.int32(0)

        def step(t: Any, carry: Any) -> Any:
            item, state = carry
            is_last = t + 1 == self.mine
            after = self.item(jnp.where(is_last, t, t + 1))
            total, state = self.product(item, after, is_last, state)
            self.write(item, total)
            return after, state

        item = self.item(zero)
        entries = self.entries(item, zero)
        plgpu.barrier_wait(self.barrier("packed", zero))
        words = self.words(zero, 0)
        state = zero, zero, words, self.decoded(words, 0, 0, entries), entries
        lax.fori_loop(0, self.mine, step, (item, state))
        self.finish()

    def entries(self, item: Item, j: Any) -> Any:
        """Table entries for the j-th tile of codes of an item: for each step, part of its columns, and table."""
        p = self.problem
        row = item.entry * p.n + item.column + self.wg * ROWS
        load = lambda table, at: hopper.load_table(
            table, p.n_groups, row, at, p.group, True, p.interpret
        )
        start = (item.start + j) * p.wide
        parts = range(0, p.step, min(p.group, p.step))
        tables = self.tables[: p.plan.terms]
        return {
            (half, piece): [
                [load(t, piece * p.piece + start + half * p.step + part) for t in tables]
                for part in parts
            ]
            for half, piece in p.steps
        }

    def words(self, slot: Any, half: int) -> Any:
        """A step's bytes of each row of a tile of codes, in registers."""
        p, rows = self.problem, pl.ds(self.wg * ROWS, ROWS)
        tiles = [self.scratch["codes"].at[slot, s, rows] for s in range(p.plan.streams)]
        return hopper.load_in_order(tiles, half, p.wide, p.interpret)

    def decoded(self, words: Any, half: int, piece: int, entries: Any) -> jax.Array:
        """What a step multiplies."""
        p = self.problem
        terms = [hopper.terms_of(p.plan, piece, own, p.dtype) for own in entries[half, piece]]
        return hopper.expand_in_order(
            words, piece, terms, p.plan, dtype=p.dtype, interpret=p.interpret,
            lookup=self.scratch.get("lookup"),
        )  # fmt: skip

    def product(self, item: Item, after: Item, is_last: Any, state: Any) -> tuple[jax.Array, Any]:
        """The sums of an item, transposed, ``[64, block_m]``, and the state for the next one.

        Args:
          after: the next item.
          is_last: whether there is none.
          state: slots of codes and of x, the tile of codes, its decoded first piece and its table entries.
        """
        p, c = self.problem, self.problem.config
        staged = self.scratch["staged"].at[self.wg] if p.interpret else None

        def scope(acc: Any) -> Any:
            def step(j: Any, state: Any) -> Any:
                place, slot, words, weights, now = state
                ends = j + 1 == item.count
                next_item = jax.tree.map(lambda x, y: jnp.where(ends, y, x), item, after)
                later = self.entries(next_item, jnp.where(ends, 0, j + 1))
                for k in range(len(p.steps)):
                    plgpu.barrier_wait(self.barrier("full", slot))
                    hopper.mma(acc, weights, self.scratch["x"].at[slot].T, staged)
                    plgpu.wgmma_wait(1)  # for the step before: decoding goes on beside this one
                    before = self.before(slot)
                    pl.when((j > 0) | (k > 0))(lambda before=before: self.release(before))
                    slot = self.after(slot)
                    half, piece = p.steps[(k + 1) % len(p.steps)]
                    if k + 1 == len(p.steps):
                        plgpu.barrier_arrive(self.barrier("taken", place))
                        place = lax.rem(place + 1, c.code_stages)
                        packed = lambda place=place: plgpu.barrier_wait(
                            self.barrier("packed", place)
                        )
                        pl.when(~(ends & is_last))(packed)
                        now = later
                    if piece == 0:
                        words = self.words(place, half)
                    weights = self.decoded(words, half, piece, now)
                return place, slot, words, weights, now

            state_ = lax.fori_loop(0, item.count, step, state)
            total = self.settled(acc) * p.weight_unit
            self.release(self.before(state_[1]))
            return total, state_

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, c.block_m), p.sums))
