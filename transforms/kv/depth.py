"""A store for layers that share directions with their neighbour (MiniCache, https://arxiv.org/abs/2405.14366).

From the middle layer on, layers l and l + 1 are a pair. A row is a magnitude times a direction: each layer keeps its
magnitudes, the pair one direction a token, between the two on the sphere. Tokens whose directions differ most are kept
apart: their rows in both layers, stored by the same codec. Sinks and the newest rows are each layer's own, in the
cache's own dtype.

A pair is merged when the call ends, since the rows of its second layer are known only then: `absorb` leaves the new
rows in the layer's buffers as "fresh", and `merge` takes them out again. What both layers need lies in the first one's
buffers between calls; `spread` lends it to the second.

Differs from the paper: a fixed number of tokens is kept apart (there, those whose distance is in the top of the range),
chosen for keys and for values by the mean distance over heads; a token that leaves them is still there merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.append import write_tokens

from . import direct
from .merge import Merge
from .method import Method
from .spec import Group, Stream

Arrays = dict[str, Any]
BY_HEAD = (*direct.BY_HEAD, "magnitude", "apart")  # buffers with a part for each head
SHARED = ("main", "apart_at", "apart_score")


def slots(merge: Merge, group: Group) -> int:
    """Tokens that are kept apart."""
    return round(merge.apart * group.length)


def init(method: Method, group: Group, side: int | None) -> Arrays:
    """Shapes of the buffers of one layer, for one entry of the batch."""
    arrays = direct.init(method, group)
    if side is None:
        return arrays
    assert method.merge is not None
    k, n = group.heads, slots(method.merge, group)
    each = lambda shape, dtype: [jax.ShapeDtypeStruct(shape, dtype) for _ in group.streams]
    codec = lambda s: method.codec(s.role, s.dtype).part_shapes((k, n, s.width))
    arrays |= {"magnitude": each((k, group.length), jnp.float16)}
    arrays |= {"apart": [codec(s) for s in group.streams]}
    arrays |= {"apart_at": each((n,), jnp.int32), "apart_score": each((n,), jnp.float32)}
    return _own(arrays) if side else arrays


def empty(shapes: Arrays) -> Arrays:
    """Buffers without a row."""
    arrays = direct.empty(shapes)
    if "apart_at" in arrays:
        arrays["apart_at"] = [x - 1 for x in arrays["apart_at"]]
    return arrays


def is_merged(arrays: Arrays) -> bool:
    """Whether the buffers are of a layer in a pair."""
    return "magnitude" in arrays


def rows(method: Method, group: Group, arrays: Arrays) -> list[jax.Array]:
    """What the cache holds: for each stream ``[K, S, D]``; the layer has what its pair shares."""
    out = []
    for i, s in enumerate(group.streams):
        codec = method.codec(s.role, s.dtype)
        x = codec.decode(arrays["main"][i], s.width)
        x = x * arrays["magnitude"][i].astype(jnp.float32)[..., None]
        at = jnp.where(arrays["apart_at"][i] < 0, group.length, arrays["apart_at"][i])
        if at.size:
            x = x.at[:, at].set(codec.decode(arrays["apart"][i], s.width), mode="drop")
        out.append(x.astype(s.dtype))
    return direct.overlaid(out, arrays, group.length)


def absorb(
    group: Group,
    arrays: Arrays,
    new: Sequence[jax.Array],
    at: jax.Array,
    how: str,
) -> Arrays:
    """The buffers with sinks and recent rows of a call, and its new rows to be merged."""
    if how == "roll":
        raise ValueError(
            f"{group.name}: the program shifts this cache as it grows, which merged layers can't follow; use a method "
            "without `merge`"
        )
    out = arrays | direct.recent(arrays, new, at, how) | direct.sinks(arrays, new, at, how)
    return out | {"fresh": list(new), "fresh_at": at}


def spread(method: Method, group: Group, layers: Sequence[Arrays]) -> list[Arrays]:
    """The layers' buffers as a call needs them: the second of a pair has what the first one holds for both."""
    out = list(layers)
    for i in _firsts(layers):
        out[i + 1] = out[i + 1] | {name: out[i][name] for name in SHARED}
    return out


