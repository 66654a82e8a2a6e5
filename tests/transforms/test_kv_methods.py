"""What every KV method must satisfy, in one table: a new recipe or selector joins by one line."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax import memory_planner, models
from stowax.pallas_kernels.codecs import per_channel, per_token
from stowax.transforms.core import compat
from stowax.transforms.kv import KVState, Method, depth, selectors

CONFIG = models.LlamaConfig(
    vocab_size=50, dim=32, layers=1, heads=4, kv_heads=2, head_dim=16, ffn_dim=64
)
LENGTH = 96
CODECS = {
    "full": sx.recipes.full(),
    "int8": sx.recipes.int8(),
    "int4": sx.recipes.int4(16),
    "hadamard-int4": sx.recipes.int4(16, rotate=True, residual=8, sinks=2),
    "kivi": Method("kivi", per_channel("int2-asym", 8), per_token("int2-g16"), 16, 4),
    "kv4": sx.recipes.kv4(residual=32),
    "kv2": sx.recipes.kv2(residual=32),
    "gear": sx.recipes.gear(4),
    "think": sx.recipes.think(0.5, residual=16),
    "xquant": sx.recipes.xquant(4, group=16),
    "xquant8": sx.recipes.xquant(8, residual=8, sinks=2),
}
SELECTORS = {name: sx.recipes.select(name, 48) for name in selectors.SELECTORS}
BOTH = {"h2o-int8": sx.recipes.combine(sx.recipes.select("h2o", 48), sx.recipes.int8())}
MERGED = {
    "minicache": sx.recipes.minicache(8, group=16, start=0, residual=8),
    "minicache-plain": sx.recipes.minicache(None, start=0, residual=0, sinks=0),
}
HOST = {
    f"{name}-host": sx.recipes.offload(m)
    for name, m in (
        ("full", sx.recipes.full()),
        ("kivi", CODECS["kivi"]),
        ("h2o", SELECTORS["h2o"]),
        ("minicache", MERGED["minicache"]),
    )
}
METHODS = CODECS | SELECTORS | BOTH | MERGED | HOST
# Selectors whose scores are of a row alone: how a text is cut into calls changes nothing.

every_method = pytest.mark.parametrize("name", METHODS)


def by_hand(name):
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.by_hand])


def model(layers=1, **changes):
    config = dataclasses.replace(CONFIG, layers=layers, **changes)
    return models.functions(config), models.init_params(config)


FUNCTIONS, PARAMS = model()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, LENGTH)), jnp.int32)


def shapes(functions, batch=2, dtype=jnp.float32):
    return jax.eval_shape(lambda: functions.init_cache(batch, LENGTH, dtype))


def made(name, functions=FUNCTIONS, params=PARAMS, batch=2):
    fast = sx.compress_kv(METHODS[name])(functions.step, params=0, cache=2)
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return fast, fast.init_cache(shapes(functions, batch), params, token)


def read(fast, params, tokens, cache, cuts):
    """All logits, and the cache, of a text that is read in calls."""
    step, out = jax.jit(fast), []
    for start, stop in zip((0, *cuts), (*cuts, tokens.shape[1])):
        logits, cache = step(params, tokens[:, start:stop], cache)
        out.append(logits)
    return jnp.concatenate(out, axis=1), cache


def state(cache):
    return cache["layers"]["k"]


@functools.cache
def two_calls(name, batch=2):
    """Logits of a prompt of 60 tokens and of two decode steps, with a compressed cache."""
    fast, cache = made(name, batch=batch)
    return np.asarray(read(fast, PARAMS, TOKENS[-batch:, :62], cache, (60, 61))[0])


@functools.cache
def full_attention():
    return np.asarray(jax.jit(FUNCTIONS.forward)(PARAMS, TOKENS[:, :62]))


# On the host is what is done on the device: below.
@pytest.mark.parametrize("name", CODECS | SELECTORS | BOTH | MERGED)
def test_a_prompt_is_exact_and_decoding_close(name):
    """A prompt is attended to as it is; what is read later is what the method kept."""
    got, want = two_calls(name), full_attention()
    np.testing.assert_allclose(got[:, :60], want[:, :60], atol=2e-5)
    error = np.linalg.norm(got[:, 60:] - want[:, 60:]) / np.linalg.norm(want[:, 60:])
    lossless = name in ("full", "full-host", "minicache-plain") or METHODS[name].residual >= 60
    assert error < 1e-6 if lossless else 1e-6 < error < 0.7


@pytest.mark.parametrize("name", ["kivi", by_hand("think"), "adakv", by_hand("h2o-int8")])
def test_batched_equals_single(name):
    np.testing.assert_allclose(two_calls(name)[1:], two_calls(name, 1), atol=2e-5)


def padded_step(params, xs, cache):
    """Two KV heads for four of queries; rows of the batch have texts of their own lengths at positions of their own."""
    x, at, lengths = (
        xs  # at: int32[B, T], S for a token of the padding; lengths: int32[B], this call's counted
    )
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[n]) for n in "qkv")
    rows = jnp.arange(x.shape[0])[:, None]
    k, v = (cache[n].at[rows, at].set(y, mode="drop") for n, y in (("k", k), ("v", v)))
    q = q.reshape(*q.shape[:2], 2, 2, -1)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / 4
    slots = jnp.arange(k.shape[1])
    seen = (slots <= at[..., None]) & (slots < lengths[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9), -1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v), {"k": k, "v": v}


def padded_cache(batch):
    return {n: jax.ShapeDtypeStruct((batch, LENGTH, 2, 16), jnp.float32) for n in "kv"}


PADDED = [64, 48, 0]  # tokens of each text; the last row of the batch is empty


@functools.cache
def padded_program(name, batch):
    """A prompt of 64 tokens and a decode step, jitted; and an empty cache."""
    rand = np.random.default_rng(3).standard_normal
    shapes = {"q": (32, 4, 16), "k": (32, 2, 16), "v": (32, 2, 16)}
    params = {n: jnp.asarray(rand(s, np.float32)) / 4 for n, s in shapes.items()}
    fast = sx.compress_kv(METHODS[name])(padded_step, params=0, cache=2)

    @jax.jit
    def run(prompt, token, cache):
        first, cache = fast(params, prompt, cache)
        return first, fast(params, token, cache)[0]

    x, at, n = (
        jnp.zeros(s, t) for s, t in (((batch, 64, 32), float), ((batch, 64), int), (batch, int))
    )
    return run, fast.init_cache(padded_cache(batch), params, (x, at, n))


def padded_calls(name, lengths):
    """Outputs of a prompt of texts of `lengths` tokens, padded on the right to 64, and of one decode step."""
    texts = np.random.default_rng(4).standard_normal((len(PADDED), 65, 32), np.float32)
    x = jnp.asarray(texts[[PADDED.index(n) for n in lengths]])
    n = jnp.asarray(lengths, jnp.int32)
    at = jnp.where(jnp.arange(64) < n[:, None], jnp.arange(64), LENGTH)
    run, cache = padded_program(name, len(lengths))
    return run((x[:, :64], at, n), (x[:, 64:], n[:, None], n + 1), cache)


@pytest.mark.parametrize("name", ["kivi", "adakv", "h2o-int8"])
def test_padded_in_a_batch_equals_single(name):
    """Padding is dropped from the cache, and takes no room in it; a row without any token gives finite numbers."""
    prompt, token = padded_calls(name, PADDED)
    for row, length in enumerate(PADDED):
        one, one_token = padded_calls(name, [length])
        np.testing.assert_allclose(prompt[row, :length], one[0, :length], atol=2e-5)
        np.testing.assert_allclose(token[row], one_token[0], atol=2e-5)
    assert np.isfinite(prompt).all()
    assert np.isfinite(token).all()


def _first(name, batch):
    return made(name, batch=batch)[0], PARAMS


def _cache(name, batch):
    return made(name, batch=batch)[1]


# Chunks of a prompt give the cache of the whole: codecs, and selectors that score row by row. Not `think`, whose first
# call chooses channels, and not selectors that look at what a call's queries or neighbours were.
@pytest.mark.parametrize("name", ["kivi", by_hand("kv2"), "xquant", by_hand("streaming"), "knorm"])
def test_how_a_text_is_cut_into_calls_changes_nothing(name):
    """With one layer keys and values do not depend on what was attended to: the caches must be equal."""
    whole = read(*_first(name, 2), TOKENS[:, :80], _cache(name, 2), ())[1]
    cut = read(*_first(name, 2), TOKENS[:, :80], _cache(name, 2), (40,))[1]
    for a, b in zip(jax.tree.leaves(_rows(whole)), jax.tree.leaves(_rows(cut)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2)


def _rows(cache):
    """Buffers whose order does not depend on the calls."""
    arrays = state(cache).arrays
    if "main_at" in arrays:
        return jnp.sort(arrays["main_at"]), arrays["recent_at"]
    order = jnp.argsort(arrays["recent_at"], axis=-1)
    return arrays["sinks"], jnp.take_along_axis(arrays["recent_at"], order, axis=-1)


@pytest.mark.parametrize("name", sorted(selectors.SELECTORS))
@pytest.mark.parametrize("budget", [1.0, LENGTH])
def test_a_full_budget_is_no_compression(name, budget):
    """The selector is left out: the same buffers as a full cache's, and the same numbers."""
    method = sx.recipes.select(name, budget)
    fast = sx.compress_kv(method)(FUNCTIONS.step, params=0, cache=2)
    cache = fast.init_cache(shapes(FUNCTIONS), PARAMS, TOKENS[:, :1])
    full = sx.compress_kv(sx.recipes.full())(FUNCTIONS.step, params=0, cache=2)
    want = full.init_cache(shapes(FUNCTIONS), PARAMS, TOKENS[:, :1])
    assert state(cache).method.selector is None
    assert _layout(state(cache).arrays) == _layout(state(want).arrays)
    if name == "h2o":
        got, _ = read(fast, PARAMS, TOKENS[:, :62], cache, (60, 61))
        np.testing.assert_array_equal(got, two_calls("full"))


