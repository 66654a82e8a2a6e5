"""What any compiler does first: drop what nobody reads, merge what is computed twice."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp

from .fusion import users_through_views
from .graph import Block, Op, Value
from .kinds import MATRIX, UPDATES, VIEWS
from .rules import Rules

# The same operands give other results, or the call itself matters.
_IMPURE = frozenset(
    {"barrier", "pure_callback", "io_callback", "random_bits", "rng_uniform", "device_put"}
)


def simplify(block: Block, rules: Rules) -> Block:
    """`block` without dead and repeated operations; values keep their identity."""
    block = with_sunk_broadcasts(block)
    block = without_repeats(with_narrow_stacks(block) if rules.hoists_casts else block)
    block = without_dead(with_own_broadcasts(block))
    block = with_joined_batches(block) if rules.joins_batches else block
    return with_copied_slices(block) if rules.copies_slices else block


def without_dead(block: Block) -> Block:
    """Drops operations whose results don't reach an output; in loops, what a body computes for no one."""
    needed = set(block.outputs)
    kept: list[Op] = []
    for op in reversed(block.ops):
        if op.name in ("io_callback", "debug_callback") or any(v in needed for v in op.outputs):
            op = _without_dead_outputs(op, needed) if op.name == "scan" else op
            if op.name in ("while", "cond"):
                op = dataclasses.replace(op, blocks=tuple(map(without_dead, op.blocks)))
            needed.update(op.inputs)
            kept.append(op)
    return dataclasses.replace(block, ops=tuple(reversed(kept)))


def _without_dead_outputs(op: Op, needed: set[Value]) -> Op:
    """A scan without the stacks that nobody reads, and without the inputs that then no one needs."""
    body, n, c = op.blocks[0], op.consts, op.carries
    keep = [i for i, v in enumerate(op.outputs) if i < c or v in needed]
    inner = without_dead(dataclasses.replace(body, outputs=tuple(body.outputs[i] for i in keep)))
    read = {v for inside in inner.ops for v in inside.inputs} | set(inner.outputs)
    used = [i for i, v in enumerate(inner.inputs) if v in read or n <= i < n + c]
    inner = dataclasses.replace(inner, inputs=tuple(inner.inputs[i] for i in used))
    return dataclasses.replace(
        op,
        inputs=tuple(op.inputs[i] for i in used),
        outputs=tuple(op.outputs[i] for i in keep),
        consts=sum(i < n for i in used),
        blocks=(inner,),
    )


def without_repeats(block: Block) -> Block:
    """Merges operations of equal primitive, parameters and operands."""
    same: dict[Value, Value] = {}
    seen: dict[Hashable, tuple[Value, ...]] = {}
    makers: dict[Value, Op] = {}
    ops: list[Op] = []
    for op in block.ops:
        inputs = tuple(same.get(v, v) for v in op.inputs)
        if op.name == "dynamic_update_slice" and inputs[0].shape == inputs[1].shape:
            same[op.outputs[0]] = inputs[1]  # it updates everything
            continue
        if op.name == "convert_element_type" and (source := _unrounded(op, inputs[0], makers)):
            same[op.outputs[0]] = source
            continue
        inner = tuple(map(without_repeats, op.blocks))
        op = dataclasses.replace(op, inputs=inputs, blocks=inner)
        key = _key(op)
        if key is not None and key in seen:
            same.update(zip(op.outputs, seen[key]))
            continue
        if key is not None:
            seen[key] = op.outputs
        ops.append(op)
        makers.update(dict.fromkeys(op.outputs, op))
    outputs = tuple(same.get(v, v) for v in block.outputs)
    return dataclasses.replace(block, ops=tuple(ops), outputs=outputs)


def _unrounded(op: Op, value: Value, makers: dict[Value, Op]) -> Value | None:
    """What `op` casts back to its own dtype: compilers leave the rounding in between out."""
    maker = makers.get(value)
    if maker is None or maker.name != "convert_element_type":
        return None
    source = maker.inputs[0]
    return source if source.dtype == op.outputs[0].dtype and _is_float(value.dtype) else None


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _key(op: Op) -> Hashable:
    """Equal keys mean equal results; None for what must not be merged."""
    if op.blocks or op.name in _IMPURE:
        return None
    operands = tuple((v.name, v.dtype) if v.literal else id(v) for v in op.inputs)
    return op.name, operands, _text(op.params), tuple((v.shape, str(v.dtype)) for v in op.outputs)


