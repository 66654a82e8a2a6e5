"""The path that works everywhere, and the definition of what a cache holds after new rows.

Functions but `append` are of one entry of the batch: ``[K, ...]``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..decode_attention.rows import Rows
from .kept import Kept


def append(
    streams: Sequence[Kept],
    new: Sequence[jax.Array],
    at: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    entry: jax.Array | None = None,
    *,
    length: int,
    how: str,
) -> tuple[tuple[Kept, ...], jax.Array, jax.Array]:
    """See `append`."""
    if entry is not None:
        old = entry_of(streams, entry)
        own, labels, count = append(old, new, at, labels, count, length=length, how=how)
        return entry_put(tuple(streams), own, entry), labels, count
    run = functools.partial(_append, [s.rows.codec for s in streams], length, how)
    leaves = [(s.rows.parts, s.sinks, s.recent) for s in streams]
    out, labels, count = jax.vmap(run)(leaves, new, at, labels, count)
    made = lambda s, x: Kept(Rows(x[0], s.rows.codec, s.rows.width), *x[1:])
    return tuple(map(made, streams, out)), labels, count


def entry_of(stack: Any, entry: jax.Array) -> Any:
    """An entry of each array of a pytree of stacks."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x, entry, 0, keepdims=False)
    return jax.tree.map(take, stack)


def entry_put(stack: Any, new: Any, entry: jax.Array) -> Any:
    """The stacks with another entry."""
    put = lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, entry, 0)
    return jax.tree.map(put, stack, new)


def _append(
    codecs: Sequence[Any], length: int, how: str, leaves: Any, new: Any, at: Any, labels: Any, count: Any
) -> Any:  # fmt: skip
    parts = [
        write_rows(codec, old, (sinks, recent, labels), length, x, at, how)
        for codec, (old, sinks, recent), x in zip(codecs, leaves, new)
    ]
    sinks = write_sinks([s for _, s, _ in leaves], new, at)
    recent, labels, count = write_recent([r for *_, r in leaves], labels, count, new, at)
    return list(zip(parts, sinks, recent)), labels, count


def write_rows(
    codec: Any, parts: Any, beside: Any, length: int, new: jax.Array, at: jax.Array, how: str
) -> Any:
    """The parts of rows ``[K, S, D]`` after new ones ``[K, T, D]``.

    Args:
      beside: sinks ``[K, n, D]``, recent rows ``[K, R, D]``, and their positions ``int32[R]``.
      how: see `append`; for codecs per token also "roll" (the cache moves down by T).
    """
    if codec.block == 1:
        return write_tokens(codec, parts, new, at, how)
    window = functools.partial(_window, codec, parts, beside, length)
    return _write_blocks(codec, parts, window, new, at, how)


def write_tokens(codec: Any, parts: Any, new: jax.Array, at: jax.Array, how: str) -> Any:
    """The same for a codec per token."""
    codes = codec.encode(new.astype(jnp.float32))

    def write(old: jax.Array, part: jax.Array) -> jax.Array:
        if how == "roll":
            return jnp.concatenate([old[:, part.shape[1] :], part], axis=1)
        if how == "run":
            return jax.lax.dynamic_update_slice(old, part, (0, at[0], *(0,) * (old.ndim - 2)))
        return old.at[:, at].set(part, mode="drop")

    return jax.tree.map(write, parts, codes)


def _write_blocks(codec: Any, parts: Any, window: Any, new: Any, at: Any, how: str) -> Any:
    """Encodes the blocks that have new rows again; `window` gives the rows of some."""
    n = codec.block
    blocks = jax.tree.leaves(parts)[0].shape[1]

    def write(rows: jax.Array, first: jax.Array, parts: Any, inside: Any = None) -> Any:
        codes = codec.encode(rows.astype(jnp.float32))
        if inside is not None:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, 1, axis=1)
            codes = jax.tree.map(lambda old, c: jnp.where(inside, c, cut(old)), parts, codes)
        put = lambda old, c: jax.lax.dynamic_update_slice_in_dim(old, c, first, axis=1)
        return jax.tree.map(put, parts, codes)

    if how == "run":
        count = min((new.shape[1] + n - 2) // n + 1, blocks)
        first = jnp.minimum(at[0] // n, blocks - count)
        rows = window(first, count, new.dtype)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, new, at[0] - first * n, axis=1)
        return write(rows, first, parts)

    def one(t: Any, parts: Any) -> Any:
        first = jnp.clip(at[t] // n, 0, blocks - 1)
        place = at - first * n
        place = jnp.where(place < 0, n, place)  # a negative index would count from the end
        rows = window(first, 1, new.dtype).at[:, place].set(new, mode="drop")
        return write(rows, first, parts, at[t] < blocks * n)

    return jax.lax.fori_loop(0, new.shape[1], one, parts)


def _window(
    codec: Any, parts: Any, beside: Any, length: int, first: jax.Array, count: int, dtype: Any
) -> jax.Array:
    """The rows ``[K, count * block, D]`` of some blocks, sinks and recent ones in their places."""
    sinks, recent, labels = beside
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)
    rows = codec.decode(jax.tree.map(cut, parts), recent.shape[-1]).astype(dtype)
    at = first * codec.block + jnp.arange(count * codec.block, dtype=jnp.int32)
    choose = lambda flag, x, y: jnp.where(flag[None, :, None], x, y)
    rows = choose(at < length, rows, 0)
    if sinks.shape[1]:
        rows = choose(at < sinks.shape[1], jnp.take(sinks, at, axis=1, mode="clip"), rows)
    if labels.size:
        same = at[:, None] == labels[None]
        rows = choose(same.any(1), jnp.take(recent, same.argmax(1), axis=1), rows)
    return rows


def write_sinks(
    sinks: Sequence[jax.Array], new: Sequence[jax.Array], at: jax.Array
) -> list[jax.Array]:
    """The first rows ``[K, n, D]`` of each stream after new ones."""
    if not sinks[0].shape[1]:
        return list(sinks)
    return [x.at[:, at].set(y, mode="drop") for x, y in zip(sinks, new)]


def write_recent(
    recent: Sequence[jax.Array],
    labels: jax.Array,
    count: jax.Array,
    new: Sequence[jax.Array],
    at: jax.Array,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The newest rows ``[K, R, D]`` of each stream, a ring in order of arrival, with positions and count."""
    total, size = new[0].shape[1], labels.shape[0]
    if not size:
        return list(recent), labels, count + total
    n = min(total, size)
    slot = (count + total - n + jnp.arange(n, dtype=jnp.int32)) % size
    rows = [x.at[:, slot].set(y[:, total - n :]) for x, y in zip(recent, new)]
    return rows, relabelled(labels, at).at[slot].set(at[total - n :]), count + total


def relabelled(labels: jax.Array, at: jax.Array) -> jax.Array:
    """Positions of rows, -1 for those that come again."""
    return jnp.where(jnp.any(labels[:, None] == at[None], axis=1), -1, labels)