def _layout(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@every_method
def test_bytes_reported_are_those_of_the_buffers(name):
    functions, params = model(layers=3)
    fast, cache = made(name, functions, params)
    token = jnp.zeros((2, 1), jnp.int32)
    _, after = jax.eval_shape(fast, params, token, cache)
    buffers = memory_planner.tree_nbytes(state(after).arrays)
    row = fast.explain(params, token, cache).caches.rows[0]
    assert state(cache).nbytes == buffers == row.nbytes
    own = memory_planner.tree_nbytes(shapes(functions)["layers"])
    assert row.nbytes_before == own
    assert [layer.total for layer in row.layers] == layer_buffers(state(after).arrays, 3)
    for layer in row.layers:
        assert (layer.head > 0) != METHODS[name].input  # its rows are of all heads
        assert 2 * layer.head + layer.shared == layer.total
    if METHODS[name].selector is not None:
        assert buffers < 0.62 * own


def layer_buffers(arrays, layers):
    """Bytes of each layer's buffers."""
    parts = arrays.get("layers", [])
    whole = memory_planner.tree_nbytes(arrays)
    return [memory_planner.tree_nbytes(part) for part in parts] or [whole // layers] * layers


def test_explain_tells_layers_and_heads_apart():
    functions, params = model(layers=3)
    token = jnp.zeros((2, 1), jnp.int32)
    rows = {}
    for name in ("full", "snapkv", "adakv", "pyramidkv"):
        fast, cache = made(name, functions, params)
        rows[name] = fast.explain(params, token, cache).caches.rows[0]
    assert len({layer.total for layer in rows["pyramidkv"].layers}) == 3
    assert " to " in rows["pyramidkv"].each
    assert len({layer.total for layer in rows["snapkv"].layers}) == 1
    pooled, own = rows["adakv"].layers[0], rows["snapkv"].layers[0]
    assert pooled.shared > 20 * own.shared  # one selection for all heads
    full = rows["full"].layers[0]
    assert full.head == 2 * 2 * LENGTH * 16 * 4  # batch, keys and values, tokens, elements, bytes
    assert "a head" in rows["full"].each


@pytest.mark.parametrize("name", ["kivi", "kivi-host", "adakv", "pyramidkv", "minicache-host"])
def test_scanned_equals_unrolled(name):
    functions, params = model(layers=2)
    unrolled = models.functions(dataclasses.replace(CONFIG, layers=2), scan=False)
    split = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)}
    fast, cache = made(name, functions, params)
    got, _ = read(fast, params, TOKENS[:, :62], cache, (60, 61))
    fast, cache = made(name, unrolled, params | {"layers": split})
    want, _ = read(fast, params | {"layers": split}, TOKENS[:, :62], cache, (60, 61))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_scan_writes_into_the_stack_of_caches():
    """It carries the buffers, of which an entry is updated; none is stacked anew."""
    functions, params = model(layers=2)
    fast, cache = made("kivi", functions, params)
    jaxpr = jax.make_jaxpr(fast)(params, TOKENS[:, :1], cache)
    (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scan.outvars) == compat.scan_split(scan)[1]
    buffers = {x.shape for x in jax.tree.leaves(state(cache).arrays)}
    assert buffers <= {v.aval.shape for v in scan.outvars}
    (write,) = [e for e in _equations(scan.params["jaxpr"]) if e.primitive.name == "append"]
    assert state(cache).arrays["main"][0]["codes"].shape in [v.aval.shape for v in write.invars]


