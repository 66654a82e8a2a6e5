"""What the Hopper matmuls for many rows of x share: who makes which tile of the result, and how sums leave.

``out.T = w @ x.T``: two warpgroups of a block multiply 64 rows of the weight each by `block_m` rows of x, the third one
starts the copies. Blocks stay and take one tile of the result after another; where the last tiles are too few for all,
blocks take parts of K of them, whose sums XLA adds. The blocks of a cluster take neighbouring rows of the weight and
fetch x once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..hopper import ROWS
from .problem import Problem

WORKERS = 2  # warpgroups that multiply
TALL = WORKERS * ROWS  # rows of the weight in a tile
LINE = 128  # bytes of a row of x, and of the columns of a step
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
REGISTERS = 232, 40  # of a thread of a worker, and of the one that fetches


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut.

    Attributes:
      block_m: rows of x in a tile of the result: a multiple of 16 up to 256.
      stages: of the ring of columns of x.
      cluster: blocks that share x, 1 or 2.
      parts: of K, for the last tiles.
      blocks: that stay: a multiple of `cluster`.
    """

    block_m: int = 256
    stages: int = 5
    cluster: int = 1
    parts: int = 1
    blocks: int = 132


def cut(config: Config, batch: int, m: int, n: int) -> tuple[int, int, int]:
    """Tiles of the result along M, of the whole batch; along N, for a whole cluster each; and those not parted.

    The last ones are as many as all clusters can take in whole rounds.
    """
    rows, columns = pl.cdiv(m, config.block_m) * batch, pl.cdiv(n, TALL * config.cluster)
    if config.parts == 1:
        return rows, columns, columns
    clusters = config.blocks // config.cluster
    return rows, columns, rows * columns // clusters * clusters // rows


def shared_bytes(config: Config) -> int:
    """Bytes of shared memory for x and for sums that leave."""
    buffers = sum(math.prod(_buffer(t)) * t.itemsize for t in (BF16, F32)[: min(config.parts, 2)])
    return config.stages * config.block_m * LINE + buffers


def _buffer(dtype: Any) -> tuple[int, ...]:
    """Of sums that leave: for each worker two, of so many rows of x and 64 of the weight."""
    return (WORKERS, 2, 64 if dtype.itemsize == 2 else 16, ROWS)


class Tiles(Problem):
    """A matmul as tiles of its result. A kernel says how many `tiles_k` there are, and what a `Block` does."""

    @property
    def step(self) -> int:
        """Columns of a step."""
        return LINE // self.dtype.itemsize

    @property
    def sums(self) -> Any:
        """What products add up in."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def tiles_k(self) -> int:
        """Tiles along K that a tile of the result takes."""
        raise NotImplementedError

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

    def run(self, block: type[Block], x: jax.Array, *operands: jax.Array) -> jax.Array:
        """The product, by blocks of a kind; x is ``[B, M, K]``."""
        c = self.config
        # bulk copies know whole eights of rows, and the interpreter does not read or write outside of an array
        x = jnp.pad(x, ((0, 0), (0, -self.m % (c.block_m if self.interpret else 8)), (0, 0)))
        out_m = x.shape[1]
        cluster: dict[str, Any] = {}
        if c.cluster > 1:
            cluster = {"cluster": (c.cluster,), "cluster_names": ("cluster",)}
        kernel = plgpu.kernel(
            functools.partial(_body, block, self, out_m),
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
        return self.joined(kernel(x, *operands), out_m)[:, : self.m].astype(self.out_dtype)

    @property
    def staged(self) -> bool:
        """Whether whole sums leave through shared memory: bulk copies know whole tiles."""
        return self.whole > 0 and self.n % ROWS == 0

    def outs(self, out_m: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the kernel writes: sums ``[B, M, N]``, and of the last tiles parts of them, 64 columns after another."""
        shapes: dict[str, jax.ShapeDtypeStruct] = {}
        if self.whole:
            shape = (self.batch, out_m, self.n) if self.staged else (self.batch * out_m, self.n)
            shapes["out"] = jax.ShapeDtypeStruct(shape, self.out_dtype)
        if self.whole < self.columns:
            strips = (self.columns - self.whole) * self.config.cluster * WORKERS
            shape = (strips * self.batch * self.config.parts, out_m, ROWS)
            shapes["parts"] = jax.ShapeDtypeStruct(shape, F32)
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
        """The ring of x, and what sums leave through; a kernel adds its own."""
        c, tile, step = self.config, hopper.tiled, self.step
        empty = functools.partial(plgpu.Barrier, num_arrivals=WORKERS, num_barriers=c.stages)
        if c.cluster > 1:
            empty = functools.partial(
                plgpu.ClusterBarrier, collective_axes=("cluster",),
                num_arrivals=WORKERS, num_barriers=c.stages,
            )  # fmt: skip
        scratch: dict[str, Any] = {
            "x": plgpu.SMEM((c.stages, c.block_m, step), self.dtype, transforms=tile(self.dtype)),
            "empty": empty(),
            "words": plgpu.SMEM((WORKERS, 1), jnp.int32),
        }
        if self.interpret:  # its WGMMA takes no registers
            scratch["staged"] = plgpu.SMEM((WORKERS, ROWS, step), self.dtype)
        kinds = {"out": self.out_dtype} if self.staged else {}
        kinds |= {"parts": F32} if self.whole < self.columns else {}
        return scratch | {
            f"staged_{name}": plgpu.SMEM(_buffer(kind), kind, transforms=tile(kind))
            for name, kind in kinds.items()
        }


