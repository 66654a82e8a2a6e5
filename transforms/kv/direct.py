"""A store with a slot for every position of the program's cache: only how rows are stored changes.

New rows are encoded and written when they come. Beside the codes there may be two small buffers in the cache's own
dtype: the first `sinks` positions, and the newest `residual` rows, which stand before the codes when the cache is
read. Since a row is always written through, positions may come in any order, be written twice, wrap around, or differ
over the batch. A codec that encodes tokens in blocks encodes a block again whenever one of its rows is new; the rows
of an unfinished block are all in the residual, so that no row is ever read that was encoded twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels import Kept, Rows, append
from stowax.pallas_kernels.append import (
    entry_of,
    entry_put,
    write_recent,
    write_rows,
    write_sinks,
)

from .method import Method
from .spec import Group

Arrays = dict[str, Any]
BY_HEAD = ("main", "recent", "sinks", "channels")  # buffers with a part for each head


def padded(method: Method, group: Group) -> int:
    """Slots: the cache's length, up to whole blocks."""
    return -(-group.length // method.block) * method.block


def init(method: Method, group: Group) -> Arrays:
    """Shapes of the buffers for one entry of the stack and of the batch."""
    slots, k = padded(method, group), group.heads
    residual = min(method.residual, group.length)
    arrays: Arrays = {"main": [], "recent": [], "sinks": []}
    for s in group.streams:
        codec = method.codec(s.role, s.dtype)
        width = method.width(s.role, s.width)
        arrays["main"].append(codec.part_shapes((k, slots, width)))
        if width < s.width:
            arrays["channels"] = jax.ShapeDtypeStruct((k, width), jnp.int32)
        row = lambda n, s=s: jax.ShapeDtypeStruct((k, n, s.width), jnp.dtype(s.dtype))
        arrays["recent"].append(row(residual))
        arrays["sinks"].append(row(min(method.sinks, group.length)))
    arrays["recent_at"] = jax.ShapeDtypeStruct((residual,), jnp.int32)
    arrays["count"] = jax.ShapeDtypeStruct((), jnp.int32)
    return arrays


def empty(shapes: Arrays) -> Arrays:
    """Zeros, and no recent row."""
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return arrays | {"recent_at": arrays["recent_at"] - 1}


def rows(method: Method, group: Group, arrays: Arrays) -> list[jax.Array]:
    """What the cache holds: for each stream ``[K, S, D]``."""
    if not group.length:
        return [jnp.zeros((group.heads, 0, s.width), s.dtype) for s in group.streams]
    out = []
    for i, s in enumerate(group.streams):
        codec = method.codec(s.role, s.dtype)
        x = codec.decode(arrays["main"][i], method.width(s.role, s.width)).astype(s.dtype)
        if x.shape[-1] < s.width:
            x = _spread(x, arrays["channels"], s.width)
        out.append(x)
    return overlaid(out, arrays, padded(method, group))


def overlaid(rows: Sequence[jax.Array], arrays: Arrays, slots: int) -> list[jax.Array]:
    """Rows ``[K, slots, D]`` of each stream with sinks and recent ones in their places."""
    at = jnp.where(arrays["recent_at"] < 0, slots, arrays["recent_at"])
    out = []
    for x, sinks, recent in zip(rows, arrays["sinks"], arrays["recent"]):
        if sinks.shape[1]:
            x = x.at[:, : sinks.shape[1]].set(sinks)
        if at.size:
            x = x.at[:, at].set(recent, mode="drop")
        out.append(x)
    return out


def place(
    kept: Sequence[jax.Array], new: Sequence[jax.Array], at: Any, how: str
) -> list[jax.Array]:
    """The rows of a cache with new rows in their places.

    Args:
      kept: ``[K, S, D]`` for each stream.
      new: ``[K, T, D]``.
      at: positions ``int32[T]``; S or more for rows to drop.
      how: "run" (consecutive positions), "any", or "roll" (the cache moves down by T). Where rows are only read, also
        "behind": after the last position.
    """
    out = []
    for x, y in zip(kept, new):
        if how == "roll":
            out.append(jnp.concatenate([x[:, y.shape[1] :], y], axis=1))
        elif how == "run":
            out.append(jax.lax.dynamic_update_slice(x, y, (0, at[0], 0)))
        else:
            out.append(x.at[:, at].set(y, mode="drop"))
    return out


def absorb(
    method: Method,
    group: Group,
    arrays: Arrays,
    new: Sequence[jax.Array],
    at: jax.Array,
    how: str,
    queries: Any = None,
    entry: jax.Array | None = None,
) -> Arrays:
    """The buffers, which begin with the batch, after new rows ``[B, K, T, D]``.

    Args:
      at: positions ``int32[T]`` or ``int32[B, T]``.
      how: see `place`.
      entry: where the buffers are a stack, the one that the rows are for; not where they are kept `otherwise`.
    """
    if otherwise(method, how):
        keep = lambda a, n, p, q: _absorb_otherwise(method, group, a, n, p, how, q)
        return jax.vmap(keep, (0, 0, 0 if at.ndim == 2 else None, 0))(arrays, new, at, queries)
    beside = arrays["recent_at"], arrays["count"]
    streams, labels, count = append(
        kept(method, group, arrays),
        new,
        jnp.broadcast_to(at, (new[0].shape[0], at.shape[-1])),
        *(beside if entry is None else entry_of(beside, entry)),
        length=group.length,
        how="run" if how == "run" else "any",
        entry=entry,
    )
    after = (labels, count) if entry is None else entry_put(beside, (labels, count), entry)
    names = ("main", "sinks", "recent")
    buffers = zip(names, zip(*((s.rows.parts, s.sinks, s.recent) for s in streams)))
    return arrays | {n: list(x) for n, x in buffers} | dict(zip(("recent_at", "count"), after))


def kept(method: Method, group: Group, arrays: Arrays) -> list[Kept]:
    """The streams of buffers that begin with the batch."""
    buffers = zip(group.streams, *(arrays[name] for name in ("main", "sinks", "recent")))
    codec = lambda s: method.codec(s.role, s.dtype)
    return [Kept(Rows(x, codec(s), s.width), sinks, recent) for s, x, sinks, recent in buffers]


def otherwise(method: Method, how: str) -> str:
    """Why new rows are not stored by `append`; "" where they are."""
    if method.channels < 1:
        return "channels are dropped"
    return "the program shifts this cache" if how == "roll" else ""


def _absorb_otherwise(
    method: Method, group: Group, arrays: Arrays, new: Sequence[jax.Array], at: jax.Array, how: str, queries: Any
) -> Arrays:  # fmt: skip
    """Where channels are dropped, or the cache moves; of one entry of the batch."""
    out = dict(arrays, main=[])
    if "channels" in arrays:
        out["channels"] = _channels(arrays, new, queries)
    for i, s in enumerate(group.streams):
        codec = method.codec(s.role, s.dtype)
        take = lambda x: x
        if method.width(s.role, s.width) < s.width:
            take = lambda x: _take(x, out["channels"])
        if how == "roll" and codec.block > 1:
            raise ValueError(
                f"{group.name}: the program shifts this cache as it grows, which {codec.name} can't follow, because it "
                "encodes tokens together: use a codec per token, such as `per_token('int4-g32')`"
            )
        beside = take(arrays["sinks"][i]), take(arrays["recent"][i]), arrays["recent_at"]
        out["main"].append(
            write_rows(codec, arrays["main"][i], beside, group.length, take(new[i]), at, how)
        )
    return out | sinks(arrays, new, at, how) | recent(arrays, new, at, how)


def sinks(arrays: Arrays, new: Sequence[jax.Array], at: jax.Array, how: str) -> Arrays:
    """The first rows after new ones."""
    if how == "roll" and arrays["sinks"][0].shape[1]:
        raise ValueError("`sinks` of a cache that the program shifts: use a recipe without `sinks`")
    return {"sinks": write_sinks(arrays["sinks"], new, at)}


def recent(arrays: Arrays, new: Sequence[jax.Array], at: jax.Array, how: str) -> Arrays:
    """The newest rows: a ring in the order in which they came."""
    labels, total = arrays["recent_at"], new[0].shape[1]
    if how == "roll":
        labels = jnp.where(labels < total, -1, labels - total)
    rows, labels, count = write_recent(arrays["recent"], labels, arrays["count"], new, at)
    return {"recent": rows, "recent_at": labels, "count": count}


def _channels(arrays: Arrays, new: Sequence[jax.Array], queries: jax.Array) -> jax.Array:
    """The channels of keys that weigh most in the scores; those of the first call stay.

    ThinK, https://arxiv.org/abs/2407.21018.
    """
    old = arrays["channels"]
    keys = new[0].astype(jnp.float32)
    score = (queries**2).mean(1) * (keys**2).mean(1)
    best = jnp.sort(jax.lax.top_k(score, old.shape[1])[1], axis=1)
    return jnp.where(arrays["count"] == 0, best, old)


def _take(x: jax.Array, channels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, channels[:, None], axis=2)


def _spread(x: jax.Array, channels: jax.Array, width: int) -> jax.Array:
    """Rows with zeros in the channels that were dropped."""
    hot = (channels[..., None] == jnp.arange(width)).astype(x.dtype)
    return jnp.einsum("ksc,kcd->ksd", x, hot)