def _equations(jaxpr):
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in compat.inner_jaxprs(eqn):
            yield from _equations(inner)


def test_layers_with_budgets_of_their_own_really_are_smaller():
    functions, params = model(layers=3)
    _fast, cache = made("pyramidkv", functions, params)
    sizes = [memory_planner.tree_nbytes(layer) for layer in state(cache).arrays["layers"]]
    assert sizes[0] > sizes[1] > sizes[2]
    _, cache = made("snapkv", functions, params)
    assert abs(sum(sizes) / memory_planner.tree_nbytes(state(cache).arrays) - 1) < 0.03


def test_pooled_heads_hold_different_numbers_in_the_same_bytes():
    fast, cache = made("adakv")
    _, cache = read(fast, PARAMS, TOKENS[:, :80], cache, ())
    heads = np.asarray(state(cache).arrays["head"])[0]
    counts = [(row == 0).sum() for row in heads]
    assert heads.shape[1] == 2 * (48 - 32)
    assert any(c != heads.shape[1] // 2 for c in counts)
    plain = made("snapkv")[1]
    assert state(cache).nbytes < 1.05 * state(plain).nbytes


@pytest.mark.parametrize("name", ["kivi", "kivi-host"])
def test_in_a_loop_under_jit_with_donation(name):
    fast, cache = made(name)
    step = jax.jit(fast, donate_argnums=2)
    logits, cache = step(PARAMS, TOKENS[:, :40], cache)

    def body(carry, _):
        token, cache = carry
        logits, cache = fast(PARAMS, token, cache)
        return (logits[:, -1:].argmax(-1).astype(jnp.int32), cache), logits

    (_, cache), logits = jax.lax.scan(body, (TOKENS[:, 40:41], cache), None, length=5)
    assert np.isfinite(logits).all()
    assert int(cache["index"]) == 45


def test_vmap_over_sequences():
    fast, cache = made("kivi", batch=1)
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    call = jax.jit(jax.vmap(fast, in_axes=(None, 0, 0)))
    logits, _ = call(PARAMS, TOKENS[:, None, :40], caches)
    want = jax.jit(FUNCTIONS.forward)(PARAMS, TOKENS[:, :40])
    np.testing.assert_allclose(logits[:, 0], want, atol=2e-5)


def test_new_rows_carry_gradients_and_kept_ones_do_not():
    """Attention to the tokens of a call is differentiable; what was kept is a constant, by declaration."""
    fast, cache = made("int8")
    loss = lambda p, f, c: f(p, TOKENS[:, :20], c)[0].sum()
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    got = grad(PARAMS, fast, cache)
    want = grad(PARAMS, FUNCTIONS.step, FUNCTIONS.init_cache(2, LENGTH))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    through = lambda p: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(
        fast(p, TOKENS[:, :20], cache)[1]) if jnp.issubdtype(x.dtype, jnp.floating))  # fmt: skip
    assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(through))(PARAMS)))


