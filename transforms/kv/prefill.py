"""Many new tokens' attention by a library's kernel on an NVIDIA GPU, where its form allows it; elsewhere by replay.

Into an empty cache it is the attention of the new rows to each other, by the structure of the masks where that is
proved (`structure.py`): what is stored is not decoded. Else masks are evaluated, some queries at a time, on all rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stowax.pallas_kernels import prefill_attention, prefill_refusal
from stowax.pallas_kernels.codecs import LayoutError
from stowax.pallas_kernels.prefill_attention import cudnn

from . import fused
from .axes import Atom
from .match import Attention, stream_key
from .method import Method
from .replay import Replay, Rows, by_blocks
from .softmax import Softmax, recognise
from .spec import Group, Site
from .store import Incoming
from .structure import Structure, structure

MASK_BYTES = 64 << 20  # of masks in 16 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """An attention that a library can run.

    Attributes:
      softmax: what it is.
      time: the axis of the new tokens among those of the queries.
      empty: the structure of its masks where the cache is empty; None where none is proved.
    """

    softmax: Softmax
    time: Atom
    empty: Structure | None


def form(run: Any, found: Attention) -> Prefill:
    """The form of an attention that a library can run. Raises LayoutError with what is in the way."""
    if isinstance(found.start, str):
        raise LayoutError(fused.MOVES)
    softmax = recognise(run, found)
    q = softmax.dot.inputs[softmax.side]
    queries = jax.ShapeDtypeStruct((1, 1, 1, softmax.key.width), q.dtype)
    if reason := cudnn.refusal(queries, softmax.soft_cap):
        raise LayoutError(reason)
    time = _time(run, found, softmax)
    return Prefill(softmax, time, structure(run, found, softmax, time))


def _time(run: Any, found: Attention, softmax: Softmax) -> Atom:
    """The one axis of the queries along which masks differ."""
    lead = run.axes.resolve(softmax.key.lead)
    _, heads = fused.split(lead, softmax.key.batch)
    atoms: set[Atom] = set()
    for mask in softmax.masks:
        labels = run.axes.labels(mask.node.labels)  # pyright: ignore[reportArgumentType]
        dims = fused.varying(run, mask.array)
        if any(len(labels[d]) != 1 for d in dims):
            raise LayoutError("a mask has queries and tokens in one axis")
        atoms |= {labels[d][0] for d in dims}
    others = atoms - {*lead, found.token}
    if atoms & set(heads) or len(others) > 1:
        raise LayoutError("the mask differs between query heads")
    if not others:
        raise LayoutError("the mask is the same for all new tokens")
    return others.pop()


def refusal(method: Method) -> str:
    """Why the attention of a method is replayed; "" where a library may run it."""
    selector = method.selector
    if selector is not None and selector.needs_attention:
        return "the selector looks at attention weights"
    return ""


def describe(site: Site, method: Method, group: Group) -> str:
    """What runs an attention here, and why nothing better does."""
    if reason := refusal(method) or site.unusual:
        return f"replay ({reason})"
    heads, width = group.heads * site.group_size, group.streams[0].width
    q = jax.ShapeDtypeStruct((group.batch, heads, site.rows, width), site.dtype)
    if reason := prefill_refusal(q):
        return f"replay ({reason})"
    empty = f"{site.structure} into an empty cache" if site.structure else ""
    if method.selector is not None:
        return f"cudnn: {empty}, else replay" if empty else "replay (a selector keeps the rows)"
    return f"cudnn: {empty}, else masks as a bias" if empty else "cudnn: masks as a bias"


def attend(run: Any, found: Attention, prefill: Prefill, replayed: Any) -> jax.Array:
    """The result of an attention, laid out as its last matmul gives it; `replayed()` is the same by replay."""
    method, store = run.method(found.reads[0].cell.store), found.reads[0].cell.store
    new = run.incoming(store)
    rows = run.read_rows(store, found) if method.input else new.rows
    q = _queries(run, prefill)
    by_masks = functools.partial(_by_masks, run, found, prefill, q)
    general = replayed if method.selector is not None else by_masks
    local = lambda f: lambda: run.locally(store, f)

    def library() -> jax.Array:
        if prefill.empty is None:
            return general()
        key, value = (
            store.group.streams.index(stream_key(r))
            for r in (prefill.softmax.key, prefill.softmax.value)
        )
        first = functools.partial(_by_structure, run, found, prefill, q, rows[key], rows[value])
        return lax.cond(_is_first(prefill.empty, new), first, local(general))

    return lax.platform_dependent(default=local(replayed), cuda=local(library))


def _is_first(empty: Structure, new: Incoming) -> jax.Array:
    """Whether the new rows go to places 0 to T - 1, and the masks are as was proved for that."""
    return empty.holds() & (new.at == jnp.arange(new.at.shape[-1], dtype=jnp.int32)).all()


def _queries(run: Any, prefill: Prefill) -> tuple[jax.Array, list[Atom]]:
    """The queries ``[B, N, T, D]``, traced factors of the scores in them; and the axes of N beside the heads, and T."""
    softmax, time = prefill.softmax, prefill.time
    q, atoms = fused.queries(run, softmax)
    b, k, _, width = q.shape
    q = q.reshape(b, k, *(a.size for a in atoms), width)
    q = jnp.moveaxis(q, 2 + atoms.index(time), -2).reshape(b, -1, time.size, width)
    q = q * fused.product(softmax.scale, jax.Array).astype(q.dtype)
    return q, [*(a for a in atoms if a is not time), time]


def _result(run: Any, found: Attention, prefill: Prefill, out: jax.Array, atoms: Any) -> jax.Array:
    out = out.reshape(*out.shape[:1], -1, out.shape[-1])
    return fused.arranged(run, found, prefill.softmax, out, atoms)


def _by_structure(
    run: Any, found: Attention, prefill: Prefill, queries: Any, keys: jax.Array, values: jax.Array
) -> jax.Array:
    assert prefill.empty is not None
    q, atoms = queries
    out = prefill_attention(
        q,
        keys.astype(q.dtype),
        values.astype(q.dtype),
        causal=True,
        window=prefill.empty.window,
        scale=fused.product(prefill.softmax.scale, float),
    )
    return _result(run, found, prefill, out, atoms)


def _by_masks(run: Any, found: Attention, prefill: Prefill, queries: Any) -> jax.Array:
    """On all rows, masks made for a block of queries at a time."""
    rows: Rows = run.rows(found)
    (q, atoms), softmax, time = queries, prefill.softmax, prefill.time
    key, value = (
        next(x.astype(q.dtype) for r, x in zip(found.reads, rows.values) if r.role == role)
        for role in ("key", "value")
    )

    def part(start: jax.Array, n: int) -> tuple[jax.Array, None]:
        replay = Replay(run, found, rows, (time, start, n))
        masks = [fused.shown(run, replay, softmax, m, time)[:, 0] for m in softmax.masks]
        block = lax.dynamic_slice_in_dim(q, start, n, axis=2)
        seen = functools.reduce(jnp.logical_and, masks)
        scale = fused.product(softmax.scale, float)
        return prefill_attention(block, key, value, seen=seen, scale=scale), None

    size = max(1, MASK_BYTES // (2 * softmax.key.batch * key.shape[2]))
    out, _ = by_blocks(part, time.size, size, 2)
    return _result(run, found, prefill, out, atoms)


def name(prefill: Prefill) -> str:
    """The structure of its masks where the cache is empty; "" where none is proved."""
    if prefill.empty is None:
        return ""
    return f"causal + window {prefill.empty.window}" if prefill.empty.window else "causal"


def query_shape(prefill: Prefill) -> tuple[int, str]:
    """How many queries of a token share a head of the cache, and their dtype."""
    count, dtype = fused.query_shape(prefill.softmax)
    return count // prefill.time.size, dtype
