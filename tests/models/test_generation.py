import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax.models import Sampling, generate, llama
from stowax.models.generation import sample

CONFIG = llama.LlamaConfig(
    vocab_size=20, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=16
)
PROMPT = [3, 1, 4, 1, 5, 9, 2]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), llama.param_shapes(CONFIG)
    )
    return llama.functions(CONFIG), params


def counting_step(params, tokens, cache):
    """Says that the token after t is t + 1."""
    return 9.0 * jax.nn.one_hot(tokens + 1, 10), cache + tokens.shape[1]


def run(model, **options):
    f, params = model
    options = {"max_tokens": 6} | options
    return generate(f.step, params, f.init_cache(1, 16), PROMPT, **options)


def test_greedy_equals_forward_again_and_again(model):
    f, params = model
    forward, sequence = jax.jit(f.forward), list(PROMPT)
    for _ in range(3):
        sequence.append(int(forward(params, jnp.asarray([sequence]))[0, -1].argmax()))
    result = run(model)
    assert result.tokens[0][:3] == sequence[len(PROMPT) :]
    assert len(result.tokens[0]) == 6
    assert result.cache["index"] == len(PROMPT) + 5  # the last token is not fed back


def test_prefill_in_chunks(model):
    assert run(model, prefill_chunk=3).tokens == run(model).tokens


def test_stops_at_the_end_token_of_each_row():
    result = generate(
        counting_step, None, jnp.int32(0), [[1, 2], [3, 4]], max_tokens=20, eos_ids=(7,)
    )
    assert result.tokens == [[3, 4, 5, 6], [5, 6]]
    assert result.cache == 2 + 4


def test_one_token():
    result = generate(counting_step, None, jnp.int32(0), [1], max_tokens=1, timing=True)
    assert result.tokens == [[2]]
    assert result.decode_tokens_per_s is None


def test_sampling_depends_on_the_seed_only(model):
    hot = Sampling(temperature=2.0)
    a, b = (run(model, sampling=hot, seed=1).tokens for _ in range(2))
    assert a == b
    assert len({str(run(model, sampling=hot, seed=s).tokens) for s in range(5)}) > 1


def test_timing(model):
    result = run(model, timing=True)
    assert result.prefill_ms > 0
    assert result.decode_tokens_per_s > 0
    assert run(model).prefill_ms is None
    assert result.tokens == run(model).tokens


LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.07, 0.03]]))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {0}),
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.4), {0}),
        (Sampling(temperature=1.0, top_p=0.7), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.8), {0, 1, 2}),
        (Sampling(temperature=1.0, top_k=2, top_p=0.7), {0, 1}),
        (Sampling(temperature=0.01), {0}),
    ],
)
def test_which_tokens_can_come(sampling, possible):
    keys = jax.random.split(jax.random.key(0), 400)
    seen = jax.vmap(lambda key: sample(LOGITS, sampling, key)[0])(keys)
    assert set(seen.tolist()) == possible


def test_frequencies():
    keys = jax.random.split(jax.random.key(0), 4000)
    seen = jax.vmap(lambda key: sample(LOGITS, Sampling(temperature=1.0), key)[0])(keys)
    share = np.bincount(np.asarray(seen), minlength=5) / 4000
    np.testing.assert_allclose(share, np.exp(LOGITS[0]), atol=0.03)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"top_k": -1}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p`"),
    ],
)
def test_bad_sampling(options, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**options)


@pytest.mark.parametrize("prompt", [[], [[[1]]], [1.5]])
def test_bad_prompts(prompt):
    with pytest.raises(ValueError, match="`prompt`"):
        generate(counting_step, None, jnp.int32(0), prompt, max_tokens=2)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": 1, "prefill_chunk": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="`max_tokens`"):
        generate(counting_step, None, jnp.int32(0), [1], **options)