def test_chain_with_quantize():
    both = sx.chain(sx.quantize("int8"), sx.compress_kv(sx.recipes.int8()))
    fast = both(FUNCTIONS.step, params=0, cache=2)
    packed = fast.encode(PARAMS, TOKENS[:, :4], shapes(FUNCTIONS))
    cache = fast.init_cache(shapes(FUNCTIONS), packed, TOKENS[:, :4])
    logits, cache = jax.jit(fast)(packed, TOKENS[:, :30], cache)
    quantized = sx.quantize("int8")(FUNCTIONS.forward)
    want = jax.jit(quantized)(packed, TOKENS[:, :30])
    np.testing.assert_allclose(logits, want, atol=2e-4)
    table = fast.explain(packed, TOKENS[:, :1], cache)
    assert "int8" in str(table.caches)
    assert table.caches.nbytes == state(cache).nbytes


@pytest.mark.parametrize("name", ["pyramidkv"])
def test_scanned_weights_stay_packed_beside_caches(name):
    """No layer's weight is decoded outside of the loop, and none stacked."""
    functions, params = model(layers=3)
    both = sx.chain(sx.quantize({"embed": None, "": "int4-g16"}), sx.compress_kv(METHODS[name]))
    fast = both(functions.step, params=0, cache=2)
    packed = fast.encode(params, TOKENS[:, :4], shapes(functions))
    cache = fast.init_cache(shapes(functions), packed, TOKENS[:, :4])
    text = str(jax.make_jaxpr(fast)(packed, TOKENS[:, :4], cache))
    up = jax.tree.leaves(params["layers"]["mlp"])[0].shape
    assert f"u8[{up[0]}," in text
    assert f"f32[{','.join(map(str, up))}]" not in text
    logits, _ = jax.jit(fast)(packed, TOKENS[:, :30], cache)
    alone = sx.quantize({"embed": None, "": "int4-g16"})(functions.forward, params=0)
    np.testing.assert_allclose(logits, jax.jit(alone)(packed, TOKENS[:, :30]), atol=2e-4)


