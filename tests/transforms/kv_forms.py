"""Attention over a KV cache, in the forms that models write it: one table, no line of stowax.

Each form is a function `step(params, x, cache) -> (out, cache)`, called first with a prompt and then token by token.
Blocks (write, mask, softmax, heads) come first, then the forms of static caches; `kv_forms_adversarial` adds
the odd ones and the traps. Axes: b batch, t new tokens, s cached tokens, n query heads, k KV heads, g = n / k, h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B, S, D, N, K, H = 2, 24, 32, 4, 2, 8
G = N // K
L = 2  # layers, where there are several
CALLS = (6, 1, 1, 1)  # tokens of each call
ONE_BY_ONE = (1,) * sum(CALLS)
NEG = -1e9
SIZES = {"b": B, "s": S, "k": K, "n": N, "h": H}


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write attention over a cache.

    Attributes:
      step: `step(params, x, cache) -> (out, cache)`; the first leaf of `out` is `[B, T, ...]`.
      cache: an empty cache, with room for `S` tokens unless it grows.
      inputs: `x` of consecutive calls.
      found: whether there is a cache attention to rewrite.
      kind: `static`, or `adversarial`.
      plain: equals so many layers of causal softmax attention (`reference`); 0 where it does not.
    """

    name: str
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    cache: Any
    inputs: list[Any]
    found: bool
    kind: str
    note: str = ""
    plain: int = 0


FORMS: list[Form] = []


def run(form: Form) -> list[Any]:
    """The outputs of all calls of the form as it is written."""
    cache, outs = form.cache, []
    for x in form.inputs:
        out, cache = form.step(form.params, x, cache)
        outs.append(out)
    return outs


# Parameters, inputs, empty caches


def randn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def weights(seed: int = 0, *, layers: int = 0, heads: int = K, **extra: tuple[int, ...]) -> Any:
    """q, k, v and o of one layer, or of `layers` stacked ones, and what else is named."""
    shapes = {"q": (D, N * H), "k": (D, heads * H), "v": (D, heads * H), "o": (N * H, D), **extra}
    lead = (layers,) if layers else ()
    return {
        name: randn(seed + i, *lead, *shape) / np.float32(math.sqrt(shape[-2]))
        for i, (name, shape) in enumerate(shapes.items())
    }


def embeddings(calls: Sequence[int] = CALLS) -> list[jax.Array]:
    """The same tokens whatever the calls are."""
    x = 1.5 * randn(99, B, sum(CALLS), D)
    return jnp.split(x, np.cumsum(calls)[:-1], axis=1)


def empty(layout: str = "bskh", values: str | None = None, *, dtype: Any = jnp.float32, lead=()):
    """Zeros for K and V, by the letters of their axes, and the index."""
    shapes = {"k": layout, "v": values or layout}
    buffers = {n: jnp.zeros((*lead, *(SIZES[a] for a in s)), dtype) for n, s in shapes.items()}
    return {**buffers, "index": jnp.int32(0)}


def form(name, step, cache=None, *, params=None, inputs=CALLS, **fields) -> None:
    """Adds one form; what is left out is as in the plainest one. `inputs`: arrays, or tokens of each call."""
    if isinstance(inputs, tuple):
        inputs = embeddings(inputs)
    params = weights() if params is None else params
    cache = empty() if cache is None else cache
    fields = {"found": True, "kind": "static", **fields}
    FORMS.append(Form(name, step, params, cache, inputs, **fields))


def reference(params: Any, x: jax.Array, layers: int = 1) -> np.ndarray:
    """Causal softmax attention over all tokens at once, in numpy, head by head."""
    y, params = np.asarray(x, np.float64), jax.tree.map(np.asarray, params)
    for layer in range(layers):
        p = {name: w[layer] if layers > 1 else w for name, w in params.items()}
        q, k, v = ((y @ p[name]).reshape(*y.shape[:2], -1, H) for name in "qkv")
        heads = []
        for n in range(N):
            kv = n * k.shape[2] // N
            logits = q[:, :, n] @ k[:, :, kv].transpose(0, 2, 1) / math.sqrt(H)
            e = np.tril(np.exp(logits))
            heads.append(e / e.sum(-1, keepdims=True) @ v[:, :, kv])
        out = np.concatenate(heads, -1) @ p["o"]
        y = y + out if layers > 1 else out
    return y


# Blocks: project, write, mask, softmax, heads


