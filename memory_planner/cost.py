"""Roofline time of operations and programs on a device.

An operation takes as long as the slowest of its parts would alone: matrix products at the peak rate of their dtype,
other arithmetic at the vector rate, bytes over the bandwidth of the memory or of the host link. A program takes the
sum over its operations; loops count every trip. Nothing overlaps, nothing is launched: for comparing programs, not for
clocks.
"""

from __future__ import annotations

from collections.abc import Container

from .devices import Device
from .graph import HOST, Block, Op, Value
from .kinds import MATRIX, NAMES_ONLY, updated


def op_seconds(op: Op, device: Device, in_memory: Container[Value] | None = None) -> float:
    """Seconds of one run of an operation.

    Args:
      op: what runs.
      device: on which.
      in_memory: values that are written to and read from memory; the others only pass between fused operations and
        cost no bytes. By default nothing is fused.
    """
    if op.blocks:
        return op.trips * max(seconds(block, device, in_memory) for block in op.blocks)
    if op.name in NAMES_ONLY:
        return 0.0
    if op.name == "device_put" and any(v.space == HOST for v in (*op.inputs, *op.outputs)):
        return _transfer_seconds(op, device)
    rate = device.peak(op.inputs[0].dtype) if op.name in MATRIX else device.vector_flops
    moved = [v for v in (*op.inputs, *op.outputs) if not v.literal]
    if in_memory is not None:
        moved = [v for v in moved if v in in_memory]
    return max(op.flops / rate, sum(_touched(op, v) for v in moved) / device.bandwidth)


def seconds(block: Block, device: Device, in_memory: Container[Value] | None = None) -> float:
    """Seconds of a program, or of one run of a block: the sum over its operations. See `op_seconds`."""
    return sum(op_seconds(op, device, in_memory) for op in block.ops)


def _transfer_seconds(op: Op, device: Device) -> float:
    pairs = [(a.space, b.space, b.nbytes) for a, b in zip(op.inputs, op.outputs)]
    down = sum(size for source, target, size in pairs if (source, target) != (HOST, "device"))
    up = sum(size for source, target, size in pairs if (source, target) == (HOST, "device"))
    return down / device.to_host + up / device.from_host


def _touched(op: Op, value: Value) -> int:
    """Bytes that `op` touches of `value`: of what it reads or writes a part of, that part."""
    if op.name in ("dynamic_slice", "gather", "slice") and value is op.inputs[0]:
        return min(value.nbytes, op.outputs[0].nbytes)
    if op.name == "dynamic_update_slice" and value in (op.inputs[0], op.outputs[0]):
        return op.inputs[1].nbytes if value is op.outputs[0] else 0
    if op.name == "append" and any(value in pair for pair in updated(op).items()):
        return 0  # new rows are written, which count as they are read
    return value.nbytes