def test_a_guessed_layout_is_corrected_by_the_first_call():
    """Keys in another layout than names and shapes suggest: still right, and from then on laid out right."""

    def step(params, x, cache):
        k = jax.lax.dynamic_update_slice(cache["k"], x.swapaxes(1, 2), (0, 0, cache["i"], 0))
        v = jax.lax.dynamic_update_slice(cache["v"], x.swapaxes(1, 2), (0, 0, cache["i"], 0))
        scores = jnp.einsum("bthd,bhsd->bhts", x * params, k)
        at = cache["i"] + jnp.arange(x.shape[1])
        scores = jnp.where(jnp.arange(k.shape[2]) <= at[:, None], scores, -1e30)
        out = jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(scores, -1), v)
        return out, {"k": k, "v": v, "i": cache["i"] + x.shape[1]}

    own = {"k": jnp.zeros((1, 12, 8, 4)), "v": jnp.zeros((1, 12, 8, 4)), "i": jnp.int32(0)}
    fast = sx.compress_kv(sx.recipes.int8())(step, params=0, cache=2)
    cache = fast.init_cache(own)
    assert cache["k"].guessed
    x = jax.random.normal(jax.random.key(0), (1, 5, 12, 4))
    out, after = jax.jit(fast)(1.0, x, cache)
    np.testing.assert_allclose(out, step(1.0, x, own)[0], atol=1e-5)
    assert (after["k"].group.heads, after["k"].group.length) == (12, 8)


