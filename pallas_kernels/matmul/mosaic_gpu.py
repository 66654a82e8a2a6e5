"""Weight-only matmul on Hopper: packed weights are the register operand of WGMMA, activations the one in shared memory.

``out.T = w @ x.T``: a warpgroup multiplies 64 rows of the weight, of which it makes 16-bit floats in its registers
(`hopper.fragments`), with `block_m` rows of x. A stage of the ring is `row_bytes` bytes of codes of each row and the
columns of x that belong to them, one bulk copy each. Warpgroups of a block take different parts of K (`split`); blocks
may split K as well (`grid_k`), and their sums are added by XLA.

bfloat16 weights of 2, 4 and 8 bits are made of codes where they lie; for up to 16 rows of x the codes themselves are
multiplied so. What 2- and 4-bit codes are too much, a zero or the middle, then is a product of its own with sums of x
over groups (`is_apart`), in stages before those of codes: it costs a code nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..codecs import LloydMax, Packed
from ..hopper import ROWS
from .columns import columns_of, is_summed
from .problem import Problem, in_halves

GROUPS = 64  # of what is apart, that are multiplied at once


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut into blocks.

    Attributes:
      block_m: rows of x in a block: a multiple of 8, up to 256.
      split: warpgroups that take a part of K each.
      stages: of the ring.
      row_bytes: bytes of codes that a stage takes of a row: 64 or 128.
      grid_k: blocks that take a part of K each.
      in_flight: operands of 16 registers each that are multiplied at once: with 128 registers a thread at most, a
        multiprocessor holds two blocks.
      strips: of 64 rows of the weight that a block takes; more than one in `tall`.
    """

    block_m: int = 8
    split: int = 2
    stages: int = 2
    row_bytes: int = 128
    grid_k: int = 1
    in_flight: int = 8
    strips: int = 1

    @property
    def kind(self) -> type[FewRows]:
        return FewRows

    def shared_bytes(self, plan: hopper.Plan) -> int:
        """Bytes of shared memory that a block takes, barriers not counted."""
        codes = plan.streams * ROWS * self.strips * self.row_bytes
        x = plan.pieces * self.block_m * self.row_bytes * 2
        sums = (self.split - 1) * ROWS * self.block_m * 4
        return self.split * self.stages * (codes + x) + sums + hopper.lookup_bytes(plan)


