"""A store for selected tokens: slots that remember the positions of what they hold.

Four segments, in this order: the first `sinks` positions; the selected tokens, stored by the method's codecs; the
newest `recent` tokens in order; and, while a call runs, its new tokens. Sinks and recent tokens are in the cache's
own dtype. A token enters the selection when it leaves the recent ones, if its score is among the best.

With a pooled selector the heads of a layer share the slots of the selection, and each slot remembers its head: heads
that need more keep more, and the buffers are no larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .method import Method
from .selectors.base import Seen, Selector
from .spec import Group

Arrays = dict[str, Any]
NEVER = -1  # the position of an empty slot


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Slots of each segment."""

    sinks: int
    chosen: int
    recent: int
    heads: int  # that have slots of their own; 1 where they are shared or pooled


def sizes(method: Method, group: Group, layer: int, layers: int) -> Sizes:
    s: Selector = method.selector
    kept = s.tokens(group.length, layer, layers)
    recent = s.window(s.tokens(group.length))
    chosen = kept - s.sinks - recent
    if s.pooled:
        return Sizes(s.sinks, chosen * group.heads, recent, 1)
    return Sizes(s.sinks, chosen, recent, 1 if s.together else group.heads)


def init(method: Method, group: Group, size: Sizes) -> Arrays:
    """Shapes of the buffers for one layer and one entry of the batch."""
    k = group.heads
    arrays: Arrays = {"main": [], "recent": [], "sinks": []}
    stored = 1 if method.selector.pooled else k
    for s in group.streams:
        codec = method.codec(s.role, s.dtype)
        arrays["main"].append(codec.part_shapes((stored, size.chosen, s.width)))
        row = lambda n, s=s: jax.ShapeDtypeStruct((k, n, s.width), jnp.dtype(s.dtype))
        arrays["recent"].append(row(size.recent))
        arrays["sinks"].append(row(size.sinks))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays |= {"main_at": ints(size.heads, size.chosen), "recent_at": ints(size.recent)}
    arrays |= {"sinks_at": ints(size.sinks)}
    arrays |= {
        "main_score": floats(size.heads, size.chosen),
        "recent_score": floats(k, size.recent),
    }
    if method.selector.pooled:
        arrays["head"] = jax.ShapeDtypeStruct((size.chosen,), jnp.int8)
    return arrays


def by_head(method: Method) -> tuple[str, ...]:
    """Names of the buffers with a part for each head."""
    own = ("recent", "sinks", "recent_score")
    if method.selector.pooled:
        return own
    return (*own, "main") if method.selector.together else (*own, "main", "main_at", "main_score")


def empty(shapes: Arrays) -> Arrays:
    """Buffers with every slot empty."""
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    never = {name: arrays[name] + NEVER for name in ("main_at", "recent_at", "sinks_at")}
    return arrays | never


