"""One token's rows in one kernel: a program encodes and writes what belongs to one head of one stream.

What the codec does is traced, not written again here: any codec whose operations a kernel has is taken. Channels of a
codec per channel are independent, so programs share them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import triton
from ..codecs import PerChannel
from ..decode_attention.rows import Rows
from .kept import Kept
from .xla import relabelled

# Channels of a program, for codecs per channel: the fewer, the less a program waits for its sums.
CHANNELS = 4
WARPS = 4


def refusal(streams: Sequence[Kept], tokens: int) -> str:
    """Why this kernel can't append; "" where it can."""
    if tokens != 1:
        return f"{tokens} new tokens, not 1"
    return next((r for r in (_Stream.of(s).refusal for s in streams) if r), "")


def append(
    streams: Sequence[Kept],
    new: Sequence[jax.Array],
    at: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    entry: jax.Array | None = None,
    *,
    length: int,
    interpret: bool = False,
) -> tuple[tuple[Kept, ...], jax.Array, jax.Array]:
    """See `append`."""
    b, heads, *_ = new[0].shape
    plans = [_Stream.of(s) for s in streams]
    size = labels.shape[1]
    written = [_written(s) for s in streams]
    flat, tree = jax.tree.flatten(written)
    constants = [[p.encode.constants, p.decode.constants if p.decode else []] for p in plans]
    stack = [] if entry is None else [entry.reshape(1)]
    given = [at, count, *([labels] if size else []), list(new), constants, stack]
    operands = [*flat, *jax.tree.leaves(given)]
    structure = jax.tree.structure((written, given))
    body = functools.partial(_body, plans, length, structure, interpret)
    out = triton.call(
        body,
        grid=(b * heads, max(p.programs for p in plans), len(plans)),
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat],
        aliases={i: i for i in range(len(flat))},
        warps=WARPS,
        interpret=interpret,
    )(*operands)
    made = map(_made, streams, jax.tree.unflatten(tree, out))
    if size:
        here = jnp.arange(size, dtype=jnp.int32) == (count % size)[:, None]
        labels = jnp.where(here, at, jax.vmap(relabelled)(labels, at))
    return tuple(made), labels, count + 1


def _written(s: Kept) -> Any:
    """The buffers that there are."""
    return [s.rows.parts, *(x for x in (s.sinks, s.recent) if x.size)]


