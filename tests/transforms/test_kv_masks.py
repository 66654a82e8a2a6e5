"""The names that `explain()` gives to masks, over the ways in which models write them."""

import jax
import jax.numpy as jnp
import pytest

import stowax as sx

S, H = 32, 4
NEG = -1e9


def step_with(mask):
    """Attention of one head over a cache; `mask(scores, at, extra)` with `at` the positions of the new rows."""

    def step(params, xs, cache):
        x, extra = xs
        start = cache["index"]
        k, v = (jax.lax.dynamic_update_slice(cache[n], x, (0, start, 0)) for n in "kv")
        scores = jnp.einsum("btd,bsd->bts", x * params, k)
        scores = mask(scores, start + jnp.arange(x.shape[1]), extra)
        out = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, -1), v)
        return out, {"k": k, "v": v, "index": start + x.shape[1]}

    return step


def slots():
    return jnp.arange(S)


def hide(scores, seen):
    return jnp.where(seen, scores, NEG)


def sliced_table(scores, at, extra):
    """Rows of a lower triangle."""
    table = jnp.tril(jnp.ones((S, S), bool))
    return hide(scores, jax.lax.dynamic_slice_in_dim(table, at[0], at.shape[0]))


def added_window(scores, at, extra):
    far = at[:, None] - slots() >= 8
    future = slots() > at[:, None]
    return scores + jnp.where(far | future, jnp.finfo(scores.dtype).min, 0.0)


def pair_of_windows(scores, at, extra):
    return hide(scores, (slots() <= at[:, None]) & ~(slots() <= at[:, None] - 8))


def band(scores, at, extra):
    distance = at[:, None] - slots()
    return hide(scores, (distance >= 0) & (distance < 8))


def right_padded(scores, at, lengths):
    return hide(scores, slots() < lengths[:, None, None])


def left_padded(scores, at, pads):
    return hide(scores, (slots() <= at[:, None]) & (slots() >= pads[:, None, None]))


def alibi(scores, at, extra):
    return hide(scores - 0.1 * (at[:, None] - slots()), slots() <= at[:, None])


def own_block(scores, at, extra):
    return hide(scores, (slots() // 8 == at[:, None] // 8) & (slots() <= at[:, None]))


CASES = {
    "compared": ("causal", lambda s, at, e: hide(s, slots() <= at[:, None]), None),
    "the other way round": ("causal", lambda s, at, e: jnp.where(slots() > at[:, None], NEG, s), None),
    "a bias": ("causal", lambda s, at, e: s + NEG * (slots() > at[:, None]), None),
    "rows of a triangle": ("causal", sliced_table, None),
    "a window, added": ("causal + window 8", added_window, None),
    "a window of two": ("causal + window 8", pair_of_windows, None),
    "a band": ("causal + window 8", band, None),
    "what is written": ("length", lambda s, at, e: hide(s, slots() < at[-1] + 1), None),
    "right padding": ("length", right_padded, jnp.array([3, 5])),
    "left padding": ("causal + length", left_padded, jnp.array([3, 0])),
    "positions given": ("causal", lambda s, at, e: hide(s, slots() <= e[..., None]), jnp.zeros((2, 3), int)),
    "none": ("full", lambda s, at, e: s, None),
    "a scale": ("full", lambda s, at, e: s * 0.5, None),
    "ALiBi": ("structured", alibi, None),
    "blocks": ("structured", own_block, None),
    "an array": ("array", lambda s, at, e: hide(s, e[:, None]), jnp.ones((2, S), bool)),
    "an array and causal": (
        "array", lambda s, at, e: hide(s, e[:, None] & (slots() <= at[:, None])), jnp.ones((2, S), bool)),
    "a bias of numbers": ("array", lambda s, at, e: s + e, jnp.ones((2, 1, S))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mask_has_a_name(name):
    want, mask, extra = CASES[name]
    step = step_with(mask)
    cache = {"k": jnp.zeros((2, S, H)), "v": jnp.zeros((2, S, H)), "index": jnp.int32(0)}
    fast = sx.compress_kv(sx.recipes.full())(step, params=0, cache=2)
    xs = (jnp.ones((2, 3, H)), extra)
    table = fast.explain(1.0, xs, fast.init_cache(cache, 1.0, xs)).caches
    assert [site.mask for site in table.rows[0].sites] == [want]
    assert f"({want} mask)" in str(table)
