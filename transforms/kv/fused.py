"""One new token's attention by a kernel on the packed rows, where its form and the way of storing allow it.

The codes are attended to as they lie. Rows that the store keeps in full (sinks, the newest, the new one) take part as
such; the codes in their places are hidden. The program's own masks are evaluated at the positions of both. A selector
that looks at the attention's weights gets those that the kernel had made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels import FullRows, append_kernel, attention_kernel, decode_attention
from stowax.pallas_kernels import Rows as Packed
from stowax.pallas_kernels.codecs import LayoutError

from . import direct
from .axes import Atom, Dim
from .defer import ELEMENTWISE
from .evaluate import Evaluation
from .expr import shape_of
from .held import held
from .match import Attention, stream_key
from .method import Method
from .replay import Replay, Rows
from .softmax import Mask, Softmax, made_of, recognise
from .spec import Group, Site
from .store import Incoming, is_ragged, shapes, stored

MOVES = "the cache moves or grows"


def form(run: Any, found: Attention, method: Method, group: Group) -> Softmax:
    """The form of an attention that a kernel can run. Raises LayoutError with what is in the way."""
    if reason := refusal(method, group):
        raise LayoutError(reason)
    return usual(run, found)


def usual(run: Any, found: Attention) -> Softmax:
    """The same, however rows are stored."""
    if found.rows != 1:
        raise LayoutError(f"{found.rows} new tokens, not 1")
    if isinstance(found.start, str):
        raise LayoutError(MOVES)
    softmax = recognise(run, found)
    lead = {*run.axes.resolve(softmax.key.lead), found.token}
    for mask in softmax.masks:
        labels = run.axes.labels(mask.node.labels)  # pyright: ignore
        if any(set(labels[d]) - lead for d in varying(run, mask.array)):
            raise LayoutError("the mask differs between query heads")
    return softmax


def describe(site: Site, method: Method, group: Group) -> str:
    """What runs an attention here, and why nothing better does."""
    if reason := refusal(method, group) or site.unusual:
        return f"replay ({reason})"
    streams = {s.role: i for i, s in enumerate(group.streams)}
    paths = {}
    for arrays in _entries(method, group):
        keys, values = (_packed(method, group, arrays, streams[role]) for role in ("key", "value"))
        shape = (group.batch, group.heads * site.group_size, keys.width)
        q = jax.ShapeDtypeStruct(shape, site.dtype)
        paths[attention_kernel(q, keys, values, group.heads)] = None
    weights = method.selector is not None and method.selector.needs_attention
    return " or ".join(paths) + ", with weights for the selector" * weights


def keeper(site: Site, method: Method, group: Group) -> str:
    """What stores the new rows of an attention here, and why nothing better does."""
    if method.selector is not None or method.merge is not None:
        return "xla (a selector keeps the rows)" if method.selector else "xla (layers are merged)"
    how = "roll" if site.unusual == MOVES and not group.grows else "any"
    if reason := direct.otherwise(method, how):
        return f"xla ({reason})"
    group = stored(method, group)
    return append_kernel(direct.kept(method, group, *_entries(method, group)), site.rows)


def _entries(method: Method, group: Group) -> list[Any]:
    """Shapes of the buffers of a layer, or of every layer where they are of different sizes."""
    found = shapes(method, group)
    if is_ragged(found):
        return found["layers"]
    cut = lambda s: jax.ShapeDtypeStruct(s.shape[len(group.stack) :], s.dtype)
    return [jax.tree.map(cut, found)]


def refusal(method: Method, group: Group) -> str:
    """Why the rows of a method are attended to by replay; "" where a kernel may."""
    if method.input or method.merge is not None or method.channels < 1:
        return "rows are made from what is stored"
    if not method.encodes:
        return "rows are not packed"
    if group.grows or not group.length:
        return "the cache grows"
    if not all(jax.tree.leaves(x["main"])[0].shape[2] for x in _entries(method, group)):
        return "all rows are kept in full"
    return ""


def attend(
    run: Any,
    found: Attention,
    softmax: Softmax,
    method: Method,
    group: Group,
    arrays: Any,
    new: Incoming,
    statistic: Any = None,
) -> tuple[jax.Array, Any]:
    """The result of an attention, laid out as its last matmul gives it, and `statistic` of its weights.

    `statistic`: see `replay.attend`.
    """
    key, value = (group.streams.index(stream_key(r)) for r in (softmax.key, softmax.value))
    keys, values = (_packed(method, group, arrays, i) for i in (key, value))
    mask = functools.partial(_mask, run, found, softmax, group)
    has = held(method, group, arrays, new, mask)
    q, atoms = queries(run, softmax)
    out, _, *weights = decode_attention(
        q.reshape(group.batch, -1, keys.width) * product(softmax.scale, jax.Array).astype(q.dtype),
        keys,
        values,
        jnp.full(group.batch, keys.tokens, jnp.int32),
        seen=_squeezed(has.seen),
        hidden=has.hidden,
        full=[
            FullRows(rows[key], rows[value], _squeezed(flags))
            for rows, flags in has.full
            if flags.shape[-1]
        ],
        scale=product(softmax.scale, float),
        soft_cap=softmax.soft_cap,
        weights=statistic is not None,
    )
    stats = None
    if statistic is not None:
        of_query = has.in_order(*weights).reshape(*q.shape[:2], 1, q.shape[2], -1)
        stats = statistic(of_query, jnp.zeros(1, jnp.int32))
    return arranged(run, found, softmax, out, atoms), stats


def _packed(method: Method, group: Group, arrays: Any, i: int) -> Packed:
    s = group.streams[i]
    return Packed(arrays["main"][i], method.codec(s.role, s.dtype), s.width)


def product(factors: Sequence[Any], kind: type) -> Any:
    """Of those that are numbers, or of those that are arrays."""
    own = [f for f in factors if isinstance(f, kind)]
    return functools.reduce(lambda x, y: x * y, own, 1.0 if kind is float else jnp.float32(1))


def _mask(
    run: Any, found: Attention, softmax: Softmax, group: Group, positions: jax.Array | None
) -> jax.Array:
    """See `held.Mask`."""
    count = group.length if positions is None else positions.shape[2]
    rows = jax.ShapeDtypeStruct((group.batch, group.heads, count, 1), jnp.float32)
    at = None if positions is None else jnp.clip(positions, 0, group.length - 1)
    replay = Replay(run, found, Rows([rows], at, None))  # pyright: ignore[reportArgumentType]
    seen = jnp.ones((group.batch, 1, count), bool)
    for mask in softmax.masks:
        seen &= _by_head(run, replay, softmax, mask, group)
    return seen


def _by_head(run: Any, replay: Replay, softmax: Softmax, mask: Mask, group: Group) -> jax.Array:
    out = shown(run, replay, softmax, mask)
    return jnp.broadcast_to(out, (group.batch, *out.shape[1:]))[:, :, 0]


def shown(
    run: Any, replay: Replay, softmax: Softmax, mask: Mask, time: Atom | None = None
) -> jax.Array:
    """The tokens that a mask lets through, ``bool[1 or B, 1 or K, T, C]``; T is 1 without `time`, a query axis."""
    labels = replay.labels(mask.node)
    dims = varying(run, mask.array)
    coords = [replay.coord(labels, d) if d in dims else None for d in range(len(labels))]
    seen = Evaluation(len(labels), run.array)(mask.array, coords) == mask.shown
    lead, token = run.axes.resolve(softmax.key.lead), replay.found.token
    names = (*lead, *([] if time is None else [time]), token)
    shape = [replay.size(a) if n != 1 else 1 for n, dim in zip(seen.shape, labels) for a in dim]
    atoms = [a for dim in labels for a in dim]
    rest = [i for i, a in enumerate(atoms) if a not in names]  # the same along these
    order = [atoms.index(a) for a in names if a in atoms]
    missing = [i for i, a in enumerate(names) if a not in atoms]
    out = seen.reshape(shape).transpose(*order, *rest)[(..., *(0 for _ in rest))]
    out = jnp.expand_dims(out, missing)
    batch, heads = split(lead, softmax.key.batch)
    full = lambda atoms, have: (
        [a.size for a in atoms] if any(n != 1 for n in have) else [1] * len(atoms)
    )
    n = len(batch)
    sizes = [*full(batch, out.shape[:n]), *full(heads, out.shape[n : len(lead)])]
    last = (1 if time is None else replay.size(time), replay.slots)
    out = jnp.broadcast_to(out, (*sizes, *last[-(len(names) - len(lead)) :]))
    return out.reshape(math.prod(sizes[:n]), math.prod(sizes[n:]), *last)


def split(lead: Dim, batch: int) -> tuple[Dim, Dim]:
    """The atoms of the batch, and those of the heads."""
    n = 0
    while math.prod(a.size for a in lead[:n]) < batch:
        n += 1
    return lead[:n], lead[n:]


def varying(run: Any, x: Any) -> set[int]:
    """The dimensions along which a mask has different entries, as far as its making shows."""
    shape = shape_of(x)
    sized = {d for d, n in enumerate(shape) if n != 1}
    node = made_of(run, x)
    if node is None or node.eqn is None:
        return sized
    if node.op == "broadcast_in_dim":
        dims = node.eqn.params["broadcast_dimensions"]
        inner = varying(run, node.inputs[0])
        return {d for i, d in enumerate(dims) if i in inner}
    if node.op in ("transpose", "reshape", "squeeze"):
        return _moved(run, node, sized)
    if node.op == "iota":
        return {node.eqn.params["dimension"]} & sized
    if node.op in ELEMENTWISE and all(len(shape_of(v)) in (0, len(shape)) for v in node.inputs):
        return set().union(*(varying(run, v) for v in node.inputs if shape_of(v)))
    return sized


def _moved(run: Any, node: Any, sized: set[int]) -> set[int]:
    """The same for an equation that only moves axes, `sized` in its result."""
    inner = varying(run, node.inputs[0])
    if node.op == "transpose":
        return {d for d, i in enumerate(node.eqn.params["permutation"]) if i in inner}
    before = [i for i, n in enumerate(shape_of(node.inputs[0])) if n != 1]
    after = sorted(sized)
    if [shape_of(node.inputs[0])[i] for i in before] != [node.shape[d] for d in after]:
        return sized
    return {d for i, d in zip(before, after) if i in inner}


def _squeezed(seen: jax.Array) -> jax.Array:
    return seen[:, 0] if seen.shape[1] == 1 else seen


def queries(run: Any, softmax: Softmax) -> tuple[jax.Array, list[Atom]]:
    """The queries ``[B, K, G, D]``, and the axes that G is made of."""
    node, side = softmax.dot, softmax.side
    contract, batch = node.eqn.params["dimension_numbers"]  # pyright: ignore
    q = run.array(node.inputs[side])
    result = run.axes.labels(node.labels)
    theirs = run.axes.labels(node.inputs[1 - side].labels)
    free = [d for d in range(q.ndim) if d not in contract[side] and d not in batch[side]]
    start = len(batch[0]) if side == 0 else len(result) - len(free)
    labels: list[Dim] = [()] * q.ndim
    for i, d in enumerate(batch[side]):
        labels[d] = result[i]
    for i, d in enumerate(free):
        labels[d] = result[start + i]
    for d, other in zip(contract[side], contract[1 - side]):
        labels[d] = theirs[other]
    lead, inner = (run.axes.resolve(x) for x in (softmax.key.lead, softmax.key.inner))
    atoms = [a for dim in labels for a in dim]
    others = [a for a in atoms if a not in (*lead, *inner)]
    q = q.reshape([a.size for a in atoms]).transpose(
        [atoms.index(a) for a in (*lead, *others, *inner)]
    )
    key = softmax.key
    return q.reshape(key.batch, key.heads, -1, key.width), others


def query_shape(softmax: Softmax) -> tuple[int, str]:
    """How many queries share a head of the cache, and their dtype."""
    q, key = softmax.dot.inputs[softmax.side], softmax.key
    return math.prod(shape_of(q)) // (key.batch * key.heads * key.width), jnp.dtype(q.dtype).name


def arranged(
    run: Any, found: Attention, softmax: Softmax, out: jax.Array, others: list[Atom]
) -> jax.Array:
    """``[B, N, D]`` as the last matmul lays it out."""
    labels = Replay(run, found, Rows([out[:, :, None]], None, None)).result_labels()
    lead, inner = (run.axes.resolve(x) for x in (softmax.value.lead, softmax.value.inner))
    names = [*lead, *others, *inner]
    order = [names.index(a) for dim in labels for a in dim]
    aval: Any = found.eqn.outvars[0].aval
    return (
        out.reshape([a.size for a in names]).transpose(order).reshape(aval.shape).astype(aval.dtype)
    )
