"""Attention of many queries: every path against the definition in float32, and what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from stowax.pallas_kernels import prefill_attention, prefill_kernel
from stowax.pallas_kernels.prefill_attention import dispatch, xla

B, N, K, T, S, H = 2, 4, 2, 7, 9, 16
RNG = np.random.default_rng(0)
SEEN = jnp.asarray(RNG.random((1, T, S)) < 0.7).at[:, :, 0].set(True)
MASKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "lengths": {"lengths": jnp.array([9, 4], jnp.int32)},
    "causal to lengths": {"causal": True, "lengths": jnp.array([9, 4], jnp.int32)},
    "seen": {"seen": SEEN},
    "soft cap": {"causal": True, "soft_cap": 2.0, "scale": 0.5},
}


def operands(dtype=jnp.float32):
    shapes = (B, N, T, H), (B, K, S, H), (B, K, S, H)
    return [jnp.asarray(RNG.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 3) for name in MASKS), ("causal", T)]
)  # queries in a block
def test_xla_is_the_reference(name, size, monkeypatch):
    monkeypatch.setattr(xla, "SCORE_BYTES", size * 4 * B * N * S)
    x = operands()
    want = prefill_attention(*x, **MASKS[name], implementation="reference")
    got = jax.jit(functools.partial(prefill_attention, **MASKS[name]))(*x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradient_and_vmap():
    x = operands(jnp.bfloat16)
    loss = lambda *x: prefill_attention(*x, causal=True).astype(np.float32).sum()
    one = lambda *x: loss(*(y[None] for y in x))
    got = jax.jit(jax.grad(lambda *x: jax.vmap(one)(*x).sum()))(*x)
    want = jax.jit(jax.grad(loss))(*x)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "mask"),
    [("causal", "CAUSAL"), ("window", "CAUSAL"), ("causal to lengths", "PADDING_CAUSAL"), ("seen", "NO_MASK")],
)  # fmt: skip
def test_on_cuda_it_is_cudnn_and_structure_is_no_bias(name, mask, monkeypatch):
    monkeypatch.setattr(dispatch, "prefill_refusal", lambda *_: "")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    f = functools.partial(prefill_attention, **MASKS[name])
    traced = jax.jit(f).trace(*operands(jnp.bfloat16))
    assert "cudnn" not in traced.lower().as_text()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"\\22mask_type\\22: \\22{mask}\\22" in text
    assert ("fmhaScaleBias" in text) == (name == "seen")


@pytest.mark.parametrize(
    ("dtype", "h", "soft_cap", "reason"),
    [
        (jnp.float32, 64, None, "not float32"),
        (jnp.bfloat16, 256, None, "not 256"),
        (jnp.bfloat16, 64, 5.0, "no soft cap"),
        (jnp.bfloat16, 64, None, "no NVIDIA GPU"),
    ],
)
def test_what_cudnn_does_not_take_is_named(dtype, h, soft_cap, reason):
    q = jnp.zeros((1, 2, 3, h), dtype)
    assert reason in prefill_kernel(q, soft_cap)
    with pytest.raises(NotImplementedError, match=reason):
        prefill_attention(q, q, q, soft_cap=soft_cap, implementation="cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": jnp.zeros(B)}, r"`lengths` is float32\[2\]; expected int32\[2\]"),
        ({"seen": SEEN[:, :, 1:]}, r"`seen` is bool\[1, 7, 8\]; expected bool\[2 or 1, 7, 9\]"),
        ({"window": 3}, "`window` is 3 with causal=False"),
        ({"soft_cap": -1.0}, "`soft_cap` is -1.0"),
        ({"implementation": "flash"}, "`implementation` is 'flash'"),
        ({"keys": jnp.zeros((B, 3, S, H))}, "do not fit"),
        ({"values": jnp.zeros((B, K, S, H), jnp.bfloat16)}, "expected one dtype"),
    ],
)
def test_errors(change, message):
    given = dict(zip(("q", "keys", "values"), operands())) | change
    with pytest.raises(ValueError, match=message):
        prefill_attention(**given)
