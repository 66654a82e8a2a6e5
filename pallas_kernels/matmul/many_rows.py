"""Weight-only matmul on Hopper for many rows of x.

``out.T = w @ x.T``: two warpgroups of a block multiply 64 rows of the weight each by `block_m` rows of x; they decode
the next 64 columns in their registers while the tensor cores work on these. The third one starts the copies. Blocks
stay and take one tile of the result after another; where the last tiles are too few for all, blocks take parts of K of
them, whose sums XLA adds. The blocks of a cluster take neighbouring rows of the weight and fetch x once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..codecs import Packed
from ..hopper import ROWS
from .problem import Problem, in_halves

WORKERS = 2  # warpgroups that multiply
TALL = WORKERS * ROWS  # rows of the weight in a tile
STEP = 64  # columns of a step
REGISTERS = 232, 40  # of a thread of a worker, and of the one that fetches


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut.

    Attributes:
      block_m: rows of x in a tile of the result: a multiple of 16 up to 256.
      stages: of the ring of columns of x.
      code_stages: of the ring of packed weights.
      cluster: blocks that share x, 1 or 2.
      parts: of K, for the last tiles.
      blocks: that stay: a multiple of `cluster`.
    """

    block_m: int = 256
    stages: int = 5
    code_stages: int = 2
    cluster: int = 1
    parts: int = 1
    blocks: int = 132


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
    c = config
    x, out = c.stages * c.block_m * STEP * 2, WORKERS * 2 * ROWS * ROWS * 2
    return x + out + c.code_stages * plan.streams * TALL * wide(plan)


