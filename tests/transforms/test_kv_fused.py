"""One token's attention to packed rows: the same as by replay, whatever is kept in full, and named in `explain()`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax import models
from stowax.pallas_kernels.codecs import LayoutError
from stowax.transforms.kv import fused

CONFIG = models.LlamaConfig(
    vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_dim=32
)


def selected(name, **options):
    return sx.recipes.combine(sx.recipes.select(name, 24, **options), sx.recipes.int8())


METHODS = {
    "int8": sx.recipes.int8(),
    "residual and sinks": sx.recipes.kivi(bits=4, group=16, residual=16, sinks=3),
    "h2o": selected("h2o"),
    "adakv": selected("adakv", window=8),
}
SLOW = {
    "levels": sx.recipes.kv2(residual=32, sinks=2),
    "pyramidkv": selected("pyramidkv", window=8),
    "keydiff": selected("keydiff", sinks=2),
}
BY_HAND = {
    "rotated": sx.recipes.int4(16, rotate=True),
    "tova": selected("tova"),
    "scissorhands": selected("scissorhands", recent=8),
}


def run(method, fuse: bool, monkeypatch, calls=(37, 1, 1, 1, 1, 1)):
    """Outputs of a prompt and single tokens, and the cache."""

    def never(*_):
        raise LayoutError("not in this test")

    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, sum(calls))))
    fast = sx.compress_kv(method)(functions.step, cache=2)
    with monkeypatch.context() as patch:
        if not fuse:
            patch.setattr(fused, "form", never)
        empty = jax.eval_shape(lambda: functions.init_cache(2, 48, jnp.float32))
        cache, outs, at = fast.init_cache(empty, params, tokens[:, :1]), [], 0
        step = jax.jit(lambda *x: fast(*x))
        for n in calls:
            out, cache = step(params, tokens[:, at : at + n], cache)
            outs.append(out)
            at += n
    table = fast.explain(params, tokens[:, :1], cache).caches
    return outs, table


@pytest.mark.parametrize(
    "name",
    [
        *METHODS,
        *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
        *(pytest.param(n, marks=[pytest.mark.slow, pytest.mark.by_hand]) for n in BY_HAND),
    ],
)
def test_equals_replay(name, monkeypatch):
    method = (METHODS | SLOW | BY_HAND)[name]
    got, table = run(method, True, monkeypatch)
    want, _ = run(method, False, monkeypatch)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # a code may round the other way
    (site,) = table.rows[0].sites
    path, selector = "xla: decode + attend, block by block", method.selector
    if selector is not None and selector.needs_attention:
        path += ", with weights for the selector"
    keeps = "xla" if selector is None else "xla (a selector keeps the rows)"
    assert (site.path, site.keeps) == (path, keeps)


@pytest.mark.parametrize(
    ("method", "reason", "keeps"),
    [
        (sx.recipes.full(), "rows are not packed", "xla"),
        (sx.recipes.select("streaming", 8), "rows are not packed", "xla (a selector keeps the rows)"),
        (sx.recipes.think(0.5, residual=8), "rows are made from what is stored", "xla (channels are dropped)"),
    ],
)  # fmt: skip
def test_what_is_replayed_says_why(method, reason, keeps):
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    fast = sx.compress_kv(method)(functions.step, cache=2)
    token = jnp.zeros((2, 1), jnp.int32)
    cache = fast.init_cache(
        jax.eval_shape(lambda: functions.init_cache(2, 48, jnp.float32)), params, token
    )
    (row,) = fast.explain(params, token, cache).caches.rows
    assert row.sites[0].path == f"replay ({reason})"
    assert row.sites[0].keeps == keeps
    assert reason in str(row.how)
    assert keeps in str(row.how)


def test_a_cache_that_moves_can_not_be_encoded_in_blocks():
    def step(params, x, cache):
        k, v = (jnp.concatenate([c[:, 1:], x[:, :, None]], axis=1) for c in cache)
        scores = jnp.einsum("bth,bskh->bkts", x, k)
        return jnp.einsum("bkts,bskh->bth", jax.nn.softmax(scores), v), (k, v)

    cache, x = (jnp.zeros((1, 16, 1, 8)),) * 2, jnp.ones((1, 1, 8))
    fast = sx.compress_kv(sx.recipes.kivi(bits=4, group=8, residual=8))(step, params=0, cache=2)
    with pytest.raises(ValueError, match=r"shifts this cache.*use a codec per token"):
        fast(None, x, fast.init_cache(cache, None, x))
