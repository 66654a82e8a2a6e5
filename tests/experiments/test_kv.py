"""The KV experiments: names of methods, decode mode, the recall run, the picture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax import models
from stowax.experiments import kv_measure, kv_methods, kv_quality, kv_recall, pictures, recall

CONFIG = models.LlamaConfig(
    vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_dim=64
)


def test_names():
    for name in kv_methods.METHODS:
        assert isinstance(kv_methods.get(name), sx.transforms.Method)
    both = kv_methods.get("h2o:0.25+int8")
    assert both.selector.budget == 0.25
    assert both.key is not None
    with pytest.raises(ValueError, match="near ones"):
        kv_methods.get("kivy2")


def test_decode_mode_scores_every_token_as_one_shot_does():
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 24)), jnp.int32)
    fast = sx.compress_kv(sx.recipes.full())(functions.step, params=0, cache=2)
    cache = fast.init_cache(jax.eval_shape(lambda: functions.init_cache(2, 24)))
    got = jax.jit(functools.partial(kv_measure.decode_nll, fast))(params, windows, cache)
    np.testing.assert_allclose(got.T, functions.nll(params, windows), atol=1e-4)


def test_windows_of_a_text():
    assert kv_measure.cut(range(10), 2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="the text has 7"):
        kv_measure.cut(range(7), 2, 4)


def test_recall_through_a_cache_that_keeps_all_and_one_that_keeps_little():
    """The model answers from a full cache; at random a quarter of the tokens is not enough."""
    found = recall.load()
    names = ["needle"]
    scores = {}
    for name in ("full", "random:64"):
        fast = sx.compress_kv(kv_methods.get(name))(found.functions.step, params=0, cache=2)

        def init(batch, length, fast=fast):
            shapes = jax.eval_shape(lambda: found.functions.init_cache(batch, length))
            return fast.init_cache(shapes, found.params, jnp.zeros((batch, 1), jnp.int32))

        scores[name] = recall.score_all(fast, found.params, init, names=names, length=256, count=16)
    assert scores["full"]["needle"].token > 0.95
    assert scores["random:64"]["needle"].token < 0.7


def test_tables_and_picture():
    rows = [
        {"name": n, "bytes_per_token": b, "cache_bytes": 10 * b, "perplexity": p, "step_ms": 1.0}
        for n, b, p in (("full", 1000, 10.0), ("h2o:64", 250, 11.0), ("h2o:128", 500, 10.2))
    ]
    assert kv_quality.cells(rows)[1][2:5] == ("25.0%", "11.000", "+10.00%")
    picture = pictures.kv_over_bytes(rows, "full", "perplexity")
    assert picture.startswith("<svg")
    task = {"name": "full", "bytes_per_token": 10.0, "tasks": {"needle": 1.0}, "accuracy": 0.5}
    assert kv_recall.cells(task) == ("full", "10", "100.0", "50.0")
