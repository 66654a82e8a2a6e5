"""Many new tokens by a library: the same as by replay, and the structure of masks is proved, not guessed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo

import stowax as sx
from stowax.pallas_kernels.prefill_attention import cudnn, dispatch
from stowax.transforms.kv import prefill

S, H = 24, 8
COUNT = lambda t: jnp.arange(t, dtype=jnp.int32)[:, None]
AT = np.arange(S, dtype=np.int32)

# mask(t, index, positions) -> bool or bias, and its structure where the cache is empty
MASKS = {
    "causal": (lambda t, i, at: i + COUNT(t) >= AT, "causal"),
    "iotas": (
        lambda t, i, at: ~(lax.broadcasted_iota(jnp.int32, (t, S), 1) > i + COUNT(t)),
        "causal",
    ),
    "bias": (lambda t, i, at: jnp.where(AT - COUNT(t) - i < 1, 0.0, -1e9), "causal"),
    "window": (
        lambda t, i, at: (i + COUNT(t) >= AT) & (i + COUNT(t) - AT < 3),
        "causal + window 3",
    ),
    "wide window": (lambda t, i, at: (i + COUNT(t) >= AT) & (i + COUNT(t) - S < AT), "causal"),
    "length": (lambda t, i, at: (i + COUNT(t) >= AT) & (i + t > AT), "causal"),
    "positions": (lambda t, i, at: at[:, None] >= AT, "causal"),
    "one behind": (lambda t, i, at: (i + COUNT(t) > AT) | (AT == 0), ""),
    "prefix": (lambda t, i, at: (i + COUNT(t) >= AT) | (AT < 2), ""),
    "another start": (lambda t, i, at: i + 2 + COUNT(t) >= AT, ""),
    "skips": (lambda t, i, at: (i + COUNT(t) >= AT) & (AT != 1), ""),
}


def step_of(mask):
    def step(params, x, cache, at):
        k, v, index = cache
        write = lambda c, new: lax.dynamic_update_slice(c, new, (0, index, 0, 0))
        k, v = (write(c, jnp.stack([new, -new], 2)) for c, new in ((k, x), (v, 2 * x)))
        q = jnp.stack([x, 2 * x, 3 * x, x], 2).reshape(*x.shape[:2], 2, 2, H)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * 0.3
        seen = mask(x.shape[1], index, at)
        scores = jnp.where(seen, scores, -1e9) if seen.dtype == bool else scores + seen
        out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
        return out, (k, v, index + x.shape[1])

    return step


def start(dtype=jnp.float32):
    """An empty cache, and tokens with their positions."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, H)), dtype)
    return (
        (jnp.zeros((2, S, 2, H), dtype),) * 2 + (jnp.int32(0),),
        x,
        jnp.arange(16, dtype=jnp.int32),
    )


def rewritten(mask, method, dtype=jnp.float32):
    fast = sx.compress_kv(method)(step_of(mask), params=0, cache=2)
    cache, x, at = start(dtype)
    return fast, fast.init_cache(cache, None, x, at), x, at


@pytest.fixture
def on_gpu(monkeypatch):
    """The path of an NVIDIA GPU, XLA in cuDNN's place, in float32."""
    monkeypatch.setattr(lax, "platform_dependent", lambda default, cuda: cuda())
    monkeypatch.setattr(cudnn, "refusal", lambda q, soft_cap: "")


@pytest.mark.parametrize(("name", "shift"), [("window", 0), ("prefix", 0), ("positions", 2)])
def test_equals_the_program(name, shift, on_gpu, monkeypatch):
    """Given positions may be others than those of the rows: that is seen when the program runs."""
    monkeypatch.setattr(prefill, "MASK_BYTES", 2 * 2 * S * 3)  # 3 queries at a time
    step = step_of(MASKS[name][0])
    fast, compressed, x, at = rewritten(MASKS[name][0], sx.recipes.full())
    run, plain, cache = (
        jax.jit(functools.partial(fast, None)),
        functools.partial(step, None),
        start()[0],
    )
    for part in (slice(0, 8), slice(8, 16)):  # into an empty cache, and behind what is there
        got, compressed = run(x[:, part], compressed, at[part] + shift)
        want, cache = plain(x[:, part], cache, at[part] + shift)
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("name", MASKS)
def test_structure_is_proved(name):
    mask, want = MASKS[name]
    fast, cache, x, at = rewritten(mask, sx.recipes.int8(), jnp.bfloat16)
    (row,) = fast.explain(None, x, cache, at).caches.rows
    assert row.sites[0].structure == want
    assert row.sites[0].path == "replay (this is no NVIDIA GPU from Ampere on)"


def test_the_platform_decides(monkeypatch):
    monkeypatch.setattr(dispatch, "prefill_refusal", lambda *_: "")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    fast, cache, x, at = rewritten(MASKS["causal"][0], sx.recipes.int8(), jnp.bfloat16)
    traced = jax.jit(functools.partial(fast, None)).trace(x, cache, at)
    assert "cudnn" not in traced.lower().as_text()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaSoftmax" in text  # by structure
    assert "fmhaScaleBiasSoftmax" in text  # by masks