def project(p, x):
    """x `[..., D]` -> q `[..., N, H]`, k and v `[..., K, H]`."""
    return tuple((x @ p[name]).reshape(*x.shape[:-1], -1, H) for name in "qkv")


def dus(layout="bskh"):
    """Writes new `[B, T, K, H]` at `index` of the axis s."""

    def write(buffer, new, index):
        new = jnp.einsum(f"bskh->{layout}", new).astype(buffer.dtype)
        return lax.dynamic_update_slice_in_dim(buffer, new, index, layout.index("s"))

    return write


def at_set(buffer, new, index):
    return buffer.at[:, index + jnp.arange(new.shape[1])].set(new)


def at_rows(buffer, new, index):
    """Each row at its own index `[B]`."""
    slots = index[:, None] + jnp.arange(new.shape[1])
    return buffer.at[jnp.arange(new.shape[0])[:, None], slots].set(new)


def positions(t, index):
    """`[T, 1]`, or `[B, T, 1]` for an index of each row."""
    return (jnp.asarray(index)[..., None] + jnp.arange(t))[..., None]


def causal(t, index):
    return jnp.arange(S) <= positions(t, index)


def window(size):
    def mask(t, index):
        return causal(t, index) & (jnp.arange(S) > positions(t, index) - size)

    return mask


def fit(mask, scores):
    """A mask `[T, S]` or `[B, T, S]` with axes of size 1 for the heads."""
    return mask.reshape(*mask.shape[:-2], *[1] * (scores.ndim - 3), *mask.shape[-2:])


def softmax(scores, mask):
    return jax.nn.softmax(jnp.where(fit(mask, scores), scores, NEG), axis=-1)


def softmax_add(scores, bias):
    return jax.nn.softmax(scores + bias, axis=-1)


def grouped(keys="bskh", values=None):
    """Query heads grouped by a reshape of q; K and V are read as they lie."""

    def scores(q, k):
        return jnp.einsum(f"btkgh,{keys}->bkgts", q.reshape(*q.shape[:2], K, G, H), k)

    def mix(w, v):
        y = jnp.einsum(f"bkgts,{values or keys}->btkgh", w, v)
        return y.reshape(*y.shape[:2], N, H)

    return scores, mix


def flat(expand=lambda k: k, keys="bsnh"):
    """As many K and V heads as query heads, after `expand`."""
    return (
        lambda q, k: jnp.einsum(f"btnh,{keys}->bnts", q, expand(k)),
        lambda w, v: jnp.einsum(f"bnts,{keys}->btnh", w, expand(v)),
    )


def repeat(k):
    return jnp.repeat(k, G, axis=2)


def broadcast(k):
    k = jnp.broadcast_to(k[:, :, :, None], (*k.shape[:3], G, H))
    return k.reshape(*k.shape[:2], N, H)


def scaled(q):
    return q * H**-0.5


def same(x):
    return x


GROUPED = grouped()
PUT = dus()


def attend(q, k, v, mask, heads=GROUPED, pre=scaled, post=same, soft=softmax, cast=same):
    """q `[B, T, N, H]` over K and V in whatever layout `heads` reads."""
    scores, mix = heads
    return mix(cast(soft(post(scores(pre(q), k)), mask)), v)


def attention(p, x, cache, write=PUT, writev=None, attend=attend, mask=causal):
    """One layer: project, write, attend, project."""
    q, k, v = project(p, x)
    index, t = cache["index"], x.shape[1]
    k, v = write(cache["k"], k, index), (writev or write)(cache["v"], v, index)
    y = attend(q, k, v, mask(t, index)).astype(x.dtype)
    return y.reshape(*x.shape[:2], N * H) @ p["o"], {"k": k, "v": v, "index": index + t}


def with_attend(**kw):
    """The plain layer with some block of `attend` changed."""
    return partial(attention, attend=partial(attend, **kw))


# Static: layouts

form("layout bskh", attention, plain=1)
for letters in ("bksh", "sbkh", "bkhs"):
    step = partial(attention, write=dus(letters), attend=partial(attend, heads=grouped(letters)))
    form(f"layout {letters}", step, empty(letters), plain=1)
form(
    "keys bkhs, values bksh",
    partial(
        attention,
        write=dus("bkhs"),
        writev=dus("bksh"),
        attend=partial(attend, heads=grouped("bkhs", "bksh")),
    ),
    empty("bkhs", "bksh"),
    plain=1,
)