def _text(params: Any) -> str:
    return repr(sorted((key, str(value)) for key, value in params.items()))


def with_narrow_stacks(block: Block) -> Block:
    """Moves casts of what a scan slices out of it, if they make it narrower: the whole stack is cast before."""
    ops: list[Op] = []
    for op in block.ops:
        op = dataclasses.replace(op, blocks=tuple(map(with_narrow_stacks, op.blocks)))
        if op.name == "scan":
            casts, op = _hoisted(op)
            ops += casts
        ops.append(op)
    return dataclasses.replace(block, ops=tuple(ops))


def _hoisted(op: Op) -> tuple[list[Op], Op]:
    body, first = op.blocks[0], op.consts + op.carries
    outer, inner, casts = list(op.inputs), list(body.inputs), []
    gone: dict[Value, Value] = {}
    for i in range(first, len(inner)):
        users = body.users.get(inner[i], [])
        if not users or inner[i] in body.outputs or not all(_narrows(u, inner[i]) for u in users):
            continue
        if len({u.outputs[0].dtype for u in users}) > 1:
            continue
        target = users[0].outputs[0]
        slice_ = dataclasses.replace(inner[i], dtype=target.dtype, nbytes=target.nbytes)
        stack = dataclasses.replace(
            outer[i],
            name=f"{outer[i].name}.cast",
            dtype=target.dtype,
            nbytes=outer[i].nbytes * target.nbytes // inner[i].nbytes,
        )
        casts.append(Op("convert_element_type", (outer[i],), (stack,), users[0].params))
        gone.update({u.outputs[0]: slice_ for u in users})
        outer[i], inner[i] = stack, slice_
    body = _renamed(dataclasses.replace(body, inputs=tuple(inner)), gone)
    return casts, dataclasses.replace(op, inputs=tuple(outer), blocks=(body,))


def _narrows(op: Op, value: Value) -> bool:
    return op.name == "convert_element_type" and 0 < op.outputs[0].nbytes < value.nbytes


def _renamed(block: Block, names: dict[Value, Value]) -> Block:
    """`block` with values replaced, and without the operations that made them."""
    ops = [
        dataclasses.replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))
        for op in block.ops
        if not (op.outputs and op.outputs[0] in names)
    ]
    outputs = tuple(names.get(v, v) for v in block.outputs)
    return dataclasses.replace(block, ops=tuple(ops), outputs=outputs)


def with_sunk_broadcasts(block: Block) -> Block:
    """Moves broadcasts that a loop only reads into its body, where they are fused."""
    ops = []
    for op in block.ops:
        while op.name == "scan" and (found := _sinkable(op, block)):
            op = _sunk(op, *found)
        op = dataclasses.replace(op, blocks=tuple(map(with_sunk_broadcasts, op.blocks)))
        ops.append(op)
    return dataclasses.replace(block, ops=tuple(ops))


def _sinkable(op: Op, block: Block) -> tuple[int, Op] | None:
    """A constant of the loop that a broadcast makes, and the broadcast."""
    for i, value in enumerate(op.inputs[: op.consts]):
        maker = block.producers.get(value)
        if maker is not None and maker.name == "broadcast_in_dim" and len(maker.inputs) == 1:
            return i, maker
    return None


def _sunk(op: Op, i: int, maker: Op) -> Op:
    body, operand = op.blocks[0], maker.inputs[0]
    outer, inner, consts = list(op.inputs), list(body.inputs), op.consts
    inside = operand if operand.literal else dataclasses.replace(operand)
    made = dataclasses.replace(maker, inputs=(inside,), outputs=(inner[i],))
    if operand.literal:
        del outer[i], inner[i]
        consts -= 1
    else:
        outer[i], inner[i] = operand, inside
    body = dataclasses.replace(body, inputs=tuple(inner), ops=(made, *body.ops))
    return dataclasses.replace(op, inputs=tuple(outer), blocks=(body,), consts=consts)