def test_a_rule_for_each_cache():
    functions = models.functions(dataclasses.replace(CONFIG, layers=2), scan=False)
    params = models.init_params(dataclasses.replace(CONFIG, layers=2), scan=False)
    fast = sx.compress_kv({"layers/0/": None, "": sx.recipes.int8()})(
        functions.step, params=0, cache=2
    )
    cache = fast.init_cache(shapes(functions), params, TOKENS[:, :1])
    assert isinstance(cache["layers"]["1"]["k"], KVState)
    assert cache["layers"]["0"]["k"].shape == (2, LENGTH, 2, 16)
    logits, _ = jax.jit(fast)(params, TOKENS[:, :20], cache)
    want = jax.jit(functions.forward)(params, TOKENS[:, :20])
    np.testing.assert_allclose(logits, want, atol=2e-5)


def test_new_selector_is_a_function_and_a_few_numbers():
    chosen = selectors.Selector("last word", 24, lambda seen: seen.values.sum(-1), recent=8)
    fast = sx.compress_kv(Method("mine", selector=chosen))(FUNCTIONS.step, params=0, cache=2)
    _, cache = read(fast, PARAMS, TOKENS[:, :80], fast.init_cache(shapes(FUNCTIONS)), ())
    assert state(cache).arrays["main_at"].shape == (1, 2, 2, 16)


def test_a_long_prompt_in_chunks_never_holds_the_whole_cache():
    """By XLA's count: a chunk's step needs the kept cache, the chunk's scores, and not the program's own cache."""
    functions, params = model(layers=2)
    length, chunk = 16_384, 64
    own = jax.eval_shape(lambda: functions.init_cache(1, length))
    fast = sx.compress_kv(sx.recipes.select("snapkv", 256))(functions.step, params=0, cache=2)
    tokens = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    cache = jax.eval_shape(lambda: fast.init_cache(own, params, tokens))
    step = jax.jit(fast, donate_argnums=2).lower(params, tokens, cache).compile()
    report = memory_planner.memory_report(step)
    full = memory_planner.tree_nbytes(own)
    kept = memory_planner.tree_nbytes(cache)
    scores = 4 * 4 * chunk * (256 + chunk)  # one layer's, f32, all heads
    assert kept < full / 50
    assert report.temporaries < 4 * kept + 6 * scores
    assert report.peak < full / 5