def joined_heads(p, x, cache):
    """[B, S, K*H]: the heads are split at read."""

    def write(buffer, new, index):
        return lax.dynamic_update_slice(buffer, new.reshape(*new.shape[:2], K * H), (0, index, 0))

    def split_and_attend(q, k, v, mask):
        return attend(q, k.reshape(B, S, K, H), v.reshape(B, S, K, H), mask)

    return attention(p, x, cache, write=write, attend=split_and_attend)


def flat_kv(cache):
    return {k: v.reshape(B, S, K * H) if v.ndim else v for k, v in cache.items()}


form("layout bs(kh)", joined_heads, flat_kv(empty()), plain=1)


# Static: several layers


def at_layer(tree, layer):
    return jax.tree.map(lambda w: w[layer], tree)


def layer_dicts(p, x, cache, layer=attention):
    """A dict for each layer, each with its own index."""
    new = {}
    for i, (name, c) in enumerate(cache.items()):
        y, new[name] = layer(at_layer(p, i), x, c)
        x = x + y
    return x, new


def shared_index(p, x, cache):
    new = []
    for i, c in enumerate(cache["layers"]):
        y, c = attention(at_layer(p, i), x, {**c, "index": cache["index"]})
        x, new = x + y, [*new, {"k": c["k"], "v": c["v"]}]
    return x, {"layers": new, "index": cache["index"] + x.shape[1]}


def scan_ys(p, x, cache, layer=attention):
    def body(x, sliced):
        p, k, v = sliced
        y, c = layer(p, x, {"k": k, "v": v, "index": cache["index"]})
        return x + y, (c["k"], c["v"])

    x, (k, v) = lax.scan(body, x, (p, cache["k"], cache["v"]))
    return x, {"k": k, "v": v, "index": cache["index"] + x.shape[1]}


def layer_of(stack, i):
    return lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def scan_carry(p, x, cache):
    """The layer is taken out of the carry, updated, and put back."""

    def body(carry, sliced):
        (x, stacks), (p, i) = carry, sliced
        c = {name: layer_of(stack, i) for name, stack in stacks.items()}
        y, c = attention(p, x, {**c, "index": cache["index"]})
        put = lambda name: lax.dynamic_update_index_in_dim(stacks[name], c[name], i, 0)
        return (x + y, {name: put(name) for name in stacks}), None

    stacks = {"k": cache["k"], "v": cache["v"]}
    (x, stacks), _ = lax.scan(body, (x, stacks), (p, jnp.arange(L)))
    return x, {**stacks, "index": cache["index"] + x.shape[1]}


def scan_carry_tokens(p, x, cache):
    """Only the new tokens are put into the carry, then the layer is taken out."""

    def body(carry, sliced):
        (x, ks, vs), (p, i) = carry, sliced
        q, k, v = project(p, x)
        at = (i, 0, cache["index"], 0, 0)
        ks = lax.dynamic_update_slice(ks, k[None], at)
        vs = lax.dynamic_update_slice(vs, v[None], at)
        y = attend(q, layer_of(ks, i), layer_of(vs, i), causal(x.shape[1], cache["index"]))
        return (x + y.reshape(x.shape) @ p["o"], ks, vs), None

    (x, k, v), _ = lax.scan(body, (x, cache["k"], cache["v"]), (p, jnp.arange(L)))
    return x, {"k": k, "v": v, "index": cache["index"] + x.shape[1]}


def unrolled_stack(p, x, cache):
    k, v, index = cache["k"], cache["v"], cache["index"]
    for i in range(L):
        y, c = attention(at_layer(p, i), x, {"k": k[i], "v": v[i], "index": index})
        x, k, v = x + y, k.at[i].set(c["k"]), v.at[i].set(c["v"])
    return x, {"k": k, "v": v, "index": index + x.shape[1]}


two = {"params": weights(layers=L), "plain": L}
kv = {name: buffer for name, buffer in empty().items() if name != "index"}
each = {f"layer{i}": empty() for i in range(L)}
stack = empty(lead=(L,))
form("layer dicts, index in each", layer_dicts, each, **two)
form("layer list, one index", shared_index, {"layers": [kv] * L, "index": jnp.int32(0)}, **two)
form("layers in jit", partial(layer_dicts, layer=jax.jit(attention)), each, **two)
form("layers in checkpoint", partial(layer_dicts, layer=jax.checkpoint(attention)), each, **two)
form("scan, cache as xs and ys", scan_ys, stack, **two)
form("scan, checkpointed", partial(scan_ys, layer=jax.checkpoint(attention)), stack, **two)
form("scan, cache in the carry by layer", scan_carry, stack, **two)
form("scan, cache in the carry by token", scan_carry_tokens, stack, **two)
form("unrolled over a stack", unrolled_stack, stack, **two)