def refusal(x: jax.Array, w: Packed) -> str:
    """Why this kernel can't take ``x @ w.T``; "" where it can."""
    stored = w.view.dtypes[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if x.dtype == jnp.float32 and stored == "float32":
        return "x and the weight are float32: 16-bit products would lose digits of the weight"
    if w.shape[-2] < ROWS or w.shape[-2] % 8:
        return f"N = {w.shape[-2]} is below {ROWS} or no multiple of 8"
    if isinstance(w.codec, LloydMax):
        return f"no kernel for {w.codec.name}"
    return hopper.refusal(w.codec, w.shape[-1])


def matmul(
    x: jax.Array, w: Packed, config: Config, *, out_dtype: Any = None, interpret: bool = False
) -> jax.Array:
    """``[B, M, K] x [B, N, K] -> [B, M, N]``, summed in float32, of `out_dtype` (None: as x)."""
    if x.dtype == jnp.float32:
        return in_halves(matmul, x, w, config, out_dtype, interpret)
    problem = config.kind.of(x, w, config, out_dtype, interpret)
    group = problem.group if problem.is_apart else None
    columns, *sums = columns_of(x, pieces=problem.plan.pieces, unit=problem.x_unit, group=group)
    codes, tables = problem.operands(w)
    tables += sums
    if not sums and problem.scales_sums and problem.plan.has_zero:
        tables.append(problem.unit_sums(columns))
    return problem(columns, codes, tables)


def rows_of(x: jax.Array) -> int:
    """Rows that the kernel multiplies for ``x[..., M, K]``."""
    return x.shape[-2] * (2 if x.dtype == jnp.float32 else 1)


class FewRows(Problem):
    """The product of few rows, by warpgroups of a kind."""

    @property
    def warpgroup(self) -> type[Warpgroup]:
        return Warpgroup

    @property
    def columns(self) -> int:
        """Of sums."""
        return self.config.block_m

    @property
    def mine(self) -> int:
        """Stages of one warpgroup."""
        c = self.config
        total = pl.cdiv(self.piece, c.row_bytes)
        return pl.cdiv(total, c.split * c.grid_k)

    @property
    def reach(self) -> int:
        """Columns of a piece that stages take, with those past its end."""
        c = self.config
        return self.mine * c.split * c.grid_k * c.row_bytes

    @property
    def whole(self) -> bool:
        return hopper.is_whole(self.group, self.piece, self.config.row_bytes, self.n_groups)

    @property
    def unit(self) -> int:
        """Columns of a piece that are summed up before scales come."""
        return self.config.row_bytes if self.whole else 64

    @property
    def stage_units(self) -> int:
        return self.config.row_bytes // self.unit

    @property
    def scales_sums(self) -> bool:
        """Whether sums over a unit are scaled, not the weights: fewer operations for few sums, and more exact."""
        in_groups = self.group % 64 == 0 and self.piece % 64 == 0
        return self.config.block_m <= 16 and (self.whole or in_groups)

    @property
    def is_apart(self) -> bool:
        """Whether what codes are too much, a zero or the middle, is multiplied with sums of x over groups."""
        wanted = self.plan.has_zero or (self.scales_sums and is_summed(self.group))
        has_room = self.plan.pieces > 1  # for high and low
        return wanted and has_room and hopper.is_in_place(self.plan, self.dtype)

    @property
    def workers(self) -> int:
        """Warpgroups that share K."""
        return self.config.split * self.config.grid_k

    @property
    def chunks(self) -> int:
        """Times 64 groups of what is apart."""
        return pl.cdiv(self.n_groups, GROUPS) if self.is_apart else 0

    @property
    def most_chunks(self) -> int:
        """That a worker takes."""
        return pl.cdiv(self.chunks, self.workers)

    @property
    def decoded(self) -> hopper.Plan:
        if not self.is_apart:
            return self.plan
        middle = 0 if self.scales_sums else self.plan.middle
        return dataclasses.replace(self.plan, middle=middle, tables=("scale",))

    @property
    def x_unit(self) -> float:
        """What the kernel's x is to x: it makes up for codes in place, or makes their products normal numbers."""
        if not self.scales_sums:
            return self.weight_unit
        return hopper.X_UNIT if self.is_apart and not self.interpret else 1.0

    def sum_unit(self, piece: int) -> float:
        """What sums that are to be scaled are to what the kernel sums up."""
        return (
            hopper.code_unit(self.plan, piece, self.dtype) / hopper.X_UNIT if self.is_apart else 1.0
        )

    @property
    def units(self) -> int:
        """Of a piece of x, with those past its end that stages reach."""
        return self.reach // self.unit

    def unit_sums(self, x: jax.Array) -> jax.Array:
        """Sums of x over each unit, flat: ``f32[B, pieces, M, units]``, M in whole blocks.

        ``sum((code - zero) * x) = sum((code + offset) * x) - (zero + offset) * sum(x)``: zeros cost nothing a code.
        """
        rows = -x.shape[1] % self.config.block_m
        x = jnp.pad(x, ((0, 0), (0, rows), (0, self.units * self.unit - x.shape[2])))
        sums = x.reshape(*x.shape[:2], self.units, self.unit).astype(jnp.float32).sum(-1)
        return sums.reshape(-1)

    def __call__(self, x: jax.Array, codes: jax.Array, tables: list[jax.Array]) -> jax.Array:
        """The product ``[B, M, N]``.

        Args:
          x: ``[B * pieces, M, columns]``, as the kernel copies it.
          codes, tables: from `operands`; where sums are scaled, what their columns need comes last.
        """
        c = self.config
        rows_m, splits = pl.cdiv(self.m, c.block_m), self.batch * c.grid_k
        out_m = self.m
        if self.interpret:  # the interpreter does not read or write outside of an array
            x, codes = self.padded(x, codes)
            if self.is_apart:
                *tables, sums = tables
                rows = -sums.shape[1] % c.block_m
                tables.append(jnp.pad(sums, ((0, 0), (0, rows), (0, c.row_bytes))))
            out_m = rows_m * c.block_m
        dtype = jnp.float32 if c.grid_k > 1 else self.out_dtype
        kernel = plgpu.kernel(
            self.body(self, out_m),
            out_type=jax.ShapeDtypeStruct((splits * out_m, self.n), dtype),
            grid=(pl.cdiv(self.n, self.height), rows_m, splits),
            grid_names=("n", "m", "z"),
            num_threads=self.warpgroups,
            thread_name="wg",
            scratch_types=self.scratch(),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )
        out = kernel(x, codes, *tables).reshape(self.batch, c.grid_k, out_m, self.n)
        out = out.sum(1) if c.grid_k > 1 else out[:, 0]
        return out[:, : self.m].astype(self.out_dtype)

    @property
    def body(self) -> type[Body]:
        return Body

    @property
    def height(self) -> int:
        """Rows of the weight that a block takes."""
        return ROWS * self.config.strips

    @property
    def warpgroups(self) -> int:
        """Of a block."""
        return self.config.split

    def padded(self, x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = -x.shape[1] % self.config.block_m
        x = jnp.pad(x, ((0, 0), (0, rows), (0, max(0, self.reach - x.shape[2]))))
        return x, jnp.pad(codes, ((0, 0), (0, self.reach)))

    @property
    def copies(self) -> int:
        """That fill a stage."""
        return self.plan.streams + 1

    def x_scratch(self) -> dict[str, Any]:
        """The ring's columns of x."""
        c = self.config
        shape = (c.split, c.stages, self.plan.pieces, c.block_m, c.row_bytes)
        return {"x": plgpu.SMEM(shape, self.dtype, transforms=hopper.tiled(self.dtype))}

    def scratch(self) -> dict[str, Any]:
        c, plan = self.config, self.plan
        slots = c.split * c.stages
        scratch: dict[str, Any] = {
            "codes": plgpu.SMEM(
                (c.split, c.stages, plan.streams, self.height, c.row_bytes),
                jnp.uint8,
                transforms=hopper.tiled(jnp.uint8, c.row_bytes),
            ),
            "full": plgpu.Barrier(num_arrivals=self.copies, num_barriers=slots),
            **self.x_scratch(),
        }
        if c.split > 1:
            scratch["sums"] = plgpu.SMEM((c.split - 1, ROWS, self.columns), jnp.float32)
            scratch["done"] = plgpu.Barrier(num_arrivals=c.split - 1)
        if self.interpret:  # its WGMMA takes no registers
            scratch["staged"] = plgpu.SMEM((self.warpgroups, ROWS, 64), scratch["x"].dtype)
        return scratch | hopper.lookup_scratch(plan, self.interpret)


class Body:
    """The kernel's body, for one warpgroup.

    Attributes:
      plan: what weights are made by; the weight's own is the problem's.
    """

    def __init__(self, problem: FewRows, out_m: int):
        self.problem, self.out_m = problem, out_m
        self.config, self.plan = problem.config, problem.decoded
        self.interpret = problem.interpret

    def __call__(self, *refs: Any, **scratch: Any) -> None:
        x, codes, *tables, out = refs
        p, c = self.problem, self.config
        wg, z = lax.axis_index("wg"), lax.axis_index("z")
        entry, split = z // c.grid_k, lax.rem(z, c.grid_k)
        # the last block begins earlier instead of ending later
        column = jnp.minimum(lax.axis_index("n") * ROWS, p.n - ROWS)
        one = p.warpgroup(
            body=self, x=x, codes=codes, tables=tables, out=out, scratch=scratch, wg=wg,
            entry=entry, column=column, row=lax.axis_index("m") * c.block_m,
            first=(split * c.split + wg) * p.mine,
        )  # fmt: skip
        one.start()
        total = one.sums() if p.scales_sums else one.product()
        one.finish(total, z * self.out_m)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Attributes:
    wg: which one, and which part of K.
    entry: of the batch.
    column, row: where the block's tile of the result begins.
    first: the first stage.
    """

    body: Body
    x: Any
    codes: Any
    tables: Sequence[Any]
    out: Any
    scratch: dict[str, Any]
    wg: Any
    entry: Any
    column: Any
    row: Any
    first: Any

    @property
    def p(self) -> FewRows:
        return self.body.problem

    @property
    def c(self) -> Config:
        return self.body.config

    @property
    def interpret(self) -> bool:
        return self.body.interpret

    @property
    def ring(self) -> Any:
        """Which ring it reads from."""
        return self.wg

    def barrier(self, name: str, slot: Any) -> Any:
        return self.scratch[name].at[self.ring * self.c.stages + slot]

    # the ring

    @property
    def worker(self) -> Any:
        """Which of those that share K it is."""
        return lax.div(self.first, jnp.int32(self.p.mine))

    @property
    def lead(self) -> Any:
        """Stages before those of codes: each for 64 groups of what is apart, of which workers take turns."""
        if not self.p.is_apart:
            return 0
        return lax.div(self.p.chunks - 1 - self.worker + self.p.workers, jnp.int32(self.p.workers))

    @property
    def last(self) -> Any:
        """All stages."""
        return self.lead + self.p.mine

    def chunk(self, i: Any) -> Any:
        """The first group of the i-th of them."""
        return (self.worker + i * self.p.workers) * GROUPS

    def fetch(self, i: Any) -> None:
        """Starts the copies of the i-th stage."""
        if not self.p.is_apart:
            self.fetch_codes(i)
            return
        pl.when(i < self.lead)(lambda: self.fetch_apart(i))
        pl.when(i >= self.lead)(lambda: self.fetch_codes(i))

    def fetch_apart(self, i: Any) -> None:
        """The same of one of sums of x."""
        c, slot = self.c, lax.rem(i, self.c.stages)
        rows, groups = pl.ds(self.row, c.block_m), pl.ds(self.chunk(i), c.row_bytes)
        for half in range(2):
            source = self.tables[-1].at[2 * self.entry + half, rows, groups]
            to = self.scratch["x"].at[self.ring, slot, half]
            plgpu.copy_gmem_to_smem(source, to, self.barrier("full", slot))

    def fetch_codes(self, i: Any) -> None:
        """The same of one of codes."""
        p, c = self.p, self.c
        slot, offset = lax.rem(i, c.stages), (self.first + i - self.lead) * c.row_bytes
        full, rows = self.barrier("full", slot), pl.ds(self.table_row, p.height)
        for stream in range(p.plan.streams):
            columns = pl.ds(stream * p.piece + offset, c.row_bytes)
            to = self.scratch["codes"].at[self.ring, slot, stream]
            plgpu.copy_gmem_to_smem(self.codes.at[rows, columns], to, full)
        self.fetch_x(slot, offset, full)

    def fetch_x(self, slot: Any, column: Any, full: Any) -> None:
        c, plan = self.c, self.body.plan
        pieces = pl.ds(self.entry * plan.pieces, plan.pieces)
        x = self.x.at[pieces, pl.ds(self.row, c.block_m), pl.ds(column, c.row_bytes)]
        plgpu.copy_gmem_to_smem(x, self.scratch["x"].at[self.ring, slot], full)

    def start(self) -> None:
        for i in range(min(self.c.stages, self.p.mine + self.p.most_chunks)):
            if i < self.p.mine:
                self.fetch(jnp.int32(i))
            else:
                pl.when(i < self.last)(functools.partial(self.fetch, jnp.int32(i)))
        lookup = self.scratch.get("lookup")
        hopper.fill_lookup(lookup, self.body.plan, self.p.dtype, self.c.split)

    def release(self, i: Any) -> None:
        """The i-th stage was read: refills its slot."""
        late = i + self.c.stages
        hopper.sync(self.interpret)
        pl.when(late < self.last)(lambda: self.fetch(late))

    # a stage

    def multiply_apart(self, i: Any, acc: Any) -> None:
        """Adds what is apart, of the i-th stage: two numbers of 16 bits, times sums of x that are two as well."""
        p, slot = self.p, lax.rem(i, self.c.stages)
        staged = self.scratch["staged"].at[self.wg] if self.interpret else None
        x = self.scratch["x"].at[self.ring, slot]
        sums = [x.at[half, :, pl.ds(0, GROUPS)].T for half in range(2)]

        def made(*halves: int) -> list[jax.Array]:
            return hopper.expand_less(
                self.tables[: p.plan.terms], p.n_groups, self.table_row, self.chunk(i),
                p.plan.middle, self.body.plan.middle, interpret=self.interpret, halves=halves,
            )  # fmt: skip

        high, *low = made(0, 1) if self.c.in_flight > 1 else made(0)
        plgpu.barrier_wait(self.barrier("full", slot))
        for own in sums:
            hopper.mma(acc, high, own, staged)
        if not low:
            plgpu.wgmma_wait(0)
            low = made(1)
        hopper.mma(acc, low[0], sums[0], staged)
        plgpu.wgmma_wait(0)
        self.release(i)

    @property
    def rows(self) -> Any:
        """Of a slot's codes: its own."""
        return pl.ds(0, ROWS)

    @property
    def table_row(self) -> Any:
        return self.entry * self.p.n + self.column

    def entries(self, i: Any) -> list[list[jax.Array]]:
        """Table entries of a stage, piece by piece."""
        p, c = self.p, self.c
        start = (self.first + i) * c.row_bytes
        load = lambda table, at: hopper.load_table(
            table, p.n_groups, self.table_row, at, p.group, p.whole, self.interpret
        )
        return [
            [load(table, piece * p.piece + start) for table in self.tables[: self.body.plan.terms]]
            for piece in range(self.body.plan.pieces)
        ]

    def entries_ahead(self, i: Any) -> list[list[jax.Array]]:
        """Table entries of the next units from a stage on, piece by piece."""
        p, start = self.p, (self.first + i) * self.c.row_bytes
        load = lambda table, at: hopper.load_ahead(
            table, p.n_groups, self.table_row, at, p.unit, p.group, self.interpret
        )
        return [
            [load(table, piece * p.piece + start) for table in self.tables[: self.body.plan.terms]]
            for piece in range(self.body.plan.pieces)
        ]

    def unit_sums(self, i: Any) -> list[jax.Array]:
        """Sums of x over the units of a stage, for each unit and piece; none where there are no zeros."""
        p, pieces = self.p, self.body.plan.pieces
        if not self.body.plan.has_zero:
            return []
        width, out = pl.cdiv(p.m, self.c.block_m) * self.c.block_m, []
        for u in range(p.stage_units):
            unit = jnp.minimum(
                (self.first + i) * p.stage_units + u, p.units - 1
            )  # the next may be none
            for piece in range(pieces):
                row = (self.entry * pieces + piece) * width + self.row
                first = row * p.units + unit
                out.append(
                    hopper.load_columns(
                        self.tables[-1], first, p.units, self.c.block_m, self.interpret
                    )
                )
        return out

    def multiply(self, i: Any, terms: Any, accumulators: Sequence[Sequence[Any]]) -> None:
        """Adds a stage to the accumulators of its units and pieces."""
        p, c, plan = self.p, self.c, self.body.plan
        slot = lax.rem(i + self.lead, c.stages)
        plgpu.barrier_wait(self.barrier("full", slot))
        staged = self.scratch["staged"].at[self.wg] if self.interpret else None
        codes = [
            self.scratch["codes"].at[self.ring, slot, s, self.rows] for s in range(plan.streams)
        ]
        batches = [
            (half, range(first, min(first + c.in_flight, plan.pieces)))
            for half in range(c.row_bytes // 64)
            for first in range(0, plan.pieces, c.in_flight)
        ]
        flying = 0
        for half, pieces in batches:
            if flying + len(pieces) > c.in_flight:
                plgpu.wgmma_wait(0)
                flying = 0
            flying += len(pieces)
            made = hopper.expand(
                codes, half, terms, plan, pieces=pieces,
                dtype=p.dtype, row_bytes=c.row_bytes, interpret=self.interpret,
                lookup=self.scratch.get("lookup"),
            )  # fmt: skip
            own = accumulators[64 * half * len(accumulators) // c.row_bytes]
            for piece, a in zip(pieces, made):
                columns = pl.ds(64 * half, 64)
                b = self.scratch["x"].at[self.ring, slot, piece, :, columns].T
                hopper.mma(own[piece], a, b, staged)

    def product(self) -> jax.Array:
        """Scaled weights times x, in one accumulator."""
        p, c = self.p, self.c
        ahead = hopper.AHEAD if p.whole else 1
        load = self.entries_ahead if p.whole else self.entries

        def scope(acc: Any) -> jax.Array:
            def some(o: Any, now: Any) -> Any:
                """The stages whose entries are loaded at once."""
                later, terms = load((o + 1) * ahead), p.terms(now)
                one = lambda s, _: self.stage(o * ahead + s, s, terms, acc)
                lax.fori_loop(0, jnp.minimum(ahead, p.mine - o * ahead), one, None)
                return later

            first = load(jnp.int32(0))  # before others wait for memory
            if p.is_apart:
                lax.fori_loop(0, self.lead, lambda i, _: self.multiply_apart(i, acc), None)
            lax.fori_loop(0, pl.cdiv(p.mine, ahead), some, first)
            return self.settled(acc)

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, c.block_m), jnp.float32))

    def stage(self, i: Any, s: Any, terms: Any, acc: Any) -> None:
        """Adds stage `i`, the s-th of those of `terms`."""
        p = self.p
        if p.whole:
            terms = [[hopper.pick_terms(t, s, self.interpret) for t in own] for own in terms]
        self.multiply(i, terms, [[acc] * p.plan.pieces])
        plgpu.wgmma_wait(0)
        self.release(i + self.lead)

    def settled(self, acc: Any) -> jax.Array:
        """Sums after the wait for the last product."""
        return acc[...]

    def sums(self) -> jax.Array:
        """Sums of each unit and piece, scaled and added in registers."""
        p, stages = self.p, hopper.AHEAD // self.p.stage_units

        def some(o: Any, carry: Any) -> Any:
            """The stages whose entries are loaded at once."""
            now, inner = carry
            later = self.entries_ahead((o + 1) * stages)
            one = lambda s, state: self.stage_sums(o * stages + s, s, now, *state)
            return later, lax.fori_loop(0, jnp.minimum(stages, p.mine - o * stages), one, inner)

        zeros = jnp.zeros((ROWS, self.p.columns), jnp.float32)
        total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        entries, unit_sums = self.entries_ahead(jnp.int32(0)), self.unit_sums(jnp.int32(0))
        if self.p.is_apart:
            total = lax.fori_loop(0, self.lead, self.sums_apart, total)
        first = entries, (unit_sums, total)
        return lax.fori_loop(0, pl.cdiv(p.mine, stages), some, first)[1][1]

    def sums_apart(self, i: Any, total: jax.Array) -> jax.Array:
        """`total` with what is apart, of the i-th stage."""

        def scope(acc: Any) -> jax.Array:
            self.multiply_apart(i, acc)
            return acc[...]

        kind = plgpu.WGMMAAccumulatorRef((ROWS, self.c.block_m), jnp.float32)
        return total + pl.run_scoped(scope, kind)

    def stage_sums(
        self, i: Any, s: Any, entries: Any, sums: list[jax.Array], total: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Adds stage `i`, the s-th of those of `entries`, to `total`; with the sums of x for this and the next one."""
        pieces, units = self.body.plan.pieces, self.p.stage_units
        later = self.unit_sums(i + 1)

        def scope(*flat: Any) -> list[jax.Array]:
            self.multiply(i, [()] * pieces, [flat[u * pieces :][:pieces] for u in range(units)])
            return [acc[...] for acc in flat]

        kind = plgpu.WGMMAAccumulatorRef((ROWS, self.c.block_m), jnp.float32)
        found = pl.run_scoped(scope, *[kind] * (pieces * units))
        self.release(i + self.lead)
        for j, x in enumerate(found):
            at = s * units + j // pieces
            scale, *zero = (hopper.pick(t, at, self.interpret) for t in entries[j % pieces])
            less = [zero[0] + self.offset, sums[j]] if zero else []
            scale = scale * self.p.sum_unit(j % pieces)
            total = hopper.scale_rows(total, x, scale, self.interpret, less)
        return later, total

    @property
    def offset(self) -> float:
        return float(hopper.offset_of(self.body.plan, self.p.dtype))

    def finish(self, total: jax.Array, row: Any) -> None:
        """Adds what the warpgroups with other parts of K have, and writes the tile to rows from `row` on."""
        c = self.c
        if c.split == 1:
            self.store(total, row)
            return
        sums, done = self.scratch["sums"], self.scratch["done"]

        @pl.when(self.wg > 0)
        def _() -> None:
            sums[self.wg - 1] = total
            hopper.sync(self.interpret)
            plgpu.barrier_arrive(done)

        @pl.when(self.wg == 0)
        def _() -> None:
            plgpu.barrier_wait(done)
            x = total
            for j in range(c.split - 1):
                x = x + plgpu.load(sums.at[j], layout=plgpu.Layout.WGMMA, optimized=False)
            self.store(x, row)

    def store(self, total: jax.Array, row: Any) -> None:
        hopper.store_transposed(
            self.out, total, row + self.row, self.column, row + self.body.out_m, self.interpret,
            every=self.p.columns // self.c.block_m,
        )  # fmt: skip