def _body(kind: type[Block], problem: Tiles, out_m: int, *refs: Any, **scratch: Any) -> None:
    x, codes, *tables, outs = refs
    wg = lax.axis_index("wg")
    block = kind(problem, out_m, x, codes, tables, outs, scratch, wg)
    block.prepare()

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
class Item:
    """Sums that a block makes.

    Attributes:
      entry: of the batch.
      row: of x, the first one.
      column: row of the weight, the first one.
      tile: of the result along N.
      part: of K; -1 for all of it.
      start: the first tile along K.
      count: of tiles along K.
    """

    entry: Any
    row: Any
    column: Any
    tile: Any
    part: Any
    start: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Block:
    problem: Any
    out_m: int
    x: Any
    codes: Any
    tables: list[Any]
    outs: dict[str, Any]
    scratch: dict[str, Any]
    wg: Any

    def prepare(self) -> None:
        """What all warpgroups do first."""

    def fetch(self) -> None:
        """What the warpgroup does that starts the copies."""
        raise NotImplementedError

    def multiply(self) -> None:
        """What the others do."""
        raise NotImplementedError

    @property
    def mine(self) -> Any:
        """How many items."""
        p = self.problem
        return lax.div(p.items - 1 - lax.axis_index("block"), p.clusters) + 1

    def item(self, i: Any) -> Item:
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
        bound = lambda part: lax.div(part * p.tiles_k, c.parts)
        start = jnp.where(parted, bound(part), 0)
        return Item(
            entry=lax.div(row, tiles_m),
            row=lax.rem(row, tiles_m) * c.block_m,
            column=jnp.minimum(column * TALL, p.n - TALL),  # the last one begins earlier
            tile=column,
            part=part,
            start=start,
            count=jnp.where(parted, bound(part + 1), p.tiles_k) - start,
        )

    def barrier(self, name: str, slot: Any) -> Any:
        return self.scratch[name].at[slot]

    def after(self, slot: Any) -> Any:
        """The slot of the next columns of x. (A remainder costs more.)"""
        return jnp.where(slot + 1 == self.problem.config.stages, 0, slot + 1)

    def before(self, slot: Any) -> Any:
        return jnp.where(slot == 0, self.problem.config.stages, slot) - 1

    def fetch_x(self, slot: Any, item: Item, column: Any) -> None:
        """The columns of a step."""
        c, ref = self.problem.config, self.scratch["x"].at[slot]
        source = self.x.at[item.entry, pl.ds(item.row, c.block_m), pl.ds(column, ref.shape[1])]
        together: dict[str, Any] = {"collective_axes": "cluster"} if c.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(source, ref, self.barrier("full", slot), **together)

    def drain(self, name: str, count: Any, stages: int) -> None:
        """Waits for the last ones: a block stays while its neighbour may still say that it has read."""
        for i in range(stages):
            place = lax.rem(count + i, stages)
            wait = lambda place=place: plgpu.barrier_wait(self.barrier(name, place))
            pl.when(count + i >= stages)(wait)

    def release(self, slot: Any) -> None:
        """Says that columns of x were read."""
        if self.problem.config.cluster > 1:  # one thread of a warpgroup says so to a whole cluster
            hopper.sync(self.problem.interpret)
        plgpu.barrier_arrive(self.barrier("empty", slot))

    def settled(self, acc: Any) -> jax.Array:
        """Sums, complete."""
        plgpu.wgmma_wait(0)
        word = self.scratch["words"].at[self.wg]
        return hopper.settled(acc[...], word, self.problem.interpret)

    def finish(self) -> None:
        """After the last sums."""
        if any(name.startswith("staged_") for name in self.scratch):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def write(self, item: Item, total: jax.Array) -> None:
        """The sums of an item, transposed, ``f32[64, block_m]``."""
        if "parts" not in self.outs:
            self.write_whole(item, total)
        elif "out" not in self.outs:
            self.write_part(item, total)
        else:
            pl.when(item.part < 0)(lambda: self.write_whole(item, total))
            pl.when(item.part >= 0)(lambda: self.write_part(item, total))

    def write_part(self, item: Item, total: jax.Array) -> None:
        p = self.problem
        strip = (item.tile - p.whole * p.config.cluster) * WORKERS + self.wg
        entry = (strip * p.batch + item.entry) * p.config.parts + item.part
        self.send("parts", entry, item.row, 0, total)

    def write_whole(self, item: Item, total: jax.Array) -> None:
        p, column = self.problem, item.column + self.wg * ROWS
        if p.staged:
            self.send("out", item.entry, item.row, column, total)
            return
        first = item.entry * self.out_m
        stop = first + self.out_m
        out = self.outs["out"]
        hopper.store_transposed(out, total, first + item.row, column, stop, p.interpret)
        hopper.sync(p.interpret)  # warps take different times

    def send(self, name: str, entry: Any, row: Any, column: Any, total: jax.Array) -> None:
        """Sums to ``[entry, row :, column :]`` of what the kernel writes, through two buffers in turn."""
        buffers, p = self.scratch[f"staged_{name}"].at[self.wg], self.problem
        step = buffers.shape[1]
        for j, first in enumerate(range(0, p.config.block_m, step)):
            rows = min(step, p.config.block_m - first)
            own = buffers.at[j % 2, pl.ds(0, rows)]
            plgpu.wait_smem_to_gmem(min(j, 1), wait_read_only=True)
            hopper.stage_transposed(own, total, first, p.interpret)
            plgpu.commit_smem()
            to = self.outs[name].at[entry, pl.ds(row + first, rows), pl.ds(column, ROWS)]
            plgpu.copy_smem_to_gmem(own, to)