# Static: one example, vmapped


def example(p, x, cache):
    """Nothing has a batch axis here: x is `[T, D]`, K and V are `[S, K, H]`."""
    q, k, v = project(p, x)
    index, t = cache["index"], x.shape[0]
    k = lax.dynamic_update_slice(cache["k"], k, (index, 0, 0))
    v = lax.dynamic_update_slice(cache["v"], v, (index, 0, 0))
    scores = jnp.einsum("tkgh,skh->kgts", q.reshape(t, K, G, H), k) / math.sqrt(H)
    w = jax.nn.softmax(jnp.where(causal(t, index), scores, NEG))
    y = jnp.einsum("kgts,skh->tkgh", w, v).reshape(t, N * H)
    return y @ p["o"], {"k": k, "v": v, "index": index + t}


axes = {"k": 0, "v": 0, "index": None}
form("vmap, index of each row", jax.vmap(example, (None, 0, 0)), {**kv, "index": jnp.zeros(B, int)})
rows = {**kv, "index": jnp.int32(0)}
form("vmap, one index", jax.vmap(example, (None, 0, axes), (0, axes)), rows, plain=1)


# Static: heads, scale, mask, dtypes, softmax

mha = {"params": weights(heads=N), "cache": empty("bsnh"), "plain": 1}
form("multi-head", with_attend(heads=flat()), **mha)
form("GQA by repeat", with_attend(heads=flat(repeat)), plain=1)
form("GQA by broadcast", with_attend(heads=flat(broadcast)), plain=1)


def squeezed_put(buffer, new, index):
    return lax.dynamic_update_slice_in_dim(buffer, new[:, :, 0], index, 1)


form(
    "MQA without a head axis",
    partial(attention, write=squeezed_put, attend=partial(attend, heads=flat(keys="bsh"))),
    empty("bsh"),
    params=weights(heads=1),
    plain=1,
)
form("scale q by div", with_attend(pre=lambda q: q / math.sqrt(H)), plain=1)
form("scale logits by mul", with_attend(pre=same, post=scaled), plain=1)
form("scale logits by div", with_attend(pre=same, post=lambda s: s / jnp.sqrt(8.0)), plain=1)
form("soft cap", with_attend(post=lambda s: 2.0 * jnp.tanh(s / 2.0)))


def with_mask(mask, **kw):
    return partial(attention, mask=mask, attend=partial(attend, **kw))


def additive(t, index):
    return jnp.where(causal(t, index), 0.0, NEG)


def alibi(t, index):
    slopes = 2.0 ** -(jnp.arange(1, N + 1).reshape(N, 1, 1))
    return additive(t, index) + slopes * (jnp.arange(S) - positions(t, index))


def softmax_compared(scores, mask):
    """A float mask, compared with zero where it is used."""
    return jax.nn.softmax(jnp.where(mask != 0, scores, jnp.finfo(scores.dtype).min))


form("mask added", with_mask(additive, soft=softmax_add), plain=1)
form("ALiBi", with_mask(alibi, soft=softmax_add, heads=flat(repeat)))
form("masks combined", with_mask(lambda t, i: causal(t, i) & (jnp.arange(S) < i + t)), plain=1)
float_mask = lambda t, i: causal(t, i).astype(jnp.float32)
form("mask f32 compared with zero", with_mask(float_mask, soft=softmax_compared), plain=1)
form("sliding window", with_mask(window(4)))


def f32(x):
    return x.astype(jnp.float32)


def bf16(x):
    return x.astype(jnp.bfloat16)


half = empty(dtype=jnp.bfloat16)
as_f32 = lambda q, k, v, mask: attend(q, f32(k), f32(v), mask)
form("bf16 cache read as f32", partial(attention, attend=as_f32), half)
bf16_dots = with_attend(pre=lambda q: bf16(scaled(q)), post=f32, cast=bf16)
form("bf16 dots, f32 softmax", bf16_dots, half)
half_params = jax.tree.map(bf16, weights())
half_inputs = [bf16(x) for x in embeddings()]
form("bf16 model, f32 softmax", bf16_dots, half, params=half_params, inputs=half_inputs)


