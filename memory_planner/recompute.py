"""Seconds to run an equation again, for the choice of what to keep.

Elementwise operations and reductions fuse with their neighbours, so they cost a share of their own traffic; layout
costs nothing. Counting them in full makes worse plans than exactness of the choice can mend.
"""

from __future__ import annotations

from typing import Any

from .devices import Device
from .flops import MOVES, flops_of
from .kinds import MATRIX, OPAQUE, REDUCTIONS
from .report import tree_nbytes

FUSED_SHARE = 0.1  # of the traffic of an operation that is fused with its neighbours


def recompute_seconds(eqn: Any, device: Device) -> float:
    """Of one run of a jaxpr's equation; of a loop, all its trips."""
    name = eqn.primitive.name
    inner = [
        getattr(x, "jaxpr", x)
        for x in eqn.params.values()
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    ]
    if inner:
        trips = eqn.params.get("length", 1)
        return trips * max(sum(recompute_seconds(e, device) for e in j.eqns) for j in inner)
    moved = tree_nbytes([v.aval for v in (*eqn.invars, *eqn.outvars)]) / device.bandwidth
    if name in MATRIX:
        return max(flops_of(eqn) / device.peak(eqn.invars[0].aval.dtype), moved)
    if name in OPAQUE or name == "gather" or name.startswith("scatter"):
        return moved
    if name in REDUCTIONS or name not in MOVES:
        return FUSED_SHARE * moved
    return 0.0


def is_light(eqn: Any) -> bool:
    """Whether its results are made where they are used, and never worth keeping for what they cost."""
    name = eqn.primitive.name
    return name in MOVES and name not in OPAQUE
