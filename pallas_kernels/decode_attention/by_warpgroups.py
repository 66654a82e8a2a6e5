"""The way of the Hopper kernel where many queries share a head of the cache, or rows are long: by WGMMA.

Scores are ``keys @ q.T`` with the keys as the register operand, so a column is a query head. Weights go through shared
memory, and ``values.T @ weights`` has the values as the register operand, transposed on the way in.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..hopper import ROWS
from . import keys as of_keys
from .block import Block
from .joined import NEVER
from .problem import Config, Problem


def scratch(problem: Problem, config: Config) -> dict[str, Any]:
    wg, width, v = config.warpgroups, problem.width, problem.values
    f16, pieces = jnp.float16, problem.keys.pieces
    tiled = lambda *shape: plgpu.SMEM(shape, f16, transforms=hopper.tiled(f16))
    found: dict[str, Any] = {
        "queries": tiled(pieces, width, v.width // pieces),
        "weights": tiled(wg, width, ROWS),
        "scales": plgpu.SMEM((wg, v.spread), f16),
        "warps": plgpu.SMEM((wg, 4, width), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=1),
    }
    if wg > 1:
        found["sums"] = plgpu.SMEM((wg - 1, hopper.words(width, v.tiles)), jnp.float32)
        found["summed"] = plgpu.Barrier(num_arrivals=wg - 1)
    if problem.interpret:
        found["staged"] = plgpu.SMEM((wg, ROWS, ROWS), f16)
    return found


def attend(block: Block, q: Any, out: Any, logs: Any, scratch: dict[str, Any]) -> None:
    p, wg, interpret = block.problem, block.wg, block.interpret
    k, v = p.keys, p.values
    runs = 1 if isinstance(k, of_keys.ChannelKeys) else 0
    block.fetch_first()

    @pl.when(wg == 0)
    def _() -> None:
        to = scratch["queries"]
        hopper.stage_rows(to, q, block.queries, p.group, k.order, block.scale, interpret)
        if not interpret:
            plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["ready"])

    plgpu.barrier_wait(scratch["ready"])
    block.fetch_rest()
    products = lambda n: [plgpu.WGMMAAccumulatorRef((ROWS, p.width), jnp.float32)] * n
    staged = scratch["staged"].at[wg] if interpret else None
    warps, weights, scales = (scratch[name].at[wg] for name in ("warps", "weights", "scales"))

    def scores(keys: list[Any], values: list[Any]) -> jax.Array:
        def scope(acc: Any) -> jax.Array:
            for a, piece, column in k.operands(keys, interpret):
                own = scratch["queries"].at[piece, :, pl.ds(column, 64)]
                hopper.mma(acc, a, own.T, staged)
            v.stage(values, scales, interpret)
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(scope, *products(1))

    def step(i: Any, carry: Any) -> Any:
        top, total, outs = carry
        keys, values = block.wait(i)
        (x,) = block.shown(i, [scores(keys, values)], runs)
        hopper.spread_max(x, warps, interpret)
        operands = v.operands(values, scales, interpret)  # while the greatest scores are waited for
        top, old, y = hopper.weigh(x, top, warps, interpret)
        hopper.store_weights(weights, y, runs, interpret)
        total = hopper.add_rows(total, old, y, interpret)
        if not interpret:
            plgpu.commit_smem()

        def scope(*accs: Any) -> list[jax.Array]:
            for acc, a in zip(accs, operands):
                hopper.mma(acc, a, weights.T, staged)
            hopper.sync(interpret)
            block.fetch(i + block.config.stages)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs]

        found = pl.run_scoped(scope, *products(v.tiles))
        factor = hopper.in_rows(old)
        return top, total, [o * factor + x for o, x in zip(outs, found)]

    column = lambda x: hopper.column(p.width, x)
    zeros = [hopper.zeros(p.width) for _ in range(v.tiles)]
    sums = lax.fori_loop(0, block.count, step, (column(NEVER), column(0.0), zeros))
    hopper.sync(interpret)
    for i in range(1, block.config.warpgroups):
        pl.when(wg == i)(lambda i=i: _hand_over(i, sums, scratch, interpret))
    pl.when(wg == 0)(lambda: _finish(block, sums, out, logs, scratch))


def _hand_over(wg: int, sums: Any, scratch: dict[str, Any], interpret: bool) -> None:
    top, total, outs = sums
    hopper.hand_over(scratch["sums"].at[wg - 1], (top, total, *outs), interpret)
    plgpu.barrier_arrive(scratch["summed"])


def _finish(block: Block, sums: Any, out: Any, logs: Any, scratch: dict[str, Any]) -> None:
    """The first warpgroup joins what all found."""
    p, row, interpret, (top, total, outs) = block.problem, block.row, block.interpret, sums
    if block.config.warpgroups > 1:
        plgpu.barrier_wait(scratch["summed"])
    for i in range(1, block.config.warpgroups):
        theirs = hopper.taken(scratch["sums"].at[i - 1], (top, total, *outs), interpret)
        best = jnp.maximum(top, theirs[0])
        own, more = jnp.exp2(top - best), jnp.exp2(theirs[0] - best)
        top, total = best, total * own + theirs[1] * more
        own, more = hopper.in_rows(own), hopper.in_rows(more)
        outs = [x * own + y * more for x, y in zip(outs, theirs[2:])]
    total = hopper.column_sums(total, scratch["warps"].at[0], interpret)
    each = hopper.in_rows(jnp.where(total == 0, 0.0, 1 / total))
    for j, x in enumerate(outs):
        hopper.store_transposed(
            out, x * each, row, jnp.int32(64 * j), row + p.group, interpret, paired=True, rows=p.group
        )  # fmt: skip
    found = jnp.where(total == 0, NEVER, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
    hopper.store_columns(logs, found, row, p.group, interpret)
