"""The odd forms of attention over a cache, and the traps: what looks like one and must be left alone."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.transforms import kv_forms
from tests.transforms.kv_forms import (
    NEG,
    ONE_BY_ONE,
    B,
    D,
    G,
    H,
    K,
    L,
    N,
    S,
    at_layer,
    attend,
    attention,
    bf16,
    causal,
    dus,
    empty,
    f32,
    fit,
    flat,
    grouped,
    project,
    randn,
    repeat,
    rope,
    same,
    scaled,
    softmax,
    weights,
    with_attend,
    with_mask,
)

form = partial(kv_forms.form, kind="adversarial")
trap = partial(form, found=False)


def project_out(p, y):
    return y.reshape(*y.shape[:2], -1) @ p["o"]


# Softmax, and what stands in its place


def masked(scores, mask):
    return jnp.where(fit(mask, scores), scores, NEG)


def softmax_where(scores, mask):
    return jax.nn.softmax(scores, axis=-1, where=fit(mask, scores))


def where_after(scores, mask):
    return jnp.where(fit(mask, scores), softmax(scores, mask), 0.0)


def dropout(scores, mask):
    w = softmax(scores, mask)
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, w.shape), w / 0.9, 0.0)


def minus_logsumexp(scores, mask):
    scores = masked(scores, mask)
    return jnp.exp(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True))


def no_maximum(scores, mask):
    e = jnp.exp(masked(scores, mask))
    return e / e.sum(-1, keepdims=True)


def exponentials(scores):
    return jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))


def reciprocal(scores, mask):
    e = exponentials(masked(scores, mask))
    return e * (1.0 / e.sum(-1, keepdims=True))


def one_more(scores, mask):
    """A denominator with exp(0) in it."""
    scores = masked(scores, mask)
    top = jnp.maximum(scores.max(-1, keepdims=True), 0.0)
    e = jnp.exp(scores - top)
    return e / (jnp.exp(-top) + e.sum(-1, keepdims=True))


def sink(scores, mask):
    """A logit of each head beside the scores, dropped after the softmax."""
    sinks = jnp.linspace(-1.0, 1.0, N).reshape(K, G, 1, 1)
    sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([masked(scores, mask), sinks], -1))[..., :-1]


def sink_first(scores, mask):
    sinks = jnp.zeros((*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([sinks, masked(scores, mask)], -1))[..., 1:]


def sigmoid(scores, mask):
    return jax.nn.sigmoid(masked(scores, mask) - math.log(S))


def no_empty_rows(scores, mask):
    """-inf where masked; a row with nothing in it gives zeros, not NaN."""
    scores = jnp.where(fit(mask, scores), scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    e = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = e.sum(-1, keepdims=True)
    return e / jnp.where(total == 0, 1.0, total)


softmax_vjp = jax.custom_vjp(softmax)
softmax_vjp.defvjp(lambda s, m: (softmax(s, m), (s, m)), lambda r, g: jax.vjp(softmax, *r)[1](g))

form("softmax(where=)", with_attend(soft=softmax_where), plain=1)
form("where after softmax", with_attend(soft=where_after), plain=1)
form("dropout on the weights", with_attend(soft=dropout))
form("exp(x - logsumexp)", with_attend(soft=minus_logsumexp), plain=1)
form("no max subtraction", with_attend(soft=no_maximum), plain=1)
form("exp times reciprocal", with_attend(soft=reciprocal), plain=1)
form("denominator plus one", with_attend(soft=one_more))
form("sink logits", with_attend(soft=sink))
form("sink logit first", with_attend(soft=sink_first))
form("sigmoid", with_attend(soft=sigmoid), note="no softmax, but attention over a cache")
form("-inf, empty rows handled", with_attend(soft=no_empty_rows), plain=1)
form("softmax in checkpoint", with_attend(soft=jax.checkpoint(softmax)), plain=1)
form("softmax in custom_vjp", with_attend(soft=softmax_vjp), plain=1)
form("weights cast to bf16", with_attend(cast=lambda w: f32(bf16(w))))
form("logits in bf16", with_attend(post=bf16, cast=f32))


def turned_scores(q, k):
    """[B, S, T, N] and back between the dots."""
    scores = jnp.einsum("btnh,bsnh->bstn", q, repeat(k))
    return scores.reshape(B, S, -1).transpose(0, 2, 1).reshape(B, -1, N, S).swapaxes(1, 2)


def keys_first(q, k):
    return jnp.einsum("bskh,btkgh->kgbst", k, q.reshape(B, -1, K, G, H)).transpose(2, 0, 1, 4, 3)


def values_first(w, v):
    return jnp.einsum("bskh,bkgts->hbkgt", v, w).transpose(1, 4, 2, 3, 0).reshape(B, -1, N, H)


def heads_in_the_batch(q, k, v, mask):
    """Batch and heads merged into one axis for both dots."""
    lay = lambda x: x.swapaxes(1, 2).reshape(B * N, -1, H)
    q, k, v = lay(scaled(q)), lay(repeat(k)), lay(repeat(v))
    y = softmax(q @ k.swapaxes(1, 2), mask) @ v
    return y.reshape(B, N, -1, H).swapaxes(1, 2)


form("scores reshaped and transposed", with_attend(heads=(turned_scores, flat(repeat)[1])), plain=1)
form("einsum with k first", with_attend(heads=(keys_first, values_first)), plain=1)
form("batch and heads merged", partial(attention, attend=heads_in_the_batch), plain=1)


# What becomes of K between the cache and the dot


def normed(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rope_at_read(p, x, cache):
    def turned(q, k, v, mask):
        at = cache["index"] + jnp.arange(x.shape[1])
        return attend(rope(q, at), rope(k, jnp.arange(S)), v, mask)

    return attention(p, x, cache, attend=turned)


qk_norm = lambda q, k, v, mask: attend(normed(q), normed(k), v, mask)
form("RoPE on the cached K", rope_at_read, note="K may not be packed with its rotation inside")
form("K normalised at read", partial(attention, attend=qk_norm))


# Flow around the attention


def tail(p, y, k, v, cache, t):
    """Output and cache at the end of a layer."""
    return project_out(p, y), {"k": k, "v": v, "index": cache["index"] + t}


def updated(p, x, cache):
    """q, the updated K and V, the mask and T."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    return q, dus()(cache["k"], k, i), dus()(cache["v"], v, i), causal(t, i), t


