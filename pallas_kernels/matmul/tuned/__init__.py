"""Measured choices, as data: which blocks for which shape, by device."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from ...hopper import ROWS, Plan
from .. import digits, many_rows, tall, tiles, w4a8_mosaic_gpu, w8a8_mosaic_gpu
from ..mosaic_gpu import Config

SHARED_BYTES = 227 * 1024  # a block of a Hopper GPU has
ROOM = SHARED_BYTES - 1024  # barriers take some
MULTIPROCESSORS = 132


@functools.cache
def table(device: str) -> dict[str, Any]:
    """The file of a device, ``tuned/<device>.json``."""
    return json.loads((pathlib.Path(__file__).parent / f"{device}.json").read_text())


def config(plan: Plan, m: int, n: int, k: int, device: str = "hopper") -> Config:
    """The blocks for ``[M, K] x [N, K]``: the first rule that fits, made smaller where shared memory is too small."""
    for rule in table(device)["rules"]:
        if m <= rule["max_m"] and _is_for(rule, plan) and _takes(rule, n):
            break
    else:
        raise AssertionError(f"no rule for M = {m}")
    first = tall.Config(**rule["tall"]) if "tall" in rule else Config(**rule["config"])
    chosen = _fitting(first, plan, k // plan.pieces)
    parts = _parts(chosen, plan, m, n, k, rule.get("blocks", 0))
    chosen = dataclasses.replace(chosen, grid_k=parts)
    return _paired(chosen, rule, plan, m, n, lambda c: c.shared_bytes(plan))


def _takes(rule: dict[str, Any], n: int) -> bool:
    """Whether a rule is for so many rows of the weight."""
    least, most = rule.get("n", (n, n))
    return least <= n <= most and _is_tall_enough(rule, n)


def _paired(
    config: Config,
    rule: dict[str, Any],
    plan: Plan,
    m: int,
    n: int,
    shared_bytes: Callable[[Config], int],
) -> Config:
    """Two parts of K as one block of twice as many warpgroups, where a rule says so: for up to `paired` parts.

    Warpgroups of a block add up what they have at its end, blocks in a kernel of XLA after it. There have to be blocks
    for three of five multiprocessors, for four where XLA adds up still; codes in several planes were not timed.
    """
    if not 1 < config.grid_k <= rule.get("paired", 1) or plan.streams > 1:
        return config
    found = dataclasses.replace(config, split=2 * config.split, grid_k=config.grid_k // 2)
    busy = (0.6 if found.grid_k == 1 else 0.8) * MULTIPROCESSORS
    is_busy = found.grid_k * _blocks(found, m, n) >= busy
    return found if is_busy and shared_bytes(found) <= ROOM else config


def _is_tall_enough(rule: dict[str, Any], n: int) -> bool:
    """Whether N rows have a block's strips and, where K is not parted, keep four of five multiprocessors busy."""
    if "tall" not in rule:
        return True
    blocks = n / (ROWS * rule["tall"]["strips"])
    places = -(-blocks // MULTIPROCESSORS) * MULTIPROCESSORS
    return blocks >= (1 if "blocks" in rule else 0.8 * places)


def digits_config(plan: Plan, m: int, n: int, k: int, device: str = "hopper") -> Config | None:
    """The blocks of `digits` for ``[M, K] x [N, K]``; None where another kernel is faster or has more room."""
    rules = table(device)["digits"]
    rule = next((r for r in rules if m <= r["max_m"] and _is_for(r, plan)), None)
    if rule is None:
        return None
    chosen = Config(**rule["config"])
    chosen = dataclasses.replace(chosen, grid_k=_parts(chosen, plan, m, n, k, rule["blocks"]))
    shared_bytes = functools.partial(digits.shared_bytes, plan=plan, piece=k // plan.pieces)
    together = rule["blocks"] / MULTIPROCESSORS  # blocks of one
    if together * (shared_bytes(chosen) + 1024) > SHARED_BYTES:  # the driver takes 1024
        return None
    return _paired(chosen, rule, plan, m, n, shared_bytes)


def _parts(config: Config, plan: Plan, m: int, n: int, k: int, wanted: int) -> int:
    """Blocks that share K, where there would be less than `wanted` blocks otherwise."""
    blocks = _blocks(config, m, n)
    stages = k // plan.pieces // (config.row_bytes * config.split)
    parts = 1
    while 2 * parts * blocks <= wanted and 2 * parts <= min(stages, 8):
        parts *= 2
    return parts


def _blocks(config: Config, m: int, n: int) -> int:
    """That take different parts of the result."""
    return -(-n // (ROWS * config.strips)) * -(-m // config.block_m)


def _fitting(config: Config, plan: Plan, piece: int) -> Config:
    if (
        piece % config.row_bytes or plan.streams > 1
    ):  # more codes a stage: keep room for a second block
        config = dataclasses.replace(config, row_bytes=64)
    while config.shared_bytes(plan) > ROOM:
        if config.row_bytes == 128:
            config = dataclasses.replace(config, row_bytes=64)
        elif config.stages > 2:
            config = dataclasses.replace(config, stages=config.stages - 1)
        else:
            config = dataclasses.replace(config, block_m=config.block_m // 2)
    return config


def takes_many(plan: Plan, m: int, device: str = "hopper") -> bool:
    """Whether the kernel for many rows is the fastest way for M rows."""
    rule = _rule(plan, device)
    return rule is not None and rule["from_m"] <= m <= rule.get("to_m", m)


def many(
    plan: Plan, batch: int, m: int, n: int, k: int, device: str = "hopper"
) -> many_rows.Config:
    """The cut of a product of many rows that should take the least time, by the measured time of a step."""
    step = (_rule(plan, device) or {"step_us": (0.3, 0.002)})["step_us"]
    make = functools.partial(many_rows.Config, stages=12)
    fits = functools.partial(many_rows.shared_bytes, plan=plan)
    steps = k // plan.pieces // many_rows.wide(plan)
    return _fastest(make, fits, (batch, m, n, k // many_rows.STEP), steps, step)


def rounded(bits: int, batch: int, m: int, n: int, k: int, device: str = "hopper") -> tiles.Config:
    """The same where x is of 8 bits, and the weight of 8 or 4."""
    rule, sizes = table(device)["rounded"][str(bits)], (batch, m, n, k // tiles.LINE)
    make, fits = functools.partial(tiles.Config, stages=12), w8a8_mosaic_gpu.shared_bytes
    if bits == 4:
        make = functools.partial(many_rows.Config, stages=12, code_stages=4)
        fits = w4a8_mosaic_gpu.shared_bytes
    return _fastest(make, fits, sizes, -(-k // 256), rule["step_us"], rule.get("alone_to_m", 0))


def takes_rounded(bits: int, m: int, device: str = "hopper") -> bool:
    """Whether multiplying in 8 bits is faster than the weight-only kernel for M rows."""
    return m >= table(device)["rounded"][str(bits)]["from_m"]


def _rule(plan: Plan, device: str) -> dict[str, Any] | None:
    return next((rule for rule in table(device)["many"] if _is_for(rule, plan)), None)


def _is_for(rule: dict[str, Any], plan: Plan) -> bool:
    """Whether a rule, which may name a kind, a number of pieces, and zero points, is about a plan."""
    own = {"kind": plan.kind, "pieces": plan.pieces, "has_zero": plan.has_zero}
    return all(rule.get(key, value) == value for key, value in own.items())


def _fastest(
    make: Any, shared_bytes: Any, sizes: tuple[int, int, int, int], tiles_k: int, step_us: Any,
    alone_to_m: int = 0,
) -> Any:  # fmt: skip
    """The fastest of all cuts.

    Args:
      make: a configuration, of `block_m`, `cluster` and `parts`.
      shared_bytes: of one.
      sizes: batch, M, N, steps along K.
      tiles_k: parts at most.
      step_us: microseconds of a step: of all, and for each row of x.
      alone_to_m: rows of x so few that every block fetches its own.
    """
    _, m, n, _ = sizes
    fewest = -(-m // 256)
    cluster = 2 if n > tiles.TALL and m > alone_to_m else 1
    choices = []
    for count in range(fewest, 2 * fewest + 1):
        for parts in (1, 2, 3, 4, 6, 8):
            if parts <= tiles_k:
                block_m = -(-m // (16 * count)) * 16
                config = make(block_m=block_m, cluster=cluster, parts=parts)
                choices.append(_fitting_stages(config, shared_bytes))
    return min(choices, key=lambda c: _us(c, step_us, sizes))


def _fitting_stages(config: Any, shared_bytes: Any) -> Any:
    while shared_bytes(config) > ROOM:
        ring = "stages"
        if config.stages <= 4 and getattr(config, "code_stages", 2) > 2:
            ring = "code_stages"
        config = dataclasses.replace(config, **{ring: getattr(config, ring) - 1})
    return config


def _us(config: tiles.Config, step: Any, sizes: tuple[int, int, int, int]) -> float:
    """Rounds of all blocks, and adding the parts up."""
    batch, m, n, steps = sizes
    rows, columns, whole = tiles.cut(config, batch, m, n)
    clusters = config.blocks // config.cluster
    last = (columns - whole) * rows
    rounds = -(-whole * rows // clusters) + -(-last * config.parts // clusters) / config.parts
    us = rounds * steps * (step[0] + step[1] * config.block_m)
    if config.parts == 1:
        return us
    return us + 3 + last * config.cluster * config.parts * config.block_m / 5000


def decodes_first(plan: Plan, m: int, device: str = "hopper") -> bool:
    """Whether decoding the weight and then a matmul of 16-bit floats is faster for M rows."""
    return m >= table(device)["decode_from_m"][str(plan.pieces)]
