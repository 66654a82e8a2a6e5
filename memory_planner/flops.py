"""Floating-point operations of an equation, by primitive.

Multiplications and additions count one each, as in XLA's cost analysis; so does every other arithmetic operation on an
element, transcendental or not. What only moves data counts nothing.
"""

from __future__ import annotations

import math
from typing import Any

MOVES = frozenset(
    {
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "iota",
        "optimization_barrier",
        "pad",
        "pvary",
        "random_unwrap",
        "random_wrap",
        "reduce_precision",
        "reshape",
        "rev",
        "scatter",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)


def flops_of(eqn: Any) -> int:
    """Operations of one run of `eqn`, which holds no blocks. Pallas kernels say their own, if they do."""
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn)
    if name in MOVES:
        return 0
    if name.startswith(("reduce_", "arg", "cum", "scatter", "select_and")):
        return _size(eqn.invars[-1] if name.startswith("scatter") else eqn.invars[0])
    return sum(map(_size, eqn.outvars))


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(shape[axis] for axis in contracted)


def _ragged_dot(eqn: Any) -> int:
    """Every row of the left operand meets the weight of one group."""
    lhs, rhs = (atom.aval.shape for atom in eqn.invars[:2])
    return 2 * math.prod(lhs) * rhs[-1]


def _convolution(eqn: Any) -> int:
    """Taps that fall on padding count too. Groups are in the kernel's shape."""
    spec = eqn.params["dimension_numbers"].rhs_spec
    shape = eqn.invars[1].aval.shape
    taps = math.prod(shape[axis] for axis in spec[1:])
    return 2 * _size(eqn.outvars[0]) * taps // eqn.params["batch_group_count"]


def _sort(eqn: Any) -> int:
    size = _size(eqn.invars[0])
    length = eqn.invars[0].aval.shape[eqn.params.get("dimension", -1)]
    return size * max(1, math.ceil(math.log2(max(length, 2))))


def _pallas_call(eqn: Any) -> int:
    return int(getattr(eqn.params.get("cost_estimate"), "flops", 0) or 0)


_RULES = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
    "conv_general_dilated": _convolution,
    "sort": _sort,
    "top_k": lambda eqn: _size(eqn.invars[0]),
    "pallas_call": _pallas_call,
}