def flash(p, x, cache, block=8):
    """Blocks of the cache in a scan, with the running maximum and sum."""
    q, k, v, mask, t = updated(p, x, cache)
    q = scaled(q).reshape(B, t, K, G, H)
    cut = lambda x: x.reshape(B, S // block, block, K, H).swapaxes(0, 1)
    masks = mask.reshape(t, S // block, block).swapaxes(0, 1)

    def body(carry, blocks):
        (y, top, total), (k, v, mask) = carry, blocks
        scores = jnp.where(mask, jnp.einsum("btkgh,bskh->bkgts", q, k), NEG)
        new = jnp.maximum(top, scores.max(-1))
        e, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        y = y * old[..., None] + jnp.einsum("bkgts,bskh->bkgth", e, v)
        return (y, new, total * old + e.sum(-1)), None

    start = jnp.zeros((B, K, G, t))
    start = (jnp.zeros((B, K, G, t, H)), start - jnp.inf, start)
    (y, _, total), _ = lax.scan(body, start, (cut(k), cut(v), masks))
    y = jnp.moveaxis(y / total[..., None], 3, 1).reshape(B, t, N, H)
    return tail(p, y, k, v, cache, t)


def attend_in_cond(p, x, cache):
    """A prompt attends to itself, later tokens to the cache."""
    q, k, v = project(p, x)
    i, t = cache["index"], x.shape[1]
    ks, vs = dus()(cache["k"], k, i), dus()(cache["v"], v, i)
    prompt = lambda: attend(q, k, v, jnp.tri(t, dtype=bool))
    y = lax.cond(i == 0, prompt, lambda: attend(q, ks, vs, causal(t, i)))
    return tail(p, y, ks, vs, cache, t)


def layer_in_cond(p, x, cache):
    """A layer that may be skipped, cache and all."""
    skip = lambda x, cache: (jnp.zeros_like(x), {**cache, "index": cache["index"] + x.shape[1]})
    return lax.cond(cache["index"] < 100, partial(attention, p), skip, x, cache)


def attend_in_switch(p, x, cache):
    q, k, v, mask, t = updated(p, x, cache)
    near = kv_forms.window(4)(t, cache["index"])
    branches = [partial(attend, mask=mask), partial(attend, mask=near)]
    return tail(p, lax.switch(cache["index"] % 2, branches, q, k, v), k, v, cache, t)


def token_loop(loop):
    """The tokens of a call one by one, in a loop inside of the step."""

    def step(p, x, cache):
        def body(i, state):
            out, cache = state
            y, cache = attention(p, lax.dynamic_slice_in_dim(x, i, 1, 1), cache)
            return lax.dynamic_update_slice_in_dim(out, y, i, 1), cache

        return loop(x.shape[1], body, (jnp.zeros_like(x), cache))

    return step


def while_loop(count, body, state):
    more, advance = lambda c: c[0] < count, lambda c: (c[0] + 1, body(*c))
    return lax.while_loop(more, advance, (0, state))[1]


def mapped(f):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("heads",))
    none, axis = jax.P(), jax.P(None, None, "heads")
    return jax.shard_map(f, mesh=mesh, in_specs=(axis, axis, axis, none), out_specs=axis)


def attend_plain(q, k, v, mask):
    return attend(q, k, v, mask)


attend_vjp = jax.custom_vjp(attend_plain)
attend_vjp.defvjp(lambda *a: (attend_plain(*a), a), lambda a, g: jax.vjp(attend_plain, *a)[1](g))


@jax.named_scope("attention")
def wrapped(p, x, cache):
    q, k, v, mask, t = updated(p, x, cache)
    k, v = lax.optimization_barrier((checkpoint_name(k, "keys"), v))
    return tail(p, checkpoint_name(attend(q, k, v, mask), "attended"), k, v, cache, t)


def sown(p, x, cache):
    """The attention matrix is an output too."""
    q, k, v, mask, t = updated(p, x, cache)
    scores, mix = grouped()
    w = softmax(scores(scaled(q), k), mask)
    y, cache = tail(p, mix(w, v), k, v, cache, t)
    return (y, {"weights": w}), cache


form("flash-style scan over blocks", flash, plain=1)
form("attention in cond", attend_in_cond, plain=1)
form("layer in cond", layer_in_cond, plain=1)
form("attention in switch, two masks", attend_in_switch)
form("decode loop: while", token_loop(while_loop), plain=1)
by_fori = token_loop(lambda n, body, state: lax.fori_loop(0, n, body, state))
form("decode loop: fori, a scan", by_fori, plain=1)
form("attention in shard_map", partial(attention, attend=mapped(attend)), plain=1)
form("attention in custom_vjp", partial(attention, attend=attend_vjp), plain=1)
form("barrier, checkpoint_name, named_scope", wrapped, plain=1)
form("attention weights returned", sown, plain=1)


# Caches that are not one dynamic_update_slice of one array


def concatenated(axis):
    return lambda buffer, new, index: jnp.concatenate([buffer, new], axis)


def grows(p, x, cache):
    mask = lambda t, i: jnp.tri(t, cache["k"].shape[1] + t, cache["k"].shape[1], dtype=bool)
    step = partial(attention, write=concatenated(1), mask=mask)
    y, new = step(p, x, {**cache, "index": jnp.int32(0)})
    return y, {"k": new["k"], "v": new["v"]}


def grows_bksh(p, x, cache):
    """With K and V in a tuple, and no mask for a single token."""
    (q, *new), (k, v), t = project(p, x), cache, x.shape[1]
    k, v = (jnp.concatenate([a, b.swapaxes(1, 2)], 2) for a, b in zip((k, v), new))
    soft = jax.nn.softmax if t == 1 else softmax
    mask = -1 if t == 1 else jnp.tri(t, k.shape[2], k.shape[2] - t, dtype=bool)
    y = attend(q, k, v, mask, heads=grouped("bksh"), soft=soft)
    return project_out(p, y), (k, v)


def rolling(put, layer=attention):
    """The newest token lies last; older ones move to the left."""

    def step(p, x, cache):
        def mask(t, i):
            first = jnp.arange(S) >= S - i - t
            return first & (jnp.arange(S) <= S - t + jnp.arange(t)[:, None])

        return layer(p, x, cache, write=put, mask=mask)

    return step


def shift_left(buffer, new, index):
    return jnp.concatenate([buffer[:, new.shape[1] :], new], axis=1)


def roll(buffer, new, index):
    t = new.shape[1]
    return jnp.roll(buffer, -t, axis=1).at[:, -t:].set(new)


def select_one(buffer, new, index):
    here = (jnp.arange(S) == index)[:, None, None]
    return jnp.where(here, new, buffer)


def multiply_add(buffer, new, index):
    """One-hot rows `[T, S]`: what is written is cleared, then added."""
    hot = jax.nn.one_hot(index + jnp.arange(new.shape[1]), S)
    return buffer * (1 - hot.sum(0))[:, None, None] + jnp.einsum("ts,btkh->bskh", hot, new)


W = 7  # slots of the ring


def ring(p, x, cache):
    write = lambda buffer, new, i: lax.dynamic_update_slice_in_dim(buffer, new, i % W, 1)
    mask = lambda t, i: ((jnp.arange(W) <= i) | (i >= W))[None]
    return attention(p, x, cache, write=write, mask=mask)


PAGE = 4


def paged(p, x, cache):
    """Pages of a pool, found by a block table `[B, pages]`."""
    table, at = cache["table"], lambda i: i + jnp.arange(x.shape[1])
    write = lambda pool, new, i: pool.at[table[:, at(i) // PAGE], at(i) % PAGE].set(new)
    read = lambda pool: pool[table].reshape(B, S, K, H)
    gather = lambda q, k, v, mask: attend(q, read(k), read(v), mask)
    y, new = attention(p, x, {k: cache[k] for k in ("k", "v", "index")}, write, attend=gather)
    return y, {**new, "table": table}


def one_buffer(put, halves):
    """K and V in one array; `put` gives the new array, `halves` takes it apart."""

    def step(p, x, cache):
        (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
        buffer = put(cache["kv"], k, v, i)
        y = attend(q, *halves(buffer), causal(t, i))
        return project_out(p, y), {"kv": buffer, "index": i + t}

    return step


def put_stacked(buffer, k, v, i):
    return lax.dynamic_update_slice_in_dim(buffer, jnp.stack([k, v]), i, 2)


def put_twice(buffer, k, v, i):
    buffer = lax.dynamic_update_slice(buffer, k[None], (0, 0, i, 0, 0))
    return lax.dynamic_update_slice(buffer, v[None], (1, 0, i, 0, 0))


def put_joined(axis):
    return lambda buffer, k, v, i: dus()(buffer, jnp.concatenate([k, v], axis), i)


def kv_zeros(*shape):
    return {"kv": jnp.zeros(shape), "index": jnp.int32(0)}


nothing = {"k": jnp.zeros((B, 0, K, H)), "v": jnp.zeros((B, 0, K, H))}
form("concat", grows, nothing, plain=1, note="the cache grows")
grown = (jnp.zeros((B, K, 0, H)),) * 2
form("concat in the layout bksh", grows_bksh, grown, plain=1, note="the cache grows")
form("roll by concat", rolling(shift_left), plain=1)
form("roll by jnp.roll", rolling(roll), plain=1)
form("one-hot select", partial(attention, write=select_one), inputs=ONE_BY_ONE, plain=1)
form("one-hot multiply-add", partial(attention, write=multiply_add), plain=1)
slots = {n: jnp.zeros((B, W, K, H)) for n in "kv"} | {"index": jnp.int32(0)}
form("ring buffer", ring, slots, inputs=ONE_BY_ONE, note=f"wraps after {W} tokens")
pool = {n: jnp.zeros((B * S // PAGE, PAGE, K, H)) for n in "kv"} | {"index": jnp.int32(0)}
table = np.random.default_rng(3).permutation(B * S // PAGE).reshape(B, -1)
form("paged", paged, {**pool, "table": jnp.asarray(table, jnp.int32)}, plain=1)
first_axis = lambda buffer: (buffer[0], buffer[1])
last_axis = lambda buffer: (buffer[..., :H], buffer[..., H:])
head_axis = lambda buffer: jnp.split(buffer, 2, axis=2)
stacked = kv_zeros(2, B, S, K, H)
form("K and V stacked, one update", one_buffer(put_stacked, first_axis), stacked, plain=1)
form("K and V stacked, two updates", one_buffer(put_twice, first_axis), stacked, plain=1)
joined = kv_zeros(B, S, K, 2 * H)
form("K and V on the last axis", one_buffer(put_joined(-1), last_axis), joined, plain=1)
joined = kv_zeros(B, S, 2 * K, H)
form("K and V on the head axis", one_buffer(put_joined(2), head_axis), joined, plain=1)


def two_per_row(p, x, cache):
    """Heads and width in one axis, the batch in another place: [S, B, K*H]."""
    lay = lambda new: new.reshape(B, -1, K * H).swapaxes(0, 1)
    write = lambda buffer, new, i: lax.dynamic_update_slice_in_dim(buffer, lay(new), i, 0)
    read = lambda buffer: buffer.swapaxes(0, 1).reshape(B, S, K, H)
    split = lambda q, k, v, mask: attend(q, read(k), read(v), mask)
    return attention(p, x, cache, write, attend=split)


joined = {n: jnp.zeros((S, B, K * H)) for n in "kv"} | {"index": jnp.int32(0)}
form("heads split from sb(kh) at read", two_per_row, joined, plain=1)


# When the cache is written


def write_after(p, x, cache):
    """Attends over the old cache with the new tokens behind it, then writes."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    mask = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(S) < i, (t, S)), jnp.tri(t, dtype=bool)], axis=1
    )
    y = attend(q, *(jnp.concatenate([cache[n], new], 1) for n, new in zip("kv", (k, v))), mask)
    return tail(p, y, dus()(cache["k"], k, i), dus()(cache["v"], v, i), cache, t)


def old_and_self(p, x, cache):
    """Scores over the old cache and over the new tokens, joined in one softmax."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    scores, mix = grouped()
    old = jnp.where(jnp.arange(S) < i, scores(scaled(q), cache["k"]), NEG)
    new = jnp.where(jnp.tri(t, dtype=bool), scores(scaled(q), k), NEG)
    w = jax.nn.softmax(jnp.concatenate([old, new], -1))
    y = mix(w[..., :S], cache["v"]) + mix(w[..., S:], v)
    return tail(p, y, dus()(cache["k"], k, i), dus()(cache["v"], v, i), cache, t)


def merged_by_sums(p, x, cache):
    """Old and new attended apart, merged by their sums."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    scores, mix = flat(repeat)
    parts = []
    masks = jnp.broadcast_to(jnp.arange(S) < i, (t, S)), jnp.tri(t, dtype=bool)
    for keys, values, mask in ((cache["k"], cache["v"], masks[0]), (k, v, masks[1])):
        s = masked(scores(scaled(q), keys), mask)
        e = jnp.where(mask, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
        lse = jnp.log(e.sum(-1)) + s.max(-1)
        parts.append((mix(e, values), e.sum(-1).swapaxes(1, 2), lse.swapaxes(1, 2)))
    (y0, n0, lse0), (y1, n1, lse1) = parts
    share = jax.nn.sigmoid(lse0 - lse1)[..., None]
    y = share * y0 / jnp.maximum(n0, 1e-9)[..., None] + (1 - share) * y1 / n1[..., None]
    return tail(p, y, dus()(cache["k"], k, i), dus()(cache["v"], v, i), cache, t)


form("written after, concat at read", write_after, plain=1)
form("old cache and self in one softmax", old_and_self, plain=1)
form("old cache and self merged by sums", merged_by_sums, plain=1)
form("chunks only", attention, inputs=(3, 3, 3), plain=1)


# Several attentions, several caches


def shared_by_layers(p, x, cache):
    """The second layer reads the cache of the first."""
    p0, p1 = at_layer(p, 0), at_layer(p, 1)
    y, new = attention(p0, x, cache)
    x = x + y
    q = project(p1, x)[0]
    y = attend(q, new["k"], new["v"], causal(x.shape[1], cache["index"]))
    return x + project_out(p1, y), new


def two_queries(p, x, cache):
    """Two sets of queries over one cache, one subtracted from the other."""
    q, k, v, mask, t = updated(p, x, cache)
    r = (x @ p["r"]).reshape(q.shape)
    y = attend(q, k, v, mask) - 0.5 * attend(r, k, v, mask)
    return tail(p, y, k, v, cache, t)


def two_windows(p, x, cache):
    """scan over layers, each with a window of its own."""

    def body(x, sliced):
        p, size, k, v = sliced
        layer = with_mask(kv_forms.window(size))
        y, c = layer(p, x, {"k": k, "v": v, "index": cache["index"]})
        return x + y, (c["k"], c["v"])

    layers = (p, jnp.array([3, S]), cache["k"], cache["v"])
    x, (k, v) = lax.scan(body, x, layers)
    return x, {"k": k, "v": v, "index": cache["index"] + x.shape[1]}


def self_and_cross(p, x, cache):
    y, new = attention(p, x, cache["self"])
    q = project(p, x + y)[0]
    encoded = cache["cross"]
    z = attend(q, encoded["k"], encoded["v"], jnp.ones((x.shape[1], M), bool))
    return y + project_out(p, z), {"self": new, "cross": encoded}


M = 10  # encoded tokens
cross = {"k": randn(50, B, M, K, H), "v": randn(51, B, M, K, H)}
two = weights(layers=L)
form("two layers share one cache", shared_by_layers, params=two)
form("two query sets on one cache", two_queries, params=weights(r=(D, N * H)))
form("window of each layer in a scan", two_windows, empty(lead=(L,)), params=two)
both = {"self": empty(), "cross": cross}
form("cross-attention beside", self_and_cross, both, note="only `self` is to be rewritten")


R, P = 12, 4  # latent and rope widths
LATENT = {"q": (D, N * R), "qr": (D, N * P), "c": (D, R), "r": (D, P), "o": (N * R, D)}


def latent(p, x, cache, joined=False):
    """MLA with absorbed projections: c is K and V of all heads, r the keys with positions."""
    t, i = x.shape[1], cache["index"]
    q, qr = (x @ p["q"]).reshape(B, t, N, R), (x @ p["qr"]).reshape(B, t, N, P)
    at = i + jnp.arange(t)
    q, qr = q / math.sqrt(R + P), rope_narrow(qr, at) / math.sqrt(R + P)
    put = lambda buffer, new: lax.dynamic_update_slice(buffer, new, (0, i, 0))
    c = put(cache["c"], x @ p["c"])
    r = put(cache["r"], rope_narrow((x @ p["r"])[:, :, None], at)[:, :, 0])
    if joined:
        q, k = jnp.concatenate([q, qr], -1), jnp.concatenate([c, r], -1)
        scores = jnp.einsum("btnr,bsr->bnts", q, k)
    else:
        scores = jnp.einsum("btnr,bsr->bnts", q, c) + jnp.einsum("btnp,bsp->bnts", qr, r)
    y = jnp.einsum("bnts,bsr->btnr", softmax(scores, causal(t, i)), c)
    return y.reshape(B, t, N * R) @ p["o"], {"c": c, "r": r, "index": i + t}


def rope_narrow(x, at):
    """`rope` for a last axis of any even width."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, H - x.shape[-1])]
    return rope(jnp.pad(x, pad), at)[..., : x.shape[-1]] if x.shape[-1] < H else rope(x, at)


def latent_weights():
    shapes = enumerate(LATENT.items())
    return {n: randn(60 + i, *s) / np.float32(math.sqrt(s[0])) for i, (n, s) in shapes}


latents = {"c": jnp.zeros((B, S, R)), "r": jnp.zeros((B, S, P)), "index": jnp.int32(0)}
mla = {"cache": latents, "params": latent_weights()}
form("MLA, two dots", latent, **mla, note="c is K and V; a second dot adds to the scores")
form("MLA, one dot over c and r", partial(latent, joined=True), **mla)


# Flax


def linen_step(params, x, cache):
    y, new = linen.apply({"params": params, "cache": cache}, x, mutable="cache")
    return y, new["cache"]


def nnx_step(params, x, cache):
    cache = jax.tree.map(same, cache)  # a new one: the module updates it in place
    module = nnx.merge(graph, params, cache, rest)
    y = module(x)
    return y, nnx.state(module, nnx.Cache)


def nnx_parts():
    module = nnx.MultiHeadAttention(N, D, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((B, S, D))
    return nnx.split(module, nnx.Param, nnx.Cache, ...)


linen = nn.MultiHeadDotProductAttention(N, qkv_features=D, decode=True)
made = linen.init(jax.random.key(0), jnp.zeros((B, S, D)))
graph, nnx_params, nnx_cache, rest = nnx_parts()
form("Linen", linen_step, made["cache"], params=made["params"], inputs=ONE_BY_ONE)
form("NNX", nnx_step, nnx_cache, params=nnx_params, inputs=ONE_BY_ONE)


# Traps: leave alone


def no_cache(p, x, cache):
    """The tokens of a call attend to each other only."""
    q, k, v = project(p, x)
    t = x.shape[1]
    return project_out(p, attend(q, k, v, jnp.tri(t, dtype=bool))), {"index": cache["index"] + t}


def cross_only(p, x, cache):
    q = project(p, x)[0]
    y = attend(q, cache["k"], cache["v"], jnp.ones((x.shape[1], M), bool))
    return project_out(p, y), cache


def unread(p, x, cache):
    """The cache is kept up to date, and nothing reads it."""
    y, _ = no_cache(p, x, cache)
    return y, tail(p, y, *updated(p, x, cache)[1:3], cache, x.shape[1])[1]


def unreturned(p, x, cache):
    """What attention reads is written, then dropped: the next call starts from the old one."""
    y, new = attention(p, x, cache)
    return y, {**cache, "index": new["index"]}


def memory(p, x, cache):
    """Softmax attention over keys and values that are weights."""
    q = project(p, x)[0]
    y = attend(q, p["mk"], p["mv"], jnp.ones((x.shape[1], M), bool))
    return project_out(p, y), {"index": cache["index"] + x.shape[1]}


def pointer(p, x, cache):
    """A softmax over cached keys that no values follow: it is the output."""
    q, k, v, mask, t = updated(p, x, cache)
    w = softmax(grouped()[0](scaled(q), k), mask)
    return jnp.moveaxis(w, 3, 1), {"k": k, "v": v, "index": cache["index"] + t}


def linear_state(p, x, cache):
    """Linear attention: a state `[B, K, H, H]` with no axis of tokens."""
    q, k, v = project(p, x)
    q, k = jax.nn.softmax(q.reshape(B, -1, K, G, H)), jax.nn.softmax(k)

    def body(state, token):
        q, k, v = token
        state = state + jnp.einsum("bkh,bki->bkhi", k, v)
        return state, jnp.einsum("bkgh,bkhi->bkgi", q, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v))
    state, y = lax.scan(body, cache["state"], tokens)
    return project_out(p, jnp.moveaxis(y, 0, 1)), {"state": state}


def convolution(p, x, cache):
    """The last tokens, mixed by weights that a softmax makes of parameters."""
    past = jnp.concatenate([cache["past"], x], 1)
    taps = jax.nn.softmax(p["taps"], axis=0)
    y = sum(past[:, i + 1 : i + 1 + x.shape[1]] * taps[i] for i in range(M))
    return y, {"past": past[:, x.shape[1] :]}


def router(p, x, cache):
    """A softmax over experts, between two dots, beside a buffer of all tokens seen."""
    gates = jax.nn.softmax(x @ p["router"])
    y = jnp.einsum("bte,ed->btd", gates, p["experts"])
    seen = lax.dynamic_update_slice_in_dim(cache["seen"], x, cache["index"], 1)
    return (y, {"mean": seen.mean(1)}), {"seen": seen, "index": cache["index"] + x.shape[1]}


def fixed_values(p, x, cache):
    """Keys are cached, values are weights: there is no V to go with K."""
    (q, k, _), i, t = project(p, x), cache["index"], x.shape[1]
    k = dus()(cache["k"], k, i)
    return project_out(p, attend(q, k, p["mv"], causal(t, i))), {"k": k, "index": i + t}


index = {"index": jnp.int32(0)}
in_memory = {**weights(), "mk": randn(70, B, M, K, H), "mv": randn(71, B, M, K, H)}
trap("no cache", no_cache, index, note="only a counter is returned")
trap("cross-attention only", cross_only, cross, note="read, never updated")
trap("updated but read by nothing", unread)
trap("written, not returned", unreturned)
trap("keys and values are weights", memory, index, params=in_memory)
trap("softmax over cached keys is the output", pointer, note="no second dot")
trap("linear attention", linear_state, {"state": jnp.zeros((B, K, H, H))})
trap(
    "short convolution",
    convolution,
    {"past": jnp.zeros((B, M, D))},
    params={"taps": randn(72, M, D)},
)
experts = {"router": randn(73, D, 5) / 6, "experts": randn(74, 5, D)}
trap("router beside a buffer", router, {"seen": jnp.zeros((B, S, D)), **index}, params=experts)
fixed = {**weights(), "mv": randn(75, B, S, K, H)}
keys_only = {name: buffer for name, buffer in empty().items() if name != "v"}
trap("keys cached, values are weights", fixed_values, keys_only, params=fixed)