def working(
    method: Method, group: Group, arrays: Arrays, new: Sequence[jax.Array], at: jax.Array, how: str
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Rows ``[K, W, D]`` of each stream, and their `places`."""
    k, rows = group.heads, []
    for i, s in enumerate(group.streams):
        codec = method.codec(s.role, s.dtype)
        chosen = codec.decode(arrays["main"][i], s.width).astype(s.dtype)
        chosen = jnp.broadcast_to(chosen, (k, *chosen.shape[1:]))
        rows.append(
            jnp.concatenate([arrays["sinks"][i], chosen, arrays["recent"][i], new[i]], axis=1)
        )
    return rows, *places(method, group, arrays, at, how)


def places(
    method: Method, group: Group, arrays: Arrays, at: jax.Array, how: str
) -> tuple[jax.Array, jax.Array]:
    """Positions ``int32[K, W]`` of all slots and of new rows at `at`, and which are live."""
    k = group.heads
    old = [_heads(arrays[name], k) for name in ("sinks_at", "main_at", "recent_at")]
    before = jnp.concatenate(old, axis=1)
    if how == "roll":
        before = jnp.where(before < at.size, NEVER, before - at.size)
    live = before >= 0
    live &= ~jnp.any(before[..., None] == at, axis=-1)  # written again
    if method.selector.pooled:
        mine = arrays["head"] == jnp.arange(k, dtype=jnp.int8)[:, None]
        n = arrays["sinks_at"].size
        live = live.at[:, n : n + mine.shape[1]].set(live[:, n : n + mine.shape[1]] & mine)
    length = group.length + (at.size if how == "behind" else 0)
    live = jnp.concatenate([live, jnp.broadcast_to(at < length, (k, at.size))], axis=1)
    positions = jnp.concatenate([before, jnp.broadcast_to(at, (k, at.size))], axis=1)
    return jnp.clip(positions, 0, length - 1), live


def absorb(
    method: Method,
    group: Group,
    arrays: Arrays,
    new: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    positions: jax.Array,
    live: jax.Array,
    stats: Any,
    queries: Any,
) -> Arrays:
    """The buffers after a call with `new` rows. `rows`, what it attended to, are for scores alone: where those do not
    look at rows, none is decoded."""
    selector, total = method.selector, new[0].shape[1]
    score = _score(method, group, arrays, rows, positions, live, stats, queries, total)
    n, c, r = (arrays[f"{name}_at"].shape[-1] for name in ("sinks", "main", "recent"))
    at = jnp.where(live, positions, NEVER)
    sink = _sinks(arrays, new, at, n)
    # recent and new tokens in order; sinks are kept elsewhere
    flow = jnp.where((at[:, n + c :] >= n) | (n == 0), at[:, n + c :], NEVER)
    newest = slice(flow.shape[1] - r, None)
    leaving = flow.shape[1] - r
    flowing = [jnp.concatenate(pair, axis=1) for pair in zip(arrays["recent"], new)]
    out = dict(arrays, **sink)
    out["recent"] = [x[:, newest] for x in flowing]
    out["recent_at"] = flow[0, newest]
    out["recent_score"] = score[:, n + c :][:, newest]
    out["main"] = arrays["main"]
    if not c:
        return out
    pick = _pooled if selector.pooled else _best
    candidates = [x[:, :leaving] for x in flowing]
    chosen = pick(method, group, arrays, score[:, n : n + c + leaving],
                  jnp.concatenate([at[:, n : n + c], flow[:, :leaving]], axis=1), candidates)  # fmt: skip
    return out | chosen


def _score(
    method: Method, group: Group, arrays: Arrays, rows: Any, positions: Any, live: Any, stats: Any,
    queries: Any, total: int,
) -> jax.Array:  # fmt: skip
    """``f32[K, W]``, averaged over heads and chunks where the selector wants that."""
    selector: Selector = method.selector
    k = group.heads
    old = [
        jnp.zeros((k, arrays["sinks_at"].size)),
        _heads(arrays["main_score"], k),
        arrays["recent_score"],
        jnp.zeros((k, total)),
    ]
    keys = next(i for i, s in enumerate(group.streams) if s.role != "value")
    values = next(i for i, s in enumerate(group.streams) if s.role != "key")
    seen = Seen(
        jnp.concatenate(old, axis=1), stats, rows[keys].astype(jnp.float32),
        rows[values].astype(jnp.float32), queries, positions, live, total,
    )  # fmt: skip
    score = selector.score(seen)
    if selector.chunk > 1:
        score = _by_chunk(score, positions, live, selector.chunk, group.length)
    if selector.together:
        score = jnp.broadcast_to(score.mean(0, keepdims=True), score.shape)
    return jnp.nan_to_num(score, nan=0.0, posinf=1e30, neginf=-1e30)


def _by_chunk(score: Any, at: Any, live: Any, chunk: int, length: int) -> jax.Array:
    """The mean score of the live tokens of each chunk of positions."""
    count = -(-length // chunk)

    def one(s: Any, a: Any, v: Any) -> Any:
        ids = a // chunk
        total = jax.ops.segment_sum(jnp.where(v, s, 0.0), ids, count)
        n = jax.ops.segment_sum(v.astype(jnp.float32), ids, count)
        return (total / jnp.maximum(n, 1))[ids]

    return jax.vmap(one)(score, at, live)


def _sinks(arrays: Arrays, new: Sequence[jax.Array], at: Any, n: int) -> Arrays:
    """The first tokens, with new rows in their places."""
    if not n:
        return {}
    last = at[0, at.shape[1] - new[0].shape[1] :]
    where = jnp.where((last >= 0) & (last < n), last, n)
    sinks = [s.at[:, where].set(x, mode="drop") for s, x in zip(arrays["sinks"], new)]
    return {"sinks": sinks, "sinks_at": arrays["sinks_at"].at[where].set(where, mode="drop")}


def _best(
    method: Method, group: Group, arrays: Arrays, score: Any, at: Any, leaving: Any
) -> Arrays:
    """Each head keeps its best; with one token leaving, only one slot is written."""
    shared = arrays["main_at"].shape[0]
    if shared == 1 < at.shape[0]:
        score, at = score[:1], at[:1]
    value = jnp.where(at >= 0, score, -jnp.inf)
    c = arrays["main_at"].shape[1]
    if value.shape[1] == c + 1:
        slot = jnp.argmin(value, axis=1)  # c is the token that leaves: it is dropped
        index = jnp.broadcast_to(slot, (group.heads,))
        write = lambda old, row: jax.vmap(lambda o, y, j: o.at[j].set(y[0], mode="drop"))(
            old, row, index
        )
        codes = _encode(method, group, leaving)
        main = [jax.tree.map(write, m, x) for m, x in zip(arrays["main"], codes)]
        put = lambda x: jax.vmap(lambda y, j: y[:c].at[j].set(y[c], mode="drop"))(x, slot)
        return {"main": main, "main_at": put(at), "main_score": put(score)}
    keep = jnp.sort(jax.lax.top_k(value, c)[1], axis=1)
    index = jnp.broadcast_to(keep, (group.heads, c))
    take = lambda x: jnp.take_along_axis(x, keep, axis=1)
    return {
        "main": _gathered(method, group, arrays, leaving, index),
        "main_at": take(at),
        "main_score": take(score),
    }


def _gathered(method: Any, group: Any, arrays: Any, leaving: Any, index: Any) -> list[Any]:
    """Parts of the kept slots: codes move, they are not made again."""
    both = lambda old, new: jnp.concatenate([old, new], axis=1)
    pick = lambda x: jax.vmap(lambda y, i: y[i])(x, index)
    codes = _encode(method, group, leaving)
    return [
        jax.tree.map(lambda o, n: pick(both(o, n)), m, x) for m, x in zip(arrays["main"], codes)
    ]


def _pooled(
    method: Method, group: Group, arrays: Arrays, score: Any, at: Any, leaving: Any
) -> Arrays:
    """The best of all heads, each head's `guarantee` first."""
    k, c = group.heads, arrays["head"].size
    heads = jnp.arange(k, dtype=jnp.int8)
    own = arrays["head"][None] == heads[:, None]
    value = jnp.where(at >= 0, score, -jnp.inf)
    value = value.at[:, :c].set(jnp.where(own, value[:, :c], -jnp.inf))
    rank = jnp.argsort(jnp.argsort(-value, axis=1), axis=1)
    sure = rank < int(method.selector.guarantee * c / k)
    value = jnp.where(sure & jnp.isfinite(value), value + 1e30, value)
    t = at.shape[1] - c
    mine = jnp.take_along_axis(value[:, :c], arrays["head"].astype(jnp.int32)[None], axis=0)[0]
    flat = jnp.concatenate([mine, value[:, c:].reshape(-1)])
    head = jnp.concatenate([arrays["head"], jnp.repeat(heads, t)])
    keep = jax.lax.top_k(flat, c)[1]
    # A head's slots lie together, in the order in which they came: attention reads no other's.
    keep = keep[jnp.argsort(head[keep].astype(jnp.int32) * flat.size + keep)]
    codes = _encode(method, group, leaving)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.reshape(1, k * t, *new.shape[2:])
        return jnp.concatenate([old, new], axis=1)[:, keep]

    main = [jax.tree.map(merge, m, x) for m, x in zip(arrays["main"], codes)]
    pick = lambda x: jnp.concatenate(
        [
            jnp.take_along_axis(x[:, :c], arrays["head"].astype(jnp.int32)[None], axis=0)[0],
            x[:, c:].reshape(-1),
        ]
    )[keep]
    return {
        "main": main,
        "head": head[keep],
        "main_at": pick(at)[None],
        "main_score": pick(score)[None],
    }


def _encode(method: Method, group: Group, rows: Sequence[jax.Array]) -> list[Any]:
    return [
        method.codec(s.role, s.dtype).encode(x.astype(jnp.float32))
        for s, x in zip(group.streams, rows)
    ]


def _heads(x: jax.Array, k: int) -> jax.Array:
    return jnp.broadcast_to(x if x.ndim == 2 else x[None], (k, x.shape[-1]))


def check(method: Method, group: Group) -> None:
    """Raises where the budget is less than what is always kept."""
    s: Selector = method.selector
    s.check(round(s.budget * group.length) if isinstance(s.budget, float) else s.budget)
    if group.grows:
        raise ValueError(
            f"{group.name}: the program makes this cache longer at each call, so `budget` has no length to hold to; "
            "use a recipe without a selector, or a cache of fixed length"
        )
    if s.pooled and group.heads > 127:
        raise ValueError(f"{group.name} has {group.heads} heads; a pooled selector takes up to 127")
