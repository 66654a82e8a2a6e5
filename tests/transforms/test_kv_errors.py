"""Bad input to `compress_kv`: an error that names the argument and says what to do, or behaviour that is defined."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax import models
from stowax.pallas_kernels.codecs import per_channel, per_token
from stowax.transforms.kv import Merge, Method
from tests.transforms.kv_forms import FORMS

CONFIG = models.LlamaConfig(
    vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_dim=64
)
FUNCTIONS = models.functions(CONFIG)
PARAMS = models.init_params(CONFIG)
STEP = jax.jit(FUNCTIONS.step)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 40)), jnp.int32)


def shapes(length=48, functions=FUNCTIONS):
    return jax.eval_shape(lambda: functions.init_cache(2, length))


def applied(method, functions=FUNCTIONS):
    return sx.compress_kv(method)(functions.step, params=0, cache=2)


BAD = {
    "no recipe": (lambda: sx.compress_kv("kivi"), TypeError, "`rules` is str"),
    "a rule that is none": (lambda: sx.compress_kv({"k": 4}), TypeError, "rules\\['k'\\]"),
    "a broken pattern": (lambda: sx.compress_kv({"(": None}), ValueError, "regular expression"),
    "no cache argument": (
        lambda: sx.compress_kv(sx.recipes.int8())(FUNCTIONS.step), ValueError, "`cache` is not given"),
    "two in a chain": (
        lambda: sx.chain(*[sx.compress_kv(sx.recipes.int8())] * 2)(FUNCTIONS.step, cache=2),
        ValueError, "two `compress_kv`"),
    "unknown selector": (lambda: sx.recipes.select("snapkw", 8), ValueError, "snapkv"),
    "no budget": (lambda: sx.recipes.select("h2o", 0), ValueError, "`budget` is 0"),
    "a budget above all": (lambda: sx.recipes.select("h2o", 1.5), ValueError, "fraction"),
    "a budget below the window": (
        lambda: sx.recipes.select("snapkv", 20, window=32), ValueError, "give it at least 32"),
    "a fraction below the window": (
        lambda: applied(sx.recipes.select("snapkv", 0.25)).init_cache(shapes(), PARAMS, TOKENS),
        ValueError, "give it at least 32"),
    "a residual below the block": (
        lambda: Method("k", per_channel("int4", 32), residual=16), ValueError, "`residual` is 16"),
    "blocks and a selector": (
        lambda: sx.recipes.combine(sx.recipes.select("h2o", 64), sx.recipes.kivi(2)),
        ValueError, "per token"),
    "combined the wrong way": (
        lambda: sx.recipes.combine(sx.recipes.int8(), sx.recipes.int8()), ValueError, "select tokens"),
    "channels out of range": (lambda: sx.recipes.think(0.0), ValueError, "`channels` is 0.0"),
    "an unknown tier": (lambda: Method("m", tier="disk"), ValueError, "`tier` is 'disk'"),
    "an input and a codec for values": (
        lambda: Method("m", value=per_token("int8"), input=True), ValueError, "`input` stores one row"),
    "a merge and a selector": (
        lambda: Method("m", selector=sx.recipes.select("h2o", 8).selector, merge=Merge()),
        ValueError, "`merge` keeps a direction"),
    "a share above all": (lambda: sx.recipes.minicache(apart=2), ValueError, "`apart` is 2"),
    "an input of unknown width": (
        lambda: applied(sx.recipes.xquant()).init_cache(shapes()), ValueError, "only the program tells"),
    "a pattern without a cache": (
        lambda: applied({"nothing": sx.recipes.int8(), "": None}).init_cache(shapes(), PARAMS, TOKENS),
        ValueError, "takes no cache"),
    "the model's own cache": (
        lambda: applied(sx.recipes.int8())(PARAMS, TOKENS, FUNCTIONS.init_cache(2, 48)),
        ValueError, "init_cache"),
    "no attention": (
        lambda: sx.compress_kv(sx.recipes.int8())(lambda p, c: c + p, params=0, cache=1)(
            jnp.ones(()), jnp.ones((2, 3, 4))), ValueError, "no attention over a cache was found"),
    "nothing to initialize": (
        lambda: sx.quantize("int8")(FUNCTIONS.step).init_cache(shapes()), ValueError, "compress_kv"),
    "more tokens than the cache": (
        lambda: applied(sx.recipes.int8())(
            PARAMS, TOKENS, applied(sx.recipes.int8()).init_cache(shapes(32))),
        ValueError, "holds 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_cache_of_another_method():
    cache = applied(sx.recipes.int8()).init_cache(shapes(), PARAMS, TOKENS)
    with pytest.raises(ValueError, match="made for another program or method"):
        applied(sx.recipes.int4(16))(PARAMS, TOKENS, cache)


def test_a_cache_that_grows_has_no_budget():
    def step(params, x, cache):
        k, v = (jnp.concatenate([c, x], axis=1) for c in cache)
        return jax.nn.softmax(x @ k.swapaxes(1, 2) * params, -1) @ v, (k, v)

    x, cache = jnp.ones((1, 2, 4)), (jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 4)))
    fast = sx.compress_kv(sx.recipes.select("streaming", 4, sinks=1))(step, params=0, cache=2)
    with pytest.raises(ValueError, match="makes this cache longer"):
        fast.init_cache(cache, 1.0, x)


TWICE = ((0, 7), (7, 14), (5, 12), (12, 40))  # two shapes to compile


def written_twice(step, cache):
    """The logits of the last call."""
    for start, stop in TWICE:
        cache = {**cache, "index": jnp.int32(start)}
        logits, cache = step(PARAMS, TOKENS[:, start:stop], cache)
    return logits


@functools.cache
def written_twice_in_full():
    return written_twice(STEP, FUNCTIONS.init_cache(2, 48))


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (sx.recipes.full(), 2e-5),
        (sx.recipes.select("streaming", 44), 2e-5),
        (sx.recipes.int8(), 0.05),
        (sx.recipes.kivi(4, group=8, residual=8), 0.05),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_positions_out_of_order_and_written_twice(method, bound):
    """A row that is written again replaces the old one, wherever it is held."""
    cache = applied(method).init_cache(shapes(), PARAMS, TOKENS[:, :1])
    got, want = written_twice(jax.jit(applied(method)), cache), written_twice_in_full()
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < bound


def test_a_row_of_the_batch_that_is_empty():
    """A batch entry with no visible token gives what the model gives for it; the others are untouched."""

    def step(params, xs, cache):
        x, mask = xs
        at = cache["i"]
        k, v = (jax.lax.dynamic_update_slice(cache[n], x, (0, at, 0)) for n in "kv")
        scores = jnp.where(mask[:, None], jnp.einsum("btd,bsd->bts", x, k), -1e9)
        out = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, -1), v)
        return out * params, {"k": k, "v": v, "i": at + x.shape[1]}

    own = {"k": jnp.zeros((2, 16, 4)), "v": jnp.zeros((2, 16, 4)), "i": jnp.int32(0)}
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))
    mask = jnp.zeros((2, 16), bool).at[0, :6].set(True)
    fast = sx.compress_kv(sx.recipes.select("streaming", 12))(step, params=0, cache=2)
    out, _ = jax.jit(fast)(1.0, (x, mask), fast.init_cache(own, 1.0, (x, mask)))
    np.testing.assert_allclose(out[0], jax.jit(step)(1.0, (x, mask), own)[0][0], atol=1e-5)
    assert np.isfinite(out[1]).all()


def test_layers_of_different_budgets_in_a_carry_are_refused():
    def step(params, x, cache):
        def layer(carry, i):
            x, (ks, vs) = carry
            k, v = (
                jax.lax.dynamic_update_slice(
                    jax.lax.dynamic_index_in_dim(c, i, 0, False), x, (0, cache["i"], 0))
                for c in (ks, vs)
            )  # fmt: skip
            ks, vs = (
                jax.lax.dynamic_update_index_in_dim(c, y, i, 0) for c, y in ((ks, k), (vs, v))
            )
            out = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, k), -1)
            return (x + jnp.einsum("bts,bsd->btd", out, v) * params, (ks, vs)), None

        (x, (k, v)), _ = jax.lax.scan(layer, (x, (cache["k"], cache["v"])), jnp.arange(3))
        return x, {"k": k, "v": v, "i": cache["i"] + x.shape[1]}

    own = {"k": jnp.zeros((3, 1, 64, 4)), "v": jnp.zeros((3, 1, 64, 4)), "i": jnp.int32(0)}
    x = jnp.ones((1, 40, 4))
    fast = sx.compress_kv(sx.recipes.select("pyramidkv", 40))(step, params=0, cache=2)
    with pytest.raises(ValueError, match="equal budgets"):
        fast(1.0, x, fast.init_cache(own, 1.0, x))


def test_per_token_codecs_have_no_block():
    assert dataclasses.replace(Method("a", per_token("int8"))).block == 1


def test_a_used_cache_of_a_guessed_layout_is_not_thrown_away():
    fast = applied(sx.recipes.int8())
    _, used = jax.jit(fast)(PARAMS, TOKENS, fast.init_cache(shapes()))
    one = models.functions(dataclasses.replace(CONFIG, heads=2, kv_heads=1, head_dim=32))
    other = sx.compress_kv(sx.recipes.int8())(one.step, params=0, cache=2)
    params = models.init_params(dataclasses.replace(CONFIG, heads=2, kv_heads=1, head_dim=32))
    state = used["layers"]["k"]
    wrong = dataclasses.replace(state, group=dataclasses.replace(state.group, leaves=tuple(
        (n, (2, 2, 48, 1, 32), d) for n, _, d in state.group.leaves)))  # fmt: skip
    moved = dataclasses.replace(used["layers"]["v"], shape=(2, 2, 48, 1, 32))
    with pytest.raises(ValueError, match="another layout"):
        other(params, TOKENS, used | {"layers": {"k": wrong, "v": moved}})


def _attends(x, k, v, cache, at):
    ks, vs = (
        jax.lax.dynamic_update_slice(cache[n], y, (0, at, 0)) for n, y in (("k", k), ("v", v))
    )
    seen = jnp.arange(ks.shape[1]) <= at + jnp.arange(x.shape[1])[:, None]
    scores = jnp.where(seen, jnp.einsum("btd,bsd->bts", x, ks), -1e9)
    out = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, -1), vs)
    return out, {"k": ks, "v": vs, "i": at + x.shape[1]}


def _angles_given(params, x, angles, cache):
    return _attends(x, x @ params * jnp.cos(angles), x @ params.T, cache, cache["i"])


def _tokens_mixed(params, x, angles, cache):
    shifted = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    return _attends(x, (x + shifted) @ params, x @ params.T, cache, cache["i"])


def _two_inputs(params, x, angles, cache):
    return _attends(x, x @ params, angles[None] @ params, cache, cache["i"])


def _other_positions(params, x, angles, cache):
    at = (cache["n"] + jnp.arange(x.shape[1])).astype(jnp.float32)
    return _attends(x, x @ params * jnp.cos(at)[:, None], x @ params.T, cache, cache["i"])


NO_INPUT = {
    "angles are an argument": (_angles_given, "not known for tokens of other calls"),
    "a token's row is made of two tokens'": (_tokens_mixed, "mixes tokens"),
    "keys and values of different things": (_two_inputs, "not made of one value"),
    "positions of another index": (_other_positions, "come from another value"),
}


@pytest.mark.parametrize("name", NO_INPUT)
def test_keys_and_values_that_cannot_be_made_again(name):
    step, message = NO_INPUT[name]
    own = {"k": jnp.zeros((1, 16, 4)), "v": jnp.zeros((1, 16, 4)), "i": jnp.int32(0)}
    own |= {"n": jnp.int32(0)}
    fast = sx.compress_kv(sx.recipes.xquant())(step, params=0, cache=3)
    with pytest.raises(ValueError, match=message):
        fast.init_cache(own, jnp.eye(4), jnp.ones((1, 6, 4)), jnp.ones((6, 4)))


def test_a_paged_pool_needs_a_promise():
    """Pages that rows share would be lost without a word."""
    form = next(f for f in FORMS if f.name == "paged")
    fast = sx.compress_kv(sx.recipes.int8())(form.step, params=0, cache=2)
    with pytest.raises(ValueError, match=r"is a pool of pages.*private_pages=True"):
        fast.init_cache(form.cache, form.params, form.inputs[0])