def with_own_broadcasts(block: Block) -> Block:
    """Gives every loop and update a broadcast of its own to start from, as cheap as it is to make again."""
    ops: list[Op] = []
    for op in block.ops:
        op = dataclasses.replace(op, blocks=tuple(map(with_own_broadcasts, op.blocks)))
        if op.blocks or op.name in UPDATES:
            inputs = list(op.inputs)
            for i, value in enumerate(inputs):
                maker = block.producers.get(value)
                if maker is not None and maker.name == "broadcast_in_dim":
                    inputs[i] = dataclasses.replace(value)
                    ops.append(dataclasses.replace(maker, outputs=(inputs[i],)))
            op = dataclasses.replace(op, inputs=tuple(inputs))
        ops.append(op)
    return dataclasses.replace(block, ops=tuple(ops))


def with_copied_slices(block: Block) -> Block:
    """Copies the slices of a scan's stacks that matrix products read, at the begin of its body."""
    ops = []
    for op in block.ops:
        op = dataclasses.replace(op, blocks=tuple(map(with_copied_slices, op.blocks)))
        if op.name == "scan":
            op = dataclasses.replace(op, blocks=(_copied(op.blocks[0], op.consts + op.carries),))
        ops.append(op)
    return dataclasses.replace(block, ops=tuple(ops))


def _copied(body: Block, first: int) -> Block:
    users = users_through_views(body)
    read = [v for v in body.inputs[first:] if any(u.name in MATRIX for u in users.get(v, ()))]
    copies = {v: dataclasses.replace(v, name=f"{v.name}.slice") for v in read}
    ops = [
        dataclasses.replace(op, inputs=tuple(copies.get(v, v) for v in op.inputs))
        for op in body.ops
    ]
    made = [Op("move", (v,), (copy,)) for v, copy in copies.items()]
    return dataclasses.replace(body, ops=(*made, *ops))


def with_joined_batches(program: Block) -> Block:
    """Copies arguments that batched products can't read as they lie, and back what of them is returned.

    Such a product takes one batch axis, so its batch axes must be next to each other in memory: a cache `[B, T, H, D]`
    is moved to `[B, H, T, D]`, all layers of it before the scan over them.
    """
    source = {v: v for v in program.inputs}
    split = _split(program, source)
    copies = {v: dataclasses.replace(v, name=f"{v.name}.moved") for v in split}
    back = {
        v: dataclasses.replace(v, name=f"{v.name}.moved")
        for v in program.outputs
        if source.get(v) in split and v not in split
    }
    ops: list[Op] = []
    ahead = dict(copies)
    for op in program.ops:
        ops += [Op("move", (v,), (ahead.pop(v),)) for v in dict.fromkeys(op.inputs) if v in ahead]
        ops.append(dataclasses.replace(op, inputs=tuple(copies.get(v, v) for v in op.inputs)))
    ops += [Op("move", (v,), (moved,)) for v, moved in back.items()]
    outputs = tuple(back.get(v, v) for v in program.outputs)
    return dataclasses.replace(program, ops=tuple(ops), outputs=outputs)


def _split(block: Block, source: dict[Value, Value]) -> set[Value]:
    """The arguments of the program that a product of `block` reads with its batch axes apart.

    Args:
      source: for values that are an argument, seen or updated, that argument; what `block` makes of them is added.
    """
    found: set[Value] = set()
    for op in block.ops:
        if op.name in VIEWS or op.name in UPDATES:
            source.update({o: source[v] for v, o in zip(op.inputs, op.outputs) if v in source})
        elif op.name == "dot_general":
            sides = zip(op.inputs, op.params["dimension_numbers"][1])
            found |= {source[v] for v, batch in sides if v in source and _are_apart(v, batch)}
        elif op.name == "scan":
            body = op.blocks[0]
            source.update({b: source[v] for v, b in zip(op.inputs, body.inputs) if v in source})
            found |= _split(body, source)
            results = zip(op.outputs, body.outputs)
            source.update({o: source[b] for o, b in results if b in source})
    return found


def _are_apart(value: Value, batch: tuple[int, ...]) -> bool:
    axes = [a for a in batch if value.shape[a] > 1]
    return any(math.prod(value.shape[a + 1 : b]) > 1 for a, b in itertools.pairwise(sorted(axes)))
