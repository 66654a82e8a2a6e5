"""What a method keeps of a cache: one door to the two kinds of stores, over stacks and batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from . import depth, direct, slots, tiers
from .method import Method
from .spec import Group


@dataclasses.dataclass(frozen=True, eq=False)
class Incoming:
    """The new rows of a call.

    Attributes:
      rows: for each stream ``[B, K, T, D]``.
      at: their positions, ``int32[T]`` or ``int32[B, T]``.
      how: how the positions lie; see `direct.place`.
    """

    rows: list[jax.Array]
    at: jax.Array
    how: str


@dataclasses.dataclass(frozen=True, eq=False)
class Working:
    """The rows that an attention sees.

    Attributes:
      rows: for each stream ``[B, K, C, D]``.
      positions, live: see `replay.Rows`.
    """

    rows: list[jax.Array]
    positions: jax.Array | None = None
    live: jax.Array | None = None


def fitted(method: Method, group: Group, layer: int = 0, layers: int = 1) -> Method:
    """The method for a group: its share of the budget, and no selector where every token has room."""
    selector = method.selector
    if method.merge is not None and group.layers == 1:
        return dataclasses.replace(
            method, merge=dataclasses.replace(method.merge, layer=(layer, layers))
        )
    if selector is None:
        return method
    if layers > 1 and selector.layers is not None:
        share = selector.tokens(group.length, layer, layers)
        selector = dataclasses.replace(selector, budget=share, layers=None)
        method = dataclasses.replace(method, selector=selector)
    counts = [selector.tokens(group.length, i, group.layers) for i in range(group.layers)]
    if min(counts) < group.length or group.grows:
        return method
    kept = (
        {"residual": selector.window(group.length), "sinks": selector.sinks}
        if method.encodes
        else {}
    )
    return dataclasses.replace(method, selector=None, **kept)


def stored(method: Method, group: Group) -> Group:
    """The geometry of what is stored: keys and values, or what they are made of, one row for all heads."""
    if not method.input:
        return group
    assert group.source is not None
    return dataclasses.replace(group, streams=(group.source,), heads=1)


def check(method: Method, group: Group) -> None:
    """Raises where the method can't keep caches of this geometry."""
    if method.merge is not None and group.grows:
        raise ValueError(
            f"{group.name}: the program makes this cache longer at each call, which merged layers can't follow; use a "
            "method without `merge`, or a cache of fixed length"
        )
    if method.selector is not None:
        slots.check(method, group)


def shapes(method: Method, group: Group) -> Any:
    """The buffers of a group, as shapes. Layers of different sizes are a list."""
    group = stored(method, group)
    stacked = lambda tree, lead: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*lead, group.batch, *s.shape), s.dtype), tree
    )
    if method.merge is not None:
        sides = method.merge.sides(group)
        if len(sides) == 1:
            return stacked(depth.init(method, group, sides[0]), group.stack)
        return {"layers": [stacked(depth.init(method, group, side), ()) for side in sides]}
    if method.selector is None:
        return stacked(direct.init(method, group), group.stack)
    layers = [slots.sizes(method, group, i, group.layers) for i in range(group.layers)]
    if len(set(layers)) == 1:
        return stacked(slots.init(method, group, layers[0]), group.stack)
    return {"layers": [stacked(slots.init(method, group, size), ()) for size in layers]}


def empty(method: Method, group: Group) -> Any:
    """The buffers of a group, with nothing in them."""
    found = shapes(method, group)
    make = depth.empty if method.selector is None else slots.empty
    new = {"layers": list(map(make, found["layers"]))} if is_ragged(found) else make(found)
    return tiers.put(new, method.tier)


def is_ragged(arrays: Any) -> bool:
    """Whether the layers of a stack have buffers of different sizes."""
    return isinstance(arrays, dict) and "layers" in arrays


def is_used(arrays: Any) -> bool:
    """Whether concrete buffers hold a row."""
    parts = arrays["layers"] if is_ragged(arrays) else [arrays]
    counts = [part["count"] > 0 for part in parts if "count" in part]
    places = [x >= 0 for part in parts for k, x in part.items() if k.endswith("_at")]
    return any(bool(x.any()) for x in (*counts, *places))


def nbytes(method: Method, group: Group) -> int:
    """Bytes of the buffers."""
    return _total(jax.tree.leaves(shapes(method, group)))


def nbytes_host(method: Method, group: Group) -> int:
    """Those of them that are in host memory."""
    return _total(tiers.on_host(shapes(method, group), method.tier))