def wide(plan: hopper.Plan) -> int:
    """Bytes of a row in a tile of codes: at least two steps, whose registers take turns."""
    return STEP * max(1, 2 // plan.pieces)


def cut(config: Config, batch: int, m: int, n: int) -> tuple[int, int, int]:
    """Tiles of the result along M, of the whole batch; along N, for a whole cluster each; and those not parted.

    The last ones are as many as all clusters can take in whole rounds.
    """
    rows, columns = pl.cdiv(m, config.block_m) * batch, pl.cdiv(n, TALL * config.cluster)
    if config.parts == 1:
        return rows, columns, columns
    clusters = config.blocks // config.cluster
    return rows, columns, rows * columns // clusters * clusters // rows


def matmul(
    x: jax.Array, w: Packed, config: Config, *, out_dtype: Any = None, interpret: bool = False
) -> jax.Array:
    """``[B, M, K] x [B, N, K] -> [B, M, N]``, summed in float32, of `out_dtype` (None: as x)."""
    if x.dtype == jnp.float32:
        return in_halves(matmul, x, w, config, out_dtype, interpret)
    problem = _Problem.of(x, w, config, out_dtype, interpret)
    return problem(x, *problem.operands(w))


class _Problem(Problem):
    @property
    def wide(self) -> int:
        """Bytes of a row in a tile of codes."""
        return wide(self.plan)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Of a tile of codes: which 64 bytes of it, and which piece of them."""
        return [(h, i) for h in range(self.wide // STEP) for i in range(self.plan.pieces)]

    @property
    def packed(self) -> int:
        """Tiles of codes for a tile of the result."""
        return self.piece // self.wide

    @property
    def rows(self) -> int:
        """Tiles of the result along M, of the whole batch."""
        return cut(self.config, self.batch, self.m, self.n)[0]

    @property
    def columns(self) -> int:
        """Tiles of the result along N, for a whole cluster each."""
        return cut(self.config, self.batch, self.m, self.n)[1]

    @property
    def whole(self) -> int:
        """Those of them whose sums are not parted."""
        return cut(self.config, self.batch, self.m, self.n)[2]

    @property
    def items(self) -> int:
        """Sums for a whole cluster each."""
        return self.rows * (self.whole + (self.columns - self.whole) * self.config.parts)

    @property
    def clusters(self) -> int:
        """That stay."""
        return min(self.config.blocks // self.config.cluster, self.items)

    def __call__(self, x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> jax.Array:
        c = self.config
        # bulk copies know whole eights of rows, and the interpreter does not read or write outside of an array
        x = jnp.pad(x, ((0, 0), (0, -self.m % (c.block_m if self.interpret else 8)), (0, 0)))
        out_m = x.shape[1]
        cluster: dict[str, Any] = {}
        if c.cluster > 1:
            cluster = {"cluster": (c.cluster,), "cluster_names": ("cluster",)}
        kernel = plgpu.kernel(
            functools.partial(_body, self, out_m),
            out_type=self.outs(out_m),
            grid=(self.clusters,),
            grid_names=("block",),
            num_threads=WORKERS + 1,
            thread_name="wg",
            scratch_types=self.scratch(),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
            **cluster,
        )
        return self.joined(kernel(x, codes, *tables), out_m)[:, : self.m].astype(self.out_dtype)

    @property
    def staged(self) -> bool:
        """Whether sums leave through shared memory."""
        return self.whole > 0 and self.out_dtype.itemsize == 2

    def outs(self, out_m: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the kernel writes: sums ``[B, M, N]``, and of the last tiles parts of them, 64 columns after another."""
        shapes: dict[str, jax.ShapeDtypeStruct] = {}
        if self.whole:
            shape = (self.batch, out_m, self.n) if self.staged else (self.batch * out_m, self.n)
            shapes["out"] = jax.ShapeDtypeStruct(shape, self.out_dtype)
        if self.whole < self.columns:
            strips = (self.columns - self.whole) * self.config.cluster * WORKERS
            shape = (strips * self.batch * self.config.parts * out_m, ROWS)
            shapes["parts"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return shapes

    def joined(self, outs: dict[str, jax.Array], out_m: int) -> jax.Array:
        if "parts" not in outs:
            return outs["out"].reshape(self.batch, out_m, self.n)
        parts = outs["parts"].reshape(-1, WORKERS, self.batch, self.config.parts, out_m, ROWS)
        tiles = parts.sum(3).astype(self.out_dtype).transpose(2, 3, 0, 1, 4)
        first, last = self.whole * self.config.cluster, tiles.shape[2] - 1
        even = (self.n - first * TALL) // TALL  # tiles that begin where the one before ends
        found = [tiles[:, :, :even].reshape(self.batch, out_m, -1)]
        if over := (self.n - first * TALL) % TALL:
            found.append(tiles[:, :, last].reshape(self.batch, out_m, -1)[:, :, TALL - over :])
        tail = jnp.concatenate(found, axis=2)
        if "out" not in outs:
            return tail
        out = outs["out"].reshape(self.batch, out_m, self.n)
        return lax.dynamic_update_slice(out, tail, (0, 0, first * TALL))

    def scratch(self) -> dict[str, Any]:
        c, tile = self.config, hopper.tiled
        empty = functools.partial(plgpu.Barrier, num_arrivals=WORKERS, num_barriers=c.stages)
        if c.cluster > 1:
            empty = functools.partial(
                plgpu.ClusterBarrier, collective_axes=("cluster",),
                num_arrivals=WORKERS, num_barriers=c.stages,
            )  # fmt: skip
        scratch: dict[str, Any] = {
            "codes": plgpu.SMEM(
                (c.code_stages, self.plan.streams, TALL, self.wide),
                jnp.uint8,
                transforms=tile(jnp.uint8, self.wide),
            ),
            "x": plgpu.SMEM((c.stages, c.block_m, STEP), self.dtype, transforms=tile(self.dtype)),
            "packed": plgpu.Barrier(num_arrivals=self.plan.streams, num_barriers=c.code_stages),
            "taken": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=c.code_stages),
            "full": plgpu.Barrier(num_barriers=c.stages),
            "empty": empty(),
        }
        if self.interpret:  # its WGMMA takes no registers
            scratch["staged"] = plgpu.SMEM((WORKERS, ROWS, STEP), self.dtype)
        if self.staged:
            scratch["staged_out"] = plgpu.SMEM(
                (WORKERS, 2, ROWS, ROWS), self.out_dtype, transforms=tile(self.out_dtype)
            )
        return scratch


def _body(problem: _Problem, out_m: int, *refs: Any, **scratch: Any) -> None:
    x, codes, *tables, outs = refs
    wg = lax.axis_index("wg")
    block = _Block(problem, out_m, x, codes, tables, outs, scratch, wg)

    @pl.when(wg == WORKERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        block.fetch()

    @pl.when(wg < WORKERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        block.multiply()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Item:
    """Sums that a block makes.

    Attributes:
      entry: of the batch.
      row: of x, the first one.
      column: row of the weight, the first one.
      tile: of the result along N.
      part: of K; -1 for all of it.
      start: the first tile of codes.
      count: of tiles of codes.
    """

    entry: Any
    row: Any
    column: Any
    tile: Any
    part: Any
    start: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class _Block:
    problem: _Problem
    out_m: int
    x: Any
    codes: Any
    tables: list[Any]
    outs: dict[str, Any]
    scratch: dict[str, Any]
    wg: Any

    @property
    def mine(self) -> Any:
        """How many items."""
        p = self.problem
        return lax.div(p.items - 1 - lax.axis_index("block"), p.clusters) + 1

    def item(self, i: Any) -> _Item:
        """The i-th of this block."""
        p, c = self.problem, self.problem.config
        t = lax.axis_index("block") + i * p.clusters
        over = t - p.rows * p.whole
        parted = over >= 0
        tile = jnp.where(parted, p.rows * p.whole + lax.div(over, c.parts), t)
        part = jnp.where(parted, lax.rem(over, c.parts), -1)
        column, row = lax.div(tile, p.rows), lax.rem(tile, p.rows)
        if c.cluster > 1:
            column = column * c.cluster + lax.axis_index("cluster")
        tiles_m = p.rows // p.batch
        bound = lambda part: lax.div(part * p.packed, c.parts)
        start = jnp.where(parted, bound(part), 0)
        return _Item(
            entry=lax.div(row, tiles_m),
            row=lax.rem(row, tiles_m) * c.block_m,
            column=jnp.minimum(column * TALL, p.n - TALL),  # the last one begins earlier
            tile=column,
            part=part,
            start=start,
            count=jnp.where(parted, bound(part + 1), p.packed) - start,
        )

    def barrier(self, name: str, slot: Any) -> Any:
        return self.scratch[name].at[slot]

    def after(self, slot: Any) -> Any:
        """The slot of the next columns of x. (A remainder costs more.)"""
        return jnp.where(slot + 1 == self.problem.config.stages, 0, slot + 1)

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
                    self.fetch_x(slot, item, piece * p.piece + column + half * STEP)
                    slot = self.after(slot)
                return i + 1, slot

            return lax.fori_loop(0, item.count, step, carry)

        total, _ = lax.fori_loop(0, self.mine, one, (jnp.int32(0), jnp.int32(0)))
        # a block stays while its neighbour may still say that it has read
        for name, count, stages in (
            ("taken", total, c.code_stages),
            ("empty", total * len(p.steps), c.stages),
        ):
            for i in range(stages):
                place = lax.rem(count + i, stages)
                wait = lambda name=name, place=place: plgpu.barrier_wait(self.barrier(name, place))
                pl.when(count + i >= stages)(wait)

    def fetch_codes(self, slot: Any, item: _Item, column: Any) -> None:
        p = self.problem
        rows = pl.ds(item.entry * p.n + item.column, TALL)
        for stream in range(p.plan.streams):
            source = self.codes.at[rows, pl.ds(stream * p.piece + column, p.wide)]
            to = self.scratch["codes"].at[slot, stream]
            plgpu.copy_gmem_to_smem(source, to, self.barrier("packed", slot))

    def fetch_x(self, slot: Any, item: _Item, column: Any) -> None:
        c = self.problem.config
        source = self.x.at[item.entry, pl.ds(item.row, c.block_m), pl.ds(column, STEP)]
        together: dict[str, Any] = {"collective_axes": "cluster"} if c.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(
            source, self.scratch["x"].at[slot], self.barrier("full", slot), **together
        )

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
        if "staged_out" in self.scratch:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def entries(self, item: _Item, j: Any) -> Any:
        """Table entries for the j-th tile of codes of an item: for each step, part of its columns, and table."""
        p = self.problem
        row = item.entry * p.n + item.column + self.wg * ROWS
        load = lambda table, at: hopper.load_table(
            table, p.n_groups, row, at, p.group, True, p.interpret
        )
        start = (item.start + j) * p.wide
        parts = range(0, STEP, min(p.group, STEP))
        return {
            (half, piece): [
                [load(t, piece * p.piece + start + half * STEP + part) for t in self.tables]
                for part in parts
            ]
            for half, piece in p.steps
        }

    def words(self, slot: Any, half: int) -> Any:
        """64 bytes of each row of a tile of codes, in registers."""
        p, rows = self.problem, pl.ds(self.wg * ROWS, ROWS)
        tiles = [self.scratch["codes"].at[slot, s, rows] for s in range(p.plan.streams)]
        return hopper.load_in_order(tiles, half, p.wide, p.interpret)

    def decoded(self, words: Any, half: int, piece: int, entries: Any) -> jax.Array:
        """What a step multiplies."""
        p = self.problem
        terms = [hopper.terms_of(p.plan, own, p.dtype) for own in entries[half, piece]]
        return hopper.expand_in_order(
            words, piece, terms, p.plan, dtype=p.dtype, interpret=p.interpret
        )

    def product(self, item: _Item, after: _Item, is_last: Any, state: Any) -> tuple[jax.Array, Any]:
        """The sums of an item, transposed, ``f32[64, block_m]``, and the state for the next one.

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
                    before = jnp.where(slot == 0, c.stages, slot) - 1
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
            plgpu.wgmma_wait(0)
            hopper.sync(p.interpret)  # ptxas would convert sums to 16 bits before they are complete
            slot = state_[1]
            self.release(jnp.where(slot == 0, c.stages, slot) - 1)
            return acc[...], state_

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, c.block_m), jnp.float32))

    def release(self, slot: Any) -> None:
        """Says that columns of x were read."""
        if self.problem.config.cluster > 1:  # one thread of a warpgroup says so to a whole cluster
            hopper.sync(self.problem.interpret)
        plgpu.barrier_arrive(self.barrier("empty", slot))

    def write(self, item: _Item, total: jax.Array) -> None:
        if "parts" not in self.outs:
            self.write_whole(item, total)
        elif "out" not in self.outs:
            self.write_part(item, total)
        else:
            pl.when(item.part < 0)(lambda: self.write_whole(item, total))
            pl.when(item.part >= 0)(lambda: self.write_part(item, total))

    def write_part(self, item: _Item, total: jax.Array) -> None:
        p = self.problem
        strip = (item.tile - p.whole * p.config.cluster) * WORKERS + self.wg
        row = (strip * p.batch + item.entry) * p.config.parts + item.part
        self.store(self.outs["parts"], item, total, row * self.out_m, jnp.int32(0))

    def write_whole(self, item: _Item, total: jax.Array) -> None:
        p, c = self.problem, self.problem.config
        column = item.column + self.wg * ROWS
        if "staged_out" not in self.scratch:
            self.store(self.outs["out"], item, total, item.entry * self.out_m, column)
            return
        for j, first in enumerate(range(0, c.block_m, ROWS)):
            rows = min(ROWS, c.block_m - first)
            own = self.scratch["staged_out"].at[self.wg, j % 2, pl.ds(0, rows)]
            plgpu.wait_smem_to_gmem(min(j, 1), wait_read_only=True)
            hopper.stage_transposed(own, total, first, p.interpret)
            plgpu.commit_smem()
            to = self.outs["out"].at[item.entry, pl.ds(item.row + first, rows), pl.ds(column, ROWS)]
            plgpu.copy_smem_to_gmem(own, to)

    def store(self, out: Any, item: _Item, total: jax.Array, row: Any, column: Any) -> None:
        stop = row + self.out_m
        hopper.store_transposed(out, total, row + item.row, column, stop, self.problem.interpret)
        hopper.sync(self.problem.interpret)  # warps take different times