def test_merged_layers_hold_one_direction_and_their_own_magnitudes():
    """Rows of a pair that point the same way come back as they were; those that differ most are kept apart."""
    method = sx.recipes.minicache(None, start=0, residual=0, sinks=0, apart=0.05)
    functions, params = model(layers=2)
    fast = sx.compress_kv(method)(functions.step, params=0, cache=2)
    cache = fast.init_cache(shapes(functions), params, TOKENS[:, :1])
    first, second = state(cache).arrays["layers"]
    sizes = [memory_planner.tree_nbytes(layer) for layer in (first, second)]
    rows = memory_planner.tree_nbytes(shapes(functions)["layers"]) // 2
    apart = sum(memory_planner.tree_nbytes(x["apart"]) for x in (first, second))
    magnitudes = sum(memory_planner.tree_nbytes(x["magnitude"]) for x in (first, second))
    assert "main" not in second
    assert sum(sizes) < rows + apart + magnitudes + 200
    _, cache = read(fast, params, TOKENS[:, :60], cache, ())
    own = jax.jit(functions.step)(params, TOKENS[:, :60], functions.init_cache(2, LENGTH))[1]
    own = own["layers"]
    group = state(cache).group
    layers = jax.jit(lambda x: depth.spread(method, group, x))(state(cache).arrays["layers"])
    for i, layer in enumerate(layers):
        one = jax.tree.map(lambda x: x[0], layer)
        got = jax.jit(lambda x: depth.rows(method, group, x)[0])(one)[:, :60]
        want = own["k"][i, 0].swapaxes(0, 1)[:, :60]
        norm = lambda x: jnp.linalg.norm(x, axis=-1)
        np.testing.assert_allclose(norm(got), norm(want), rtol=2e-3)
        exact = np.abs(got - want).max((0, 2)) < 1e-5
        assert exact.sum() == len(one["apart_at"][0]) if "apart_at" in one else True


def test_a_row_between_two_directions():
    x, y = jnp.eye(3)[0] * 2, jnp.eye(3)[1] * 5
    np.testing.assert_allclose(depth.between(x, y, 0.0)[0], x / 2, atol=1e-6)
    middle, angle = depth.between(x, y, 0.5)
    np.testing.assert_allclose(middle, [0.5**0.5, 0.5**0.5, 0], atol=1e-6)
    np.testing.assert_allclose(angle, np.pi / 2, atol=1e-6)
    np.testing.assert_allclose(depth.between(x, x, 0.6)[0], x / 2, atol=1e-6)
    assert np.isfinite(depth.between(0 * x, y, 0.6)[0]).all()


def test_codes_on_the_host_and_the_rest_on_the_device():
    fast, cache = made("kivi-host")
    _, cache = read(fast, PARAMS, TOKENS[:, :41], cache, (40,))
    kind = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    arrays = state(cache).arrays
    assert kind(arrays.pop("main")) == {"pinned_host"}
    assert kind(arrays) == {"device"}
    table = fast.explain(PARAMS, TOKENS[:, :1], cache).caches
    row = table.rows[0]
    assert row.nbytes_host == row.nbytes - memory_planner.tree_nbytes(arrays)
    assert "on host" in row.after
    assert "on host" in str(table)


@pytest.mark.slow
def test_the_tpu_compiler_puts_the_codes_in_host_memory():
    """Ahead of time for a v5e: device memory falls by what the caches take, which host memory takes over."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install libtpu)")
    plain, host = (compiled_for_tpu(m) for m in (sx.recipes.full(), HOST["full-host"]))
    cache = memory_planner.tree_nbytes(
        jax.eval_shape(lambda: TPU.init_cache(1, 4096, jnp.bfloat16))
    )
    assert plain.host == 0
    assert host.host > 0.9 * cache
    assert host.peak < plain.peak - 0.8 * cache


TPU = models.functions(dataclasses.replace(CONFIG, dim=256, layers=6, head_dim=128))


def compiled_for_tpu(method):
    """The memory report of a decode step for a TPU v5e."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]

    def placed(x):
        kind = "pinned_host" if "<host>" in str(jax.typeof(x)) else "device"
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    config = dataclasses.replace(CONFIG, dim=256, layers=6, head_dim=128)
    params = jax.eval_shape(lambda: models.init_params(config))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    fast = sx.compress_kv(method)(TPU.step, params=0, cache=2)
    own = jax.eval_shape(lambda: TPU.init_cache(1, 4096, jnp.bfloat16))
    cache = jax.eval_shape(lambda: fast.init_cache(own, params, token))
    args = jax.tree.map(placed, (params, token, cache))
    return memory_planner.memory_report(jax.jit(fast, donate_argnums=2).lower(*args).compile())