def _total(leaves: list[Any]) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in leaves)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of one layer's buffers, the whole batch.

    Attributes:
      head: of each head, equal for all; 0 where heads share the buffers of the selection (pooled) or the rows (input).
      shared: what belongs to no head: positions, counts, pooled slots.
      total: all of it.
    """

    head: int
    shared: int
    total: int


def layer_nbytes(method: Method, group: Group) -> tuple[Bytes, ...]:
    """Bytes of each layer's buffers; their sum is `nbytes`."""
    found = shapes(method, group)
    layers = found["layers"] if is_ragged(found) else [found] * group.layers
    stack = 1 if is_ragged(found) else group.layers
    return tuple(_layer_bytes(method, group, layer, stack) for layer in layers)


def _layer_bytes(method: Method, group: Group, arrays: Any, stack: int) -> Bytes:
    count = lambda tree: sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(tree))
    names = depth.BY_HEAD if method.selector is None else slots.by_head(method)
    names = () if method.input else names  # one row for all heads
    total, own = (count(t) // stack for t in (arrays, [arrays[n] for n in names if n in arrays]))
    return Bytes(own // group.heads, total - own, total)


def working(method: Method, group: Group, arrays: Any, new: Incoming) -> Working:
    """The rows to attend to: those kept, and the new ones as they are."""
    group = stored(method, group)
    at, how = new.at, new.how
    batched = 0 if at.ndim == 2 else None
    if method.selector is not None:
        view = jax.vmap(lambda a, n, p: slots.working(method, group, a, n, p, how), (0, 0, batched))
        return Working(*view(arrays, new.rows, at))

    def one(a: Any, n: Any, p: Any) -> Any:
        kept = (depth if depth.is_merged(a) else direct).rows(method, group, a)
        if how == "behind":
            return [jnp.concatenate([x[:, : group.length], y], axis=1) for x, y in zip(kept, n)]
        if group.grows:
            extra = group.length + n[0].shape[1] - kept[0].shape[1]
            kept = [jnp.pad(x, ((0, 0), (0, max(0, extra)), (0, 0))) for x in kept]
        return direct.place(kept, n, p, how)

    placed = jax.vmap(one, (0, 0, batched))(arrays, new.rows, at)
    longer = group.grows or how == "behind"
    length = group.length + (new.rows[0].shape[2] if longer else 0)
    return Working([x[:, :, :length] for x in placed])


def slots_of(
    method: Method, group: Group, arrays: Any, new: Incoming
) -> tuple[jax.Array, jax.Array]:
    """Of a selector's slots and the new rows the positions ``int32[B, K, W]``, and which are live ``bool[B, K, W]``."""
    batched = 0 if new.at.ndim == 2 else None
    view = jax.vmap(lambda a, p: slots.places(method, group, a, p, new.how), (0, batched))
    return view(arrays, new.at)


def placed(kept: list[jax.Array], new: list[jax.Array], at: jax.Array) -> list[jax.Array]:
    """Rows ``[B, K, S, D]`` with new ones at consecutive positions."""
    return jax.vmap(lambda k, n: direct.place(k, n, at, "run"))(kept, new)


def absorb(
    method: Method,
    group: Group,
    arrays: Any,
    new: Incoming,
    w: Working | None,
    stats: Any,
    queries: Any = None,
    entry: jax.Array | None = None,
) -> Any:
    """The buffers with the new rows stored. A selector looks at `w`, `stats` of it, and `queries`.

    Where `in_place` says so, the buffers may be a stack, and `entry` the one that the rows are for.
    """
    group = stored(method, group)
    if method.selector is not None:
        assert w is not None
        keep = lambda a, n, r, p, v, s, q: slots.absorb(method, group, a, n, r, p, v, s, q)
        return jax.vmap(keep)(arrays, new.rows, w.rows, w.positions, w.live, stats, queries)
    if group.grows:
        arrays = _lengthen(method, group, arrays, new.rows[0].shape[2])
    if depth.is_merged(arrays):
        keep = lambda a, n, p: depth.absorb(group, a, n, p, new.how)
        batched = 0 if new.at.ndim == 2 else None
        return jax.vmap(keep, (0, 0, batched))(arrays, new.rows, new.at)
    return direct.absorb(method, group, arrays, new.rows, new.at, new.how, queries, entry)


def in_place(method: Method, group: Group, arrays: Any, how: str) -> bool:
    """Whether new rows are written into buffers on the device, which keep their shapes."""
    other = method.selector is not None or group.grows or depth.is_merged(arrays)
    return not other and method.tier == "device" and not direct.otherwise(method, how)


def _lengthen(method: Method, group: Group, arrays: Any, rows: int) -> Any:
    """Buffers for a cache of more tokens."""
    longer = dataclasses.replace(group, length=group.length + rows)
    want = jax.tree.map(
        lambda s: (group.batch, *s.shape),
        direct.init(method, longer),
        is_leaf=lambda s: hasattr(s, "shape"),
    )
    fit = lambda x, shape: jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape)])
    flat, tree = jax.tree.flatten(arrays)
    sizes = jax.tree.leaves(want, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.unflatten(tree, [fit(x, s) for x, s in zip(flat, sizes)])
