import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stowax.models import llama

BASE = llama.LlamaConfig(
    vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48
)
CONFIGS = {
    "gqa": BASE,
    "mqa, untied, bias": dataclasses.replace(BASE, kv_heads=1, tied=False, attention_bias=True),
    "mha, wide heads, scaled rope": dataclasses.replace(
        BASE, kv_heads=4, head_dim=12, rope_factors=(1.0, 1.0, 2.0, 4.0, 8.0, 8.0)
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 11)), jnp.int32)


def random_params(config, scan=True):
    """Random everywhere, norms and biases too, so that nothing is hidden by a 0 or a 1."""
    rng = np.random.default_rng(1)
    shapes = llama.param_shapes(config)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    return jax.tree.map(jnp.asarray, params if scan else unstack(params, config.layers))


def unstack(params, n_layers):
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(n_layers)}
    return params | {"layers": layers}


@functools.cache
def compiled(config, scan=True):
    """The model's functions, compiled."""
    f = llama.functions(config, scan=scan)
    jitted = {"forward": jax.jit(f.forward), "step": jax.jit(f.step)}
    return f._replace(**jitted, nll=jax.jit(f.nll, static_argnums=2))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestConfigs:
    def test_unrolled_equals_scanned(self, config):
        scanned = compiled(config).forward(random_params(config), TOKENS)
        unrolled = compiled(config, False).forward(random_params(config, False), TOKENS)
        np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("scan", [True, False])
    def test_steps_equal_one_shot(self, config, scan):
        params, f = random_params(config, scan), compiled(config, scan)
        cache, logits = f.init_cache(2, 16), []
        for part in (TOKENS[:, :5], *jnp.split(TOKENS[:, 5:], 6, axis=1)):
            out, cache = f.step(params, part, cache)
            logits.append(out)
        expected = f.forward(params, TOKENS)
        np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, rtol=0, atol=1e-4)
        assert cache["index"] == TOKENS.shape[1]

    def test_batch_equals_single(self, config):
        params, f = random_params(config), compiled(config)
        both, alone = f.forward(params, TOKENS), f.forward(params, TOKENS[1:])
        np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-4)

    def test_is_causal(self, config):
        params, f = random_params(config), compiled(config)
        changed = TOKENS.at[:, 7:].set(3)
        a, b = f.forward(params, TOKENS), f.forward(params, changed)
        np.testing.assert_allclose(a[:, :7], b[:, :7], rtol=0, atol=1e-5)
        assert not np.allclose(a[:, 7:], b[:, 7:])

    def test_module_is_the_same_function(self, config):
        params = random_params(config)
        module = llama.module_of(config, params)
        expected = compiled(config).forward(params, TOKENS)
        logits = nnx.jit(lambda m, t: m(t))(module, TOKENS)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        same = jax.tree.map(jnp.array_equal, llama.params_of(module), params)
        assert jax.tree.all(same)


@pytest.mark.parametrize("chunk", [3, 10])
def test_nll_in_chunks(chunk):
    params, f = random_params(BASE), compiled(BASE)
    logits = jax.nn.log_softmax(f.forward(params, TOKENS)[:, :-1])
    expected = -jnp.take_along_axis(logits, TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(f.nll(params, TOKENS, chunk), expected, rtol=0, atol=1e-5)


def test_nll_never_holds_all_logits():
    f, shapes = llama.functions(BASE), llama.param_shapes(BASE)
    tokens = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    jaxpr = str(jax.make_jaxpr(lambda p, t: f.nll(p, t, 32))(shapes, tokens))
    assert "f32[1,32,50]" in jaxpr
    assert "f32[1,256,50]" not in jaxpr


def test_gradients_are_finite_and_reach_every_leaf():
    params, f = random_params(BASE), compiled(BASE)
    grads = jax.jit(jax.grad(lambda p: f.nll(p, TOKENS).mean()))(params)
    assert all(jnp.isfinite(g).all() and jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_module_trains():
    model = llama.Llama(BASE, rngs=nnx.Rngs(0))

    @nnx.jit
    def train(model):
        loss, grads = nnx.value_and_grad(lambda m: llama.next_token_loss(m, TOKENS).mean())(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
        return loss

    losses = [float(train(model)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_half_precision_stays_close_and_computes_in_half():
    config = dataclasses.replace(BASE, dtype=jnp.bfloat16)
    params = random_params(BASE)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = compiled(config).forward(half, TOKENS)
    assert logits.dtype == jnp.float32
    expected = compiled(BASE).forward(params, TOKENS)
    assert jnp.abs(logits - expected).max() < 0.05 * jnp.abs(expected).max()
    assert llama.functions(config).init_cache(1, 4)["layers"]["k"].dtype == jnp.bfloat16


def test_layers_are_one_scan():
    jaxpr = jax.make_jaxpr(llama.functions(BASE).forward)(llama.param_shapes(BASE), TOKENS)
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 1


def test_equal_configs_share_functions():
    assert llama.functions(BASE).step is llama.functions(dataclasses.replace(BASE)).step


def test_llama3_rope_factors():
    factors = llama.llama3_rope_factors(
        64, 500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    assert list(factors) == sorted(factors)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"layers": 0}, "layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"rope_factors": (1.0,)}, "rope_factors"),
        ({"rope_factors": (0.0,) * 4}, "rope_factors"),
        ({"dtype": jnp.int8}, "dtype"),
    ],
)
def test_bad_config(change, match):
    with pytest.raises(ValueError, match=f"`{match}`"):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS.astype(jnp.float32)])
def test_bad_tokens(tokens):
    with pytest.raises(ValueError, match="`tokens`"):
        llama.functions(BASE).forward(random_params(BASE), tokens)


def test_more_tokens_than_the_cache_holds():
    f = llama.functions(BASE)
    with pytest.raises(ValueError, match="`cache` holds 4"):
        f.step(random_params(BASE), TOKENS, f.init_cache(2, 4))
