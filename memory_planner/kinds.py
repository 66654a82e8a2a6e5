"""What a primitive is, and what a compiler may do with it: look through it, fuse it, or neither."""

from __future__ import annotations

from typing import Any

from .graph import Op, Value

MATRIX = frozenset({"dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated"})

# Nothing runs, nothing moves.
NAMES_ONLY = frozenset({"barrier", "squeeze", "stop_gradient"})

# Another name for the same bytes, at most another order of axes, which the compiler's layouts absorb.
VIEWS = frozenset(
    {"reshape", "squeeze", "expand_dims", "barrier", "copy", "stop_gradient", "transpose"}
)

# Reductions end a fusion: their operand is computed inside it, their result is written.
REDUCTIONS = frozenset(
    {
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    }
)

# They update a part of their first operand (`append`: of its first ones), in place when nobody needs the old content.
UPDATES = frozenset(
    {
        "append",
        "dynamic_update_slice",
        "scatter",
        "scatter-add",
        "scatter-mul",
        "scatter-min",
        "scatter-max",
        "scatter-sub",
        "scatter-apply",
    }
)

# They read operands from memory and write their results to memory.
OPAQUE = frozenset(
    {
        "gather",
        "sort",
        "top_k",
        "approx_top_k",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
        "reduce_window",
        "reduce_window_max",
        "reduce_window_sum",
        "select_and_scatter_add",
        "select_and_gather_add",
        "pallas_call",
        "custom_linear_solve",
        "fft",
        "cholesky",
        "triangular_solve",
        "lu",
        "qr",
        "eigh",
        "svd",
        "random_bits",
        "threefry2x32",
        "all_gather",
        "all_to_all",
        "psum",
        "psum_scatter",
        "reduce_scatter",
        "ppermute",
        "pmax",
        "pmin",
        "device_put",
        "move",
        "pure_callback",
        "io_callback",
    }
)


def updated(op: Op) -> dict[Value, Value]:
    """For results of `UPDATES` the operands that they are updates of."""
    if op.name not in UPDATES:
        return {}
    results = op.outputs[:-2] if op.name == "append" else op.outputs  # then labels and a count
    return dict(zip(results, op.inputs))


def is_fusible(op: Op) -> bool:
    """Elementwise operations, broadcasts, slices and the like: computed where they are used."""
    if op.name.startswith("scatter") and is_one_hot(op):
        return True
    opaque = op.name in OPAQUE or op.name in UPDATES or op.name in MATRIX or op.blocks
    return not opaque and op.name not in REDUCTIONS


def is_one_hot(op: Op) -> bool:
    """A gather or scatter of one element a row (`take_along_axis`), which becomes a comparison with an iota."""
    numbers: Any = op.params.get("dimension_numbers")
    batched = getattr(numbers, "operand_batching_dims", None)
    if batched is None or len(batched) + len(_ones(op, batched)) < len(op.inputs[0].shape) - 1:
        return False
    if op.name == "gather":
        window, shape = numbers.offset_dims, op.outputs[0].shape
    else:
        window, shape = numbers.update_window_dims, op.inputs[2].shape
    return len(op.inputs[0].shape) > 1 and all(shape[axis] == 1 for axis in window)


def _ones(op: Op, batched: tuple[int, ...]) -> list[int]:
    """Axes of size 1, which jax leaves out of the batch."""
    return [a for a, size in enumerate(op.inputs[0].shape) if size == 1 and a not in batched]


def reads_memory(op: Op) -> bool:
    """Whether the operation needs its operands in memory: no producer is fused into it."""
    if op.name.startswith(("gather", "scatter")):
        return not is_one_hot(op)
    return op.name in OPAQUE or bool(op.blocks)
