"""Recall tasks, scoring through prefill and decoding, and the model that is shipped."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax import models
from stowax.experiments import recall
from stowax.experiments.recall import model, tasks

ALL = list(recall.TASKS)
LENGTH = 96


def make(name, depth=0.5, length=LENGTH, seed=0, **options):
    return recall.TASKS[name](np.random.default_rng(seed), length, depth, **options)


def positions(tokens, wanted):
    """Where the run `wanted` begins in `tokens`."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    return np.flatnonzero((windows == np.asarray(wanted)).all(axis=1))


def hidden_item(name, example):
    """What of the context is asked for, as it stands there."""
    question = example.prompt[example.context_end :]
    if name == "repeated_context":
        return np.concatenate([question, example.answer])
    found = np.concatenate([question[-1:], example.answer])
    return found[-2:] if name == "variable_tracking" else found


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_batch(name):
    a, b, c = (recall.batch(name, seed, 4, LENGTH) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a.prompt, b.prompt)
    np.testing.assert_array_equal(a.answer, b.answer)
    assert (a.prompt != c.prompt).any()
    assert a.prompt.dtype == a.answer.dtype == np.int32
    assert a.context_end == LENGTH < a.prompt.shape[1]
    assert 0 <= a.prompt.min() <= a.prompt.max() < tasks.VOCABULARY


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_the_context_holds_what_is_asked_once_at_the_depth(name, depth):
    for seed in range(5):
        example = make(name, depth, length=256, seed=seed)
        context, item = example.prompt[: example.context_end], hidden_item(name, example)
        (place,) = positions(context, item)
        assert place / (context.size - item.size) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize("name", ALL)
def test_every_further_question_has_its_answer_in_the_context(name):
    example = make(name)
    for question, answer in example.more:
        again = dataclasses.replace(
            example, prompt=np.concatenate([example.prompt[:LENGTH], question]), answer=answer
        )
        assert positions(again.prompt[:LENGTH], hidden_item(name, again)).size == 1


def test_the_answer_of_a_variable_follows_its_chain():
    example = make("variable_tracking", hops=3)
    chain = [example.prompt[-1], *example.answer]
    assert len(chain) == 5
    assert np.isin(chain, tasks.VALUES).tolist() == [False] * 4 + [True]
    context = example.prompt[: example.context_end]
    places = [positions(context, pair).tolist() for pair in itertools.pairwise(chain)]
    assert all(len(p) == 1 for p in places)
    assert places == sorted(places, reverse=True)


def test_options_reach_the_task():
    batch = recall.batch("multi_key", 0, 2, LENGTH, depth=0.25, pairs=30)
    assert (np.isin(batch.prompt[:, :LENGTH], tasks.KEYS).sum(axis=1) == 30).all()
    assert recall.batch("passkey", 0, 2, LENGTH, digits=3).answer.shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall.batch("needles", 0, 1, 64), r"`task`.*passkey.*'needles'"),
        (lambda: recall.batch("needle", 0, 0, 64), r"`count`.*0"),
        (lambda: recall.batch("multi_key", 0, 1, 20), r"`length` must be at least 33.*20"),
        (lambda: make("needle", depth=1.5), r"`depth`.*1\.5"),
        (lambda: make("multi_key", pairs=65), r"`pairs`.*65.*64"),
        (lambda: make("variable_tracking", hops=0), r"`hops`.*0"),
        (lambda: make("repeated_context", given=1), r"`given`.*1"),
    ],
)
def test_wrong_arguments_of_tasks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def shipped():
    return recall.load()


THRESHOLDS = {
    "needle": 0.95,
    "multi_key": 0.95,
    "variable_tracking": 0.80,
    "repeated_context": 0.95,
    "passkey": 0.95,
}


@pytest.mark.parametrize("name", ALL)
def test_the_shipped_model_recalls(shipped, name):
    batch = recall.batch(name, 11, 32, 256)
    step = shipped.functions.step

    def init(batch, length):
        assert length <= 272
        return shipped.functions.init_cache(
            batch, 272
        )  # of one length: compiled once for all tasks

    assert recall.score(step, shipped.params, init, batch).token >= THRESHOLDS[name]


def test_chunks_of_the_context_make_no_difference(shipped):
    step, init = shipped.functions.step, shipped.functions.init_cache
    options = {"names": ["passkey"], "length": LENGTH, "count": 8}
    whole = recall.score_all(step, shipped.params, init, **options)
    assert recall.score_all(step, shipped.params, init, prefill_chunk=48, **options) == whole


@pytest.mark.parametrize("when", ["context", "question"])
def test_a_cache_that_forgets_recalls_nothing(shipped, when):
    seen = []

    def forget(cache):
        seen.append(int(cache["index"]))
        return cache | {"layers": jax.tree.map(jnp.zeros_like, cache["layers"])}

    batch = recall.batch("passkey", 0, 8, LENGTH)
    found = recall.score(
        shipped.functions.step,
        shipped.params,
        shipped.functions.init_cache,
        batch,
        compress=forget,
        compress_after=when,
    )
    assert found.token < 0.3
    assert seen == [LENGTH if when == "context" else batch.prompt.shape[1] - 1]


def test_scores_count_tokens_and_whole_answers():
    batch = recall.batch("passkey", 0, 4, LENGTH)
    script = jnp.asarray(batch.answer.T.copy()).at[0, 0].set(0)  # one token of one row is wrong

    def step(params, tokens, cache):
        del params
        cache = cache + tokens.shape[1]
        guess = script[jnp.maximum(cache - batch.prompt.shape[1], 0)]
        return jax.nn.one_hot(guess, tasks.VOCABULARY)[:, None], cache

    found = recall.score(step, None, lambda batch, length: jnp.int32(0), batch)
    assert found == recall.Score(exact=0.75, token=0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk": 0}, "`prefill_chunk`"),
        ({"compress_after": "answer"}, r"`compress_after`.*'answer'"),
        ({"examples": make("needle")}, "`examples`.*batch"),
    ],
)
def test_wrong_options_of_score_are_named(options, message):
    options = {"examples": recall.batch("needle", 0, 2, LENGTH), **options}
    with pytest.raises(ValueError, match=message):
        recall.score(lambda *_: None, None, lambda *_: None, **options)


def test_saved_weights_come_back(tmp_path):
    config = dataclasses.replace(model.CONFIG, dim=8, layers=2, ffn_dim=8, tied=False)
    params = jax.tree.map(lambda s: np.full(s.shape, 0.3), models.llama.param_shapes(config))
    recall.save(tmp_path / "w.safetensors", config, params)
    again = recall.load(tmp_path / "w.safetensors")
    assert again.config == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), again.params, params)


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors.*train"):
        recall.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"bad\.safetensors.*metadata"):
        recall.load(tmp_path / "bad.safetensors")