def dpa(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])


def dpa_lengths(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def lengths_of(t, index):
    return jnp.full((B,), index + t)


form("jax.nn.dot_product_attention, mask", partial(attention, attend=dpa), plain=1)
form(
    "jax.nn.dot_product_attention, lengths",
    partial(attention, attend=dpa_lengths, mask=lengths_of),
    inputs=ONE_BY_ONE,
    plain=1,
)


def deferred(q, k, v, mask):
    """The sum of the exponentials divides after the second dot."""
    scores = jnp.einsum("btnh,bsnh->bnts", scaled(q), repeat(k))
    scores = jnp.where(mask, scores, NEG)
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    y = jnp.einsum("bnts,bsnh->bnth", e, repeat(v)) / e.sum(-1, keepdims=True)
    return jnp.swapaxes(y, 1, 2)


form("deferred softmax", partial(attention, attend=deferred), plain=1)


# Static: writes and positions

form("at set", partial(attention, write=at_set), plain=1)


def right_padded(p, x, cache):
    """x is the tokens and how many of each row are real: rows advance by themselves."""
    x, real = x
    y, new = attention(p, x, cache, write=at_rows)
    return y, {**new, "index": cache["index"] + real}


counts = [jnp.array([6, 4])] + [jnp.ones(B, int)] * 3
form(
    "index of each row",
    right_padded,
    {**kv, "index": jnp.zeros(B, int)},
    inputs=list(zip(embeddings(), counts)),
)


def left_padded(p, x, cache):
    """x is the tokens and a mask `[B, S]` over the whole cache."""
    x, valid = x
    t, index = x.shape[1], cache["index"]
    mask = lambda t, i: causal(t, i) & valid[:, None]
    y, new = attention(p, x, cache, mask=mask)
    return y * lax.dynamic_slice_in_dim(valid, index, t, 1)[..., None], new


valid = jnp.ones((B, S), bool).at[1, :2].set(False)
form("padding mask among the inputs", left_padded, inputs=[(x, valid) for x in embeddings()])


def index_given(p, x, cache):
    """The position comes with the tokens; the cache holds none."""
    x, index = x
    y, new = attention(p, x, {**cache, "index": index})
    return y, {"k": new["k"], "v": new["v"]}


starts = [jnp.int32(i) for i in (0, 6, 7, 8)]
form("index among the inputs", index_given, kv, inputs=list(zip(embeddings(), starts)))


def stored_positions(p, x, cache):
    """The cache holds the position of each slot, -1 where nothing is."""
    t, index = x.shape[1], cache["index"]
    now = jnp.broadcast_to(index + jnp.arange(t), (B, t))
    held = lax.dynamic_update_slice(cache["positions"], now, (0, index))
    mask = lambda *_: (held >= 0)[:, None] & (held[:, None] <= now[..., None])
    y, new = attention(p, x, {name: cache[name] for name in ("k", "v", "index")}, mask=mask)
    return y, {**new, "positions": held}


form(
    "positions in the cache",
    stored_positions,
    {**empty(), "positions": -jnp.ones((B, S), int)},
    plain=1,
)


def rope(x, at):
    """Rotates halves of the last axis of `[B, T, heads, H]` by positions `[T]`."""
    angle = at[:, None, None] * 100.0 ** -(jnp.arange(H // 2) / (H // 2))
    a, b = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def language_model(p, tokens, cache):
    """Tokens in, logits out: tied embeddings, RoPE before the cache, a residual."""
    x, t, index = p["embed"][tokens], tokens.shape[1], cache["index"]
    at = index + jnp.arange(t)
    turn = lambda buffer, new, index: dus()(buffer, rope(new, at), index)
    turned = lambda q, k, v, mask: attend(rope(q, at), k, v, mask)
    y, cache = attention(p, x, cache, write=turn, writev=dus(), attend=turned)
    return (x + y) @ p["embed"].T, cache


ids = jnp.asarray(np.random.default_rng(7).integers(0, 40, (B, sum(CALLS)), np.int32))
ids = jnp.split(ids, np.cumsum(CALLS)[:-1], axis=1)
form("tokens, RoPE before the cache", language_model, params=weights(embed=(40, D)), inputs=ids)

from tests.transforms import kv_forms_adversarial, kv_forms_written  # noqa: E402, F401 (they add to FORMS)