def _made(s: Kept, buffers: Any) -> Kept:
    parts, *rest = buffers
    more = iter(rest)
    return Kept(
        Rows(parts, s.rows.codec, s.rows.width),
        *(next(more) if x.size else x for x in (s.sinks, s.recent)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """How the rows of one stream are encoded.

    Attributes:
      block: tokens that are encoded together.
      width: elements of a row.
      part: those of them that a program takes.
      encode: of ``f32[block, part]``; parts ``[1, ...]``.
      decode: the reverse; None for one token.
      split: whether programs share the first axis of each part.
      sinks, recent: whether there are such.
    """

    block: int
    width: int
    part: int
    encode: triton.Traced
    decode: triton.Traced | None
    split: bool
    sinks: int
    recent: bool

    @classmethod
    def of(cls, s: Kept) -> _Stream:
        return _stream(s.rows.codec, s.rows.width, s.sinks.shape[-2], s.recent.shape[-2] > 0)

    @property
    def programs(self) -> int:
        return self.width // self.part

    @property
    def refusal(self) -> str:
        return self.encode.refusal or (self.decode.refusal if self.decode else "")


@functools.lru_cache(maxsize=256)
def _stream(codec: Any, width: int, sinks: int, recent: bool) -> _Stream:
    split = isinstance(codec, PerChannel)
    part = math.gcd(width, CHANNELS) if split else width
    rows = jax.ShapeDtypeStruct((codec.block, part), jnp.float32)
    encode, decode = triton.Traced(codec.encode, rows), None
    if codec.block > 1:
        parts = jax.eval_shape(codec.encode, rows)
        decode = triton.Traced(lambda p: codec.decode(p, part), parts)
    return _Stream(codec.block, width, part, encode, decode, split, sinks, recent)


def _body(plans: list[_Stream], length: int, structure: Any, interpret: bool, *refs: Any) -> None:
    inputs, outputs = refs[: structure.num_leaves], refs[structure.num_leaves :]
    written, (at, count, *labels, new, constants, stack) = jax.tree.unflatten(structure, inputs)
    results = jax.tree.unflatten(jax.tree.structure(written), outputs)
    program, chunk, stream = (pl.program_id(i) for i in range(3))
    for i, plan in enumerate(plans):

        @pl.when((stream == i) & (chunk < plan.programs))
        def _(i: int = i, plan: _Stream = plan) -> None:
            heads = new[i].shape[1]
            entry = jax.lax.div(program, heads), jax.lax.rem(program, heads)
            layer = [_clipped(ref[0], written[i]) for ref in stack]
            _Program(plan, entry, (*layer, *entry), chunk, length, interpret).run(
                written[i], results[i], new[i], at, count, labels, constants[i]
            )


def _clipped(index: jax.Array, stacks: Any) -> jax.Array:
    """An entry of stacks as `lax.dynamic_index_in_dim` takes it."""
    size = jax.tree.leaves(stacks)[0].shape[0]
    return jnp.clip(jnp.where(index < 0, index + size, index), 0, size - 1)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: some channels of one head.

    Attributes:
      entry: of the batch, and head.
      where: the same in the buffers, which may be stacks.
      chunk: which channels.
    """

    plan: _Stream
    entry: tuple[jax.Array, jax.Array]
    where: tuple[jax.Array, ...]
    chunk: jax.Array
    length: int
    interpret: bool

    @property
    def channels(self) -> Any:
        return pl.ds(self.chunk * self.plan.part, self.plan.part)

    def run(
        self, old: Any, out: Any, new: Any, at: Any, count: Any, labels: Any, constants: Any
    ) -> None:
        p, b = self.plan, self.entry[0]
        parts, *full = old
        at = at[b, 0]
        row = new[(*self.entry, 0, self.channels)]
        inside = (at >= 0) & (at < self.length)
        first = jnp.where(inside, jax.lax.div(at, p.block), 0)
        rows = row.reshape(1, p.part)
        if p.decode is not None:
            decode = [c[...] for c in constants[1]]
            rows = self.window(parts, full, labels, first, row.dtype, decode)
            here = first * p.block + self.tokens() == at
            rows = jnp.where(here, row.reshape(1, p.part), rows)
        codes = p.encode([c[...] for c in constants[0]], rows.astype(jnp.float32))
        triton.barrier(self.interpret)

        @pl.when(inside)
        def _() -> None:
            put = lambda ref, x: ref.__setitem__(self.place(ref, first), x.reshape(x.shape[1:]))
            jax.tree.map(put, out[0], codes)

        if p.sinks:

            @pl.when((at >= 0) & (at < p.sinks))
            def _() -> None:
                out[1][(*self.where, at, self.channels)] = row

        if p.recent:
            slot = jax.lax.rem(count[b], labels[0].shape[1])
            out[-1][(*self.where, slot, self.channels)] = row

    def tokens(self) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (self.plan.block, 1), 0)

    def place(self, ref: Any, block: jax.Array) -> Any:
        """Where this program's share of a block's part is."""
        rest = [slice(None)] * (len(ref.shape) - len(self.where) - 1)
        if self.plan.split:
            rest[0] = self.channels
        return *self.where, block, *rest

    def window(
        self, parts: Any, full: Any, labels: Any, first: Any, dtype: Any, constants: Any
    ) -> jax.Array:
        """The rows of a block as they are known, sinks and recent ones in their places."""
        p = self.plan
        get = lambda ref: ref[self.place(ref, first)][None]
        rows = p.decode(constants, jax.tree.map(get, parts)).astype(dtype)  # pyright: ignore
        at = first * p.block + self.tokens()
        rows = jnp.where(at < self.length, rows, jnp.zeros((), dtype))
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, p.part), 1) + self.chunk * p.part
        if p.sinks:
            sinks = full[0][*self.where, jnp.minimum(at, p.sinks - 1), lane]
            rows = jnp.where(at < p.sinks, sinks, rows)
        if p.recent:
            found = self.slots(labels[0], at)
            recent = full[-1][*self.where, jnp.maximum(found, 0), lane]
            rows = jnp.where(found >= 0, recent, rows)
        return rows

    def slots(self, labels: Any, at: jax.Array) -> jax.Array:
        """The slot of the ring that has each position, ``int32[block, 1]``, -1 for none."""
        size = labels.shape[1]
        width = pl.next_power_of_2(size)
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        known = labels[self.entry[0], jnp.minimum(slot, size - 1)]
        return jnp.where((at == known) & (slot < size), slot, -1).max(1, keepdims=True)