def merge(method: Method, group: Group, layers: Sequence[Arrays]) -> list[Arrays]:
    """The layers' buffers after a call, the new rows of pairs merged."""
    out = list(layers)
    for i in _firsts(layers):
        a, b = layers[i], layers[i + 1]
        if ("fresh" in a) != ("fresh" in b):
            raise ValueError(
                f"{group.name}: the call reads only one of layers {i} and {i + 1}, which are merged; use a method "
                "without `merge`"
            )
        if "fresh" in a:
            a, b = jax.vmap(lambda x, y: _pair(method, group, x, y))(a, b)
        out[i], out[i + 1] = a, _own(b)
    return out


def _firsts(layers: Sequence[Arrays]) -> list[int]:
    pairs = [i for i, x in enumerate(layers) if is_merged(x)]
    return pairs[::2]


def _own(arrays: Arrays) -> Arrays:
    return {name: x for name, x in arrays.items() if name not in SHARED}


def _pair(method: Method, group: Group, a: Arrays, b: Arrays) -> tuple[Arrays, Arrays]:
    """Both layers of a pair with their fresh rows merged, for one entry of the batch."""
    found = [_stream(method, i, s, a, b) for i, s in enumerate(group.streams)]
    shared, first, second = (
        {name: [x[name] for x in each] for name in each[0]} for each in zip(*found)
    )
    rest = lambda layer: {n: x for n, x in layer.items() if n not in ("fresh", "fresh_at")}
    return rest(a) | first | shared, rest(b) | second


def _stream(
    method: Method, i: int, stream: Stream, a: Arrays, b: Arrays
) -> tuple[Arrays, Arrays, Arrays]:
    """What a pair shares of one stream, and what its layers have of it each."""
    assert method.merge is not None
    codec, at = method.codec(stream.role, stream.dtype), a["fresh_at"]
    x, y = (layer["fresh"][i].astype(jnp.float32) for layer in (a, b))
    direction, angle = between(x, y, method.merge.t)
    keep, places, score = _farthest(a["apart_at"][i], a["apart_score"][i], at, angle)

    def own(layer: Arrays, rows: jax.Array) -> Arrays:
        size = jnp.linalg.norm(rows, axis=-1).astype(jnp.float16)
        both = lambda old, new: jnp.concatenate([old, new], axis=1)[:, keep]
        return {
            "magnitude": layer["magnitude"][i].at[:, at].set(size, mode="drop"),
            "apart": jax.tree.map(both, layer["apart"][i], codec.encode(rows)),
        }

    main = write_tokens(codec, a["main"][i], direction, at, "any")
    shared = {"main": main, "apart_at": places, "apart_score": score}
    return shared, own(a, x), own(b, y)


def _farthest(
    places: jax.Array, score: jax.Array, at: jax.Array, angle: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which of the tokens kept apart and the new ones are kept apart now, their positions and angles."""
    again = jnp.any(places[:, None] == at[None], axis=1)
    every = jnp.concatenate([jnp.where((places < 0) | again, -1.0, score), angle.mean(0)])
    best, keep = jax.lax.top_k(every, places.shape[0])
    found = jnp.concatenate([places, at])[keep]
    return keep, jnp.where(best < 0, -1, found), best


def between(x: jax.Array, y: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
    """Unit vectors at `t` on the arcs from `x` to `y`, ``f32[..., D]``, and the arcs' angles in radians."""
    unit = lambda z: z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    x, y = unit(x), unit(y)
    angle = jnp.arccos(jnp.clip((x * y).sum(-1), -1.0, 1.0))
    wide = jnp.where(angle > 1e-4, angle, 1.0)
    arc = lambda share: jnp.where(angle > 1e-4, jnp.sin(share * wide) / jnp.sin(wide), share)
    return unit(arc(1 - t)[..., None] * x + arc(t)[..., None] * y), angle
