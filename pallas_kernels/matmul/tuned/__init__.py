"""Measured choices, as data: which blocks for which shape, by device."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

from ...hopper import ROWS, Plan
from ..mosaic_gpu import Config, shared_bytes

SHARED_BYTES = 227 * 1024  # a block of a Hopper GPU has


@functools.cache
def table(device: str) -> dict[str, Any]:
    """The file of a device, ``tuned/<device>.json``."""
    return json.loads((pathlib.Path(__file__).parent / f"{device}.json").read_text())


def config(plan: Plan, m: int, n: int, k: int, device: str = "hopper") -> Config:
    """The blocks for ``[M, K] x [N, K]``: the first rule that fits, made smaller where shared memory is too small."""
    for rule in table(device)["rules"]:
        if m <= rule["max_m"] and rule.get("pieces", plan.pieces) == plan.pieces:
            break
    else:
        raise AssertionError(f"no rule for M = {m}")
    chosen = _fitting(Config(**rule["config"]), plan, k // plan.pieces)
    while n < ROWS * chosen.rows:
        chosen = dataclasses.replace(chosen, rows=chosen.rows // 2)
    blocks = -(-n // (ROWS * chosen.rows)) * -(-m // chosen.block_m)
    stages = k // plan.pieces // (chosen.row_bytes * chosen.split)
    parts = 1
    while 2 * parts * blocks <= rule["blocks"] and 2 * parts <= min(stages, 8):
        parts *= 2
    return dataclasses.replace(chosen, grid_k=parts)


def _fitting(config: Config, plan: Plan, piece: int) -> Config:
    if (
        piece % config.row_bytes or plan.streams > 1
    ):  # more codes a stage: keep room for a second block
        config = dataclasses.replace(config, row_bytes=64)
    while shared_bytes(config, plan) > SHARED_BYTES:
        if config.row_bytes == 128:
            config = dataclasses.replace(config, row_bytes=64)
        elif config.stages > 2:
            config = dataclasses.replace(config, stages=config.stages - 1)
        else:
            config = dataclasses.replace(config, block_m=config.block_m // 2)
    return config


def decodes_first(plan: Plan, m: int, device: str = "hopper") -> bool:
    """Whether decoding the weight and then a matmul of 16-bit floats is faster for M rows."""
    return m >= table(device)["decode_from_m"][str(plan.pieces)]
