"""The way of the Hopper kernel where few queries share a head of the cache: each warp attends to tokens of its own.

Scores, weights and sums stay in a warp's registers (`hopper.warps`); a warp waits for others where a tile is refilled,
and at the end, where the sums of a block's warps are joined.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from . import keys as of_keys
from .block import Block
from .joined import NEVER
from .problem import Config, Problem


def scratch(problem: Problem, config: Config) -> dict[str, Any]:
    assert config.warpgroups * config.stages <= 14, config  # a barrier each
    sizes = hopper.join_scratch(config.warpgroups, problem.values.width, problem.interpret)
    found: dict[str, Any] = {"join": sizes}
    for name, rows in (("of_keys", problem.keys), ("of_values", problem.values)):
        found[name] = hopper.offset_scratch(rows.plan)
    if problem.interpret:
        found["joined"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    return found


def attend(block: Block, q: Any, out: Any, logs: Any, scratch: dict[str, Any]) -> None:
    p, c, interpret = block.problem, block.config, block.interpret
    k, v = p.keys, p.values
    runs = c.tiles if isinstance(k, of_keys.ChannelKeys) else 0
    block.fetch_first()
    queries = hopper.load_queries(
        q, block.queries, p.group, k.warp_order, block.scale, k.units, interpret
    )
    sums_of = k.sums(queries, scratch["of_keys"], interpret)
    offsets = scratch["of_values"]
    hopper.write_offsets(offsets, v.plan, range(v.plan.pieces), interpret)
    block.fetch_rest()

    def step(i: Any, carry: Any) -> Any:
        top, total, outs = carry
        keys, (codes, *tables) = block.wait(i)
        x = k.scores(queries, sums_of, keys, c.tiles, interpret)
        x = block.shown(i, x, runs)
        top, total, outs, weights = hopper.weigh_rows(x, top, total, outs, interpret)
        outs = hopper.add_values(
            outs, weights, codes, tables, offsets, v.plan,
            runs=runs, row_bytes=v.row_bytes, group=v.group, groups=v.groups, interpret=interpret,
        )  # fmt: skip
        hopper.release(block.wg * c.stages + lax.rem(i, c.stages), interpret)
        block.fetch(i + c.stages)
        return top, total, outs

    column = lambda x: hopper.warp_column(x, interpret)
    zeros = [hopper.zeros(p.width) for _ in range(v.width // 16)]
    sums = lax.fori_loop(0, block.count, step, (column(NEVER), column(0.0), zeros))
    if interpret:
        _join_plainly(block, sums, out, logs, scratch)
        return
    top, total, outs = sums
    hopper.join_warps(
        outs, top, total, scratch["join"], out, logs, block.row, p.group, c.warpgroups,
        v.plan, v.row_bytes,
    )  # fmt: skip


def _join_plainly(block: Block, sums: Any, out: Any, logs: Any, scratch: dict[str, Any]) -> None:
    """`hopper.join_warps`, for the interpreter."""
    p, shared, (top, total, outs) = block.problem, scratch["join"][0], sums
    best = top.max(0)
    share = jnp.exp2(top - best)
    x = jnp.stack(outs).reshape(-1, 4, 2, 8, p.width).transpose(1, 0, 3, 2, 4)
    x = x.reshape(4, -1, p.width) * share[:, None]
    shared[block.wg] = jnp.concatenate([best[None], (total * share).sum(0)[None], x.sum(0)])
    plgpu.barrier_arrive(scratch["joined"])

    @pl.when(block.wg == 0)
    def _() -> None:
        plgpu.barrier_wait(scratch["joined"])
        x, log = _joined(shared[...])
        out[pl.ds(block.row, p.group), :] = x.T[: p.group]
        logs[pl.ds(block.row, p.group)] = log[: p.group]


def _joined(found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of warpgroups' greatest scores, totals and sums ``f32[wg, 2 + H, W]``."""
    best = found[:, 0].max(0)
    share = jnp.exp2(found[:, 0] - best)
    total = (found[:, 1] * share).sum(0)
    kept = jnp.where(total == 0, 1, total)
    x = (found[:, 2:] * share[:, None]).sum(0) / kept
    return x, jnp.where(total == 0, NEVER, best + jnp.log2(kept))
