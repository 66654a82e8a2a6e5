"""8 bits times 8 bits against the float32 product of what was rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax.pallas_kernels import codecs, matmul
from stowax.pallas_kernels.matmul import reference, w8a8

SHAPES = {  # batch, M, K, N
    "vector": ((), 1, 32, 16),
    "odd": ((), 5, 37, 7),
    "batch": ((2, 3), 2, 48, 8),
}


def operands(batch, m, k, n, spec, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*batch, m, k)) * 10.0, dtype)
    w = jnp.asarray(rng.standard_normal((*batch, n, k)), dtype)
    lead = tuple(range(len(batch) + 1))
    return x, codecs.pack(w, codecs.get(spec), lead=lead, inner=(len(batch) + 1,))


@pytest.mark.parametrize("spec", ["int8", "int8-tensor", "int8-f32", "fp8_e4m3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(spec, shape):
    x, w = operands(*SHAPES[shape], spec)
    want = reference.matmul(w8a8.rounded(x, w), w)
    got = jax.jit(w8a8.matmul)(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("spec", "error"), [("int8", 0.01), ("fp8_e4m3", 0.04)])
def test_close_to_weight_only(spec, error):
    x, w = operands((), 16, 512, 64, spec)
    want = reference.matmul(x, w)
    got = w8a8.matmul(x, w)
    assert jnp.linalg.norm(got - want) < error * jnp.linalg.norm(want)


def test_int8_sums_are_exact():
    """The longest K, every product at its largest: the sum stays in int32."""
    k = w8a8.INT8_LENGTH
    w = codecs.pack(-jnp.ones((1, k)), codecs.get("int8-f32"), lead=(0,), inner=(1,))
    got = w8a8.matmul(jnp.ones((1, k)), w)
    np.testing.assert_allclose(got, [[-k]], rtol=1e-6)


def test_zero_tokens_and_dtypes():
    x, w = operands((), 3, 32, 8, "int8", jnp.bfloat16)
    got = w8a8.matmul(x.at[1].set(0), w)
    assert got.dtype == jnp.bfloat16
    assert not jnp.any(got[1])
    assert jnp.all(jnp.isfinite(got))
    assert w8a8.matmul(x, w, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_multiplies_in_8_bits():
    x, w = operands((), 4, 32, 8, "int8")
    text = str(jax.make_jaxpr(w8a8.matmul)(x, w))
    assert "preferred_element_type=int32" in text


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int8-asym", "without a zero point"),
        ("int8-g16", "scale for each group"),
        ("int4", "neither int8"),
        ("fp8_e5m2", "nor fp8_e4m3"),
    ],
)
def test_refusals(spec, reason):
    x, w = operands((), 2, 32, 8, spec)
    assert reason in w8a8.refusal(x, w)
    with pytest.raises(NotImplementedError, match=reason):
        w8a8.matmul(x, w)


def test_bad_input():
    x, w = operands((), 2, 32, 8, "int8")
    with pytest.raises(ValueError, match=r"`x` \(2, 31\) and `w` \(8, 32\)"):
        w8a8.matmul(x[:, 1:], w)
    assert "not stored in the order" in w8a8.refusal(x.T, w.transpose((1, 0)))
    assert "not a float" in w8a8.refusal(x.astype(jnp.int32), w)


@pytest.mark.parametrize("spec", ["int8-a8", "fp8_e4m3-a8"])
def test_weights_of_such_a_codec_run_it(spec):
    """In a rewritten function, its gradient straight through the rounding, and by name in the table."""
    x, _ = operands((), 4, 32, 8, spec)
    fast = sx.quantize(spec)(lambda w, x: x @ w.T, params=0)
    dense = jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), jnp.float32)
    packed = fast.encode(dense, x)
    want = w8a8.matmul(x, packed)
    np.testing.assert_array_equal(jax.jit(fast)(packed, x), want)
    assert "w8a8" in str(fast.explain(packed, x))
    alone = sx.quantize(spec.removesuffix("-a8"))(lambda w, x: x @ w.T, params=0)
    got = jax.grad(lambda x: (fast(packed, x) * want).sum())(x)
    plain = jax.grad(lambda x: (alone(alone.encode(dense, x), x) * want).sum())(x)
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-4)


def test_what_can_not_be_multiplied_in_8_bits_is_multiplied_as_it_is():
    x, w = operands((), 4, 32, 8, "int8-a8")
    assert codecs.get("w8a8") == w.codec
    with pytest.raises(ValueError, match="int8-a8"):
        codecs.get("int8-g64-a8")
    with pytest.raises(NotImplementedError, match="scale for each group"):
        matmul(x, operands((), 4, 32, 8, "int8-g16")[1], implementation="w8a8")
