"""More ways to write a cache: one-hot sums, rolls, pages, writes after the attention; and what only looks like them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tests.transforms.kv_forms import (
    NEG,
    ONE_BY_ONE,
    B,
    G,
    H,
    K,
    L,
    N,
    S,
    at_layer,
    attend,
    attention,
    causal,
    dus,
    empty,
    grouped,
    project,
    scaled,
    weights,
)
from tests.transforms.kv_forms_adversarial import (
    PAGE,
    form,
    old_and_self,
    paged,
    pool,
    project_out,
    rolling,
    table,
    tail,
    trap,
    write_after,
)

per_row = empty() | {"index": jnp.zeros(B, jnp.int32)}
bksh = partial(attend, heads=grouped("bksh"))
two = weights(layers=L)


# One-hot sums


def row_sums(buffer, new, index):
    """A position for each row of the batch."""
    hot = jax.nn.one_hot(index, S)[:, :, None, None]
    return buffer * (1 - hot) + hot * new


def sums_bksh(buffer, new, index):
    hot = jax.nn.one_hot(index + jnp.arange(new.shape[1]), S, axis=0)
    kept = 1.0 - hot.sum(1)[:, None]
    return jnp.einsum("st,btkh->bksh", hot, new) + buffer * kept


def moved_to(buffer, new, index):
    hot = (jnp.arange(S) == index).astype(jnp.float32)[:, None, None]
    return buffer + hot * (new - buffer)


def chosen(buffer, new, index):
    hot = jnp.arange(S) == (index + jnp.arange(new.shape[1]))[:, None]
    placed = jnp.einsum("ts,btkh->bskh", hot.astype(new.dtype), new)
    return jnp.where(hot.any(0)[:, None, None], placed, buffer)


one_by_one = partial(form, inputs=ONE_BY_ONE, plain=1)
one_by_one("one-hot sum, a position for each row", partial(attention, write=row_sums), per_row)
step = partial(attention, write=sums_bksh, attend=bksh)
form("one-hot sum in the layout bksh", step, empty("bksh"), plain=1)
one_by_one("one-hot difference", partial(attention, write=moved_to))
form("one-hot select of several rows", partial(attention, write=chosen), plain=1)


def two_hots(buffer, new, index):
    """Cleared at one position, added at another."""
    hot, next_hot = jax.nn.one_hot(index, S), jax.nn.one_hot(index + 1, S)
    return buffer * (1 - hot)[:, None, None] + next_hot[:, None, None] * new


def all_but_one(buffer, new, index):
    """What was is kept at one position only."""
    hot = jax.nn.one_hot(index, S)[:, None, None]
    return buffer * hot + (1 - hot) * new


def twice_the_same(buffer, new, index):
    """All rows of the call at one position: they are summed."""
    hot = jax.nn.one_hot(index + new.shape[1] - 1 + 0 * jnp.arange(new.shape[1]), S)
    return buffer * (1 - hot.sum(0))[:, None, None] + jnp.einsum("ts,btkh->bskh", hot, new)


def where_allowed(buffer, new, index):
    """A one-hot select under a condition."""
    here = (jnp.arange(S) == index) & (index % 2 == 0)
    return jnp.where(here[:, None, None], new, buffer)


one_trap = partial(trap, inputs=ONE_BY_ONE)
one_trap("cleared at one position, added at another", partial(attention, write=two_hots))
one_trap("all but one position overwritten", partial(attention, write=all_but_one))
same_place = partial(attention, write=twice_the_same)
trap("one-hot rows at the same position", same_place, inputs=(3, 3, 3))
one_trap("one-hot select under a condition", partial(attention, write=where_allowed))


# Rolls


def roll_bksh(buffer, new, index):
    t = new.shape[1]
    rolled = jnp.roll(buffer, -t, axis=2)
    return lax.dynamic_update_slice_in_dim(rolled, new.swapaxes(1, 2), S - t, 2)


def roll_by(shift, start):
    def write(buffer, new, index):
        return jnp.roll(buffer, -shift, axis=1).at[:, start : start + new.shape[1]].set(new)

    return write


step = rolling(roll_bksh, partial(attention, attend=bksh))
form("roll in the layout bksh", step, empty("bksh"), plain=1)
one_trap("rolled by two rows, one written", rolling(roll_by(2, S - 1)))
one_trap("rolled by one row, written at the start", rolling(roll_by(1, 0)))
one_trap("rolled by none, written at the end", rolling(roll_by(0, S - 1)))


# Pages


def paged_rows(p, x, cache):
    """A position for each row of the batch, one token a call; pools `[P, K, PAGE, H]`."""
    (q, k, v), i, pages = project(p, x), cache["index"], cache["table"]
    page = pages[jnp.arange(B), i // PAGE]
    put = lambda pool, new: pool.at[page, :, i % PAGE].set(new[:, 0])
    read = lambda pool: jnp.take(pool, pages, axis=0).swapaxes(2, 3).reshape(B, S, K, H)
    ks, vs = put(cache["k"], k), put(cache["v"], v)
    y = attend(q, read(ks), read(vs), causal(1, i))
    return project_out(p, y), {"k": ks, "v": vs, "index": i + 1, "table": pages}


def paged_layers(p, x, cache):
    def body(x, sliced):
        p, k, v = sliced
        y, c = paged(p, x, {"k": k, "v": v, "index": cache["index"], "table": cache["table"]})
        return x + y, (c["k"], c["v"])

    x, (k, v) = lax.scan(body, x, (p, cache["k"], cache["v"]))
    return x, {**cache, "k": k, "v": v, "index": cache["index"] + x.shape[1]}


def paged_backwards(p, x, cache):
    """Written through the table, read through its columns in reverse."""
    y, new = paged(p, x, cache)
    read = lambda pool: pool[cache["table"][:, ::-1]].reshape(B, S, K, H)
    q = project(p, x)[0]
    y = y + 0 * project_out(p, attend(q, read(new["k"]), read(new["v"]), causal(x.shape[1], 0)))
    return y, new


def paged_elsewhere(p, x, cache):
    """Written through one table, read through another."""
    y, new = paged(p, x, cache)
    read = lambda pool: pool[cache["other"]].reshape(B, S, K, H)
    q = project(p, x)[0]
    y = attend(q, read(new["k"]), read(new["v"]), causal(x.shape[1], cache["index"]))
    return project_out(p, y), {**new, "other": cache["other"]}


tables = {"table": jnp.asarray(table, jnp.int32)}
turned = {n: x.swapaxes(1, 2) if x.ndim else jnp.zeros(B, jnp.int32) for n, x in pool.items()}
one_by_one("paged, a position for each row", paged_rows, turned | tables)
stacked = {n: jnp.stack([x] * L) if x.ndim else x for n, x in pool.items()}
form("paged, scan over layers", paged_layers, stacked | tables, params=two, plain=L)
other = {"other": jnp.asarray(table[::-1], jnp.int32)}
trap("paged, read backwards", paged_backwards, pool | tables)
trap("paged, read through another table", paged_elsewhere, pool | tables | other)


# Written after the attention


def after_bksh(p, x, cache):
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    old = jnp.broadcast_to(jnp.arange(S) < i, (t, S))
    mask = jnp.concatenate([old, jnp.tri(t, dtype=bool)], axis=1)
    y = bksh(q, *(jnp.concatenate([cache[n], x], 2) for n, x in (("k", k), ("v", v))), mask)
    put = partial(lax.dynamic_update_slice_in_dim, start_index=i, axis=2)
    return tail(p, y, put(cache["k"], k), put(cache["v"], v), cache, t)


def scanned(layer):
    def step(p, x, cache):
        def body(x, sliced):
            p, k, v = sliced
            y, c = layer(p, x, {"k": k, "v": v, "index": cache["index"]})
            return x + y, (c["k"], c["v"])

        x, (k, v) = lax.scan(body, x, (p, cache["k"], cache["v"]))
        return x, {"k": k, "v": v, "index": cache["index"] + x.shape[1]}

    return step


def unrolled(layer):
    """Layers of one stacked cache, each read before it is written."""

    def step(p, x, cache):
        stacks = {n: cache[n] for n in "kv"}
        for i in range(L):
            c = {n: stacks[n][i] for n in stacks} | {"index": cache["index"]}
            y, c = layer(at_layer(p, i), x, c)
            x, stacks = x + y, {n: stacks[n].at[i].set(c[n]) for n in stacks}
        return x, {**stacks, "index": cache["index"] + x.shape[1]}

    return step


def deferred(p, x, cache):
    """The denominator of the softmax comes after the second matmul."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    k, v = dus()(cache["k"], k, i), dus()(cache["v"], v, i)
    scores, mix = grouped()
    s = jnp.where(causal(t, i), scores(scaled(q), k), NEG)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    total = e.sum(-1).transpose(0, 3, 1, 2).reshape(B, t, N, 1)
    return tail(p, mix(e, v) / total, k, v, cache, t)


form("written after, in the layout bksh", after_bksh, empty("bksh"), plain=1)
lead = empty(lead=(L,))
form("written after, scan over layers", scanned(write_after), lead, params=two, plain=L)
form("old cache and self, scan over layers", scanned(old_and_self), lead, params=two, plain=L)
form("old cache and self, layers unrolled", unrolled(old_and_self), lead, params=two, plain=L)
form("written after, layers unrolled", unrolled(write_after), lead, params=two, plain=L)
form("deferred softmax, layers unrolled", unrolled(deferred), lead, params=two, plain=L)


def never_written(p, x, cache):
    """The old cache and the new tokens, and nothing is ever written."""
    return old_and_self(p, x, cache)[0], {**cache, "index": cache["index"] + 1}


def half_written(p, x, cache):
    """Keys are written before the attention, values after it."""
    (q, k, v), i, t = project(p, x), cache["index"], x.shape[1]
    ks = dus()(cache["k"], k, i)
    y = attend(q, ks, cache["v"], causal(t, i)) + v.repeat(G, 2)
    return tail(p, y, ks, dus()(cache["v"], v, i), cache, t)


trap("old cache and self, nothing written", never_written)
trap("keys written before, values after", half_written)
