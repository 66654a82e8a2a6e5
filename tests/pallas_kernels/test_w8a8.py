"""8 or 4 bits times 8 bits against the float32 product of what was rounded."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stowax as sx
from stowax.pallas_kernels import codecs, matmul
from stowax.pallas_kernels.matmul import (
    many_rows,
    reference,
    tiles,
    tokens,
    tuned,
    w4a8_mosaic_gpu,
    w8a8,
    w8a8_mosaic_gpu,
    xla,
)

FOUR = ["int4-sym", "qoq4-g16"]
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


@pytest.mark.parametrize("spec", ["int8", "int8-tensor", "int8-f32", "fp8_e4m3", *FOUR])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(spec, shape):
    x, w = operands(*SHAPES[shape], spec)
    want = reference.matmul(w8a8.rounded(x, w), w)
    got = jax.jit(w8a8.matmul)(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "error"), [("int8", 0.01), ("fp8_e4m3", 0.04), ("int4-sym", 0.01), ("qoq4-g64", 0.01)]
)
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


@pytest.mark.parametrize("spec", FOUR)
def test_big_weights_of_4_bits_are_decoded_a_tile_at_a_time(spec, monkeypatch):
    x, w = operands((), 4, 64, 24, spec)
    want = w8a8.matmul(x, w)
    monkeypatch.setattr(xla, "TILE_BYTES", 4 * 64 * 8)
    run = jax.jit(lambda x, w: w8a8.matmul(x, w))
    np.testing.assert_array_equal(run(x, w), want)
    text = run.lower(x, w).as_text()
    assert "tensor<8x64xi8>" in text
    assert "tensor<24x64xi8>" not in text


def test_scan_and_vmap():
    x, w = operands((2,), 4, 64, 8, "qoq4-g16")
    want = w8a8.matmul(x, w)
    layers = w.unstack(0)[0]
    _, got = jax.lax.scan(lambda _, xw: (None, w8a8.matmul(*xw)), None, (x, layers))
    np.testing.assert_array_equal(got, want)
    first = jax.tree.map(lambda part: part[0], layers)
    got = jax.vmap(w8a8.matmul, (0, None))(x, first)
    np.testing.assert_array_equal(got[0], want[0])


def test_zero_tokens_and_dtypes():
    x, w = operands((), 3, 32, 8, "int8", jnp.bfloat16)
    got = w8a8.matmul(x.at[1].set(0), w)
    assert got.dtype == jnp.bfloat16
    assert not jnp.any(got[1])
    assert jnp.all(jnp.isfinite(got))
    assert w8a8.matmul(x, w, preferred_element_type=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("spec", ["int8", *FOUR])
def test_multiplies_in_8_bits(spec):
    x, w = operands((), 4, 32, 8, spec)
    text = jax.jit(w8a8.matmul).lower(x, w).as_text()
    assert "(tensor<4x32xi8>, tensor<8x32xi8>) -> tensor<4x8xi32>" in text


# batch, M, K, N, config: whole and ragged tiles, an odd number of steps, parts of K for all tiles, for the last ones
KERNEL = {
    "int8": ((2,), 70, 384, 136, tiles.Config(64, 2, blocks=2)),
    "qoq4-g64": ((2,), 40, 512, 136, many_rows.Config(48, 2, blocks=2)),
}
KERNEL_SLOW = {
    "fp8_e4m3": ((1,), 72, 384, 264, tiles.Config(48, 3, blocks=4, parts=2)),
    "int8-tensor": ((1,), 20, 1152, 128, tiles.Config(32, 3, blocks=9, parts=3)),
    "int8-f32": ((1,), 20, 128, 256, tiles.Config(32, 3, blocks=9)),
    "int4-sym": ((1,), 20, 768, 136, many_rows.Config(32, 3, blocks=3, parts=2)),
    "qoq4-g32-f32": ((1,), 72, 256, 264, many_rows.Config(48, 3, blocks=4)),
    "qoq4-g512": ((1,), 20, 512, 128, many_rows.Config(32, 3, blocks=9, parts=2)),
}


@pytest.mark.parametrize(
    "spec", [*KERNEL, *(pytest.param(s, marks=pytest.mark.slow) for s in KERNEL_SLOW)]
)
def test_kernel(spec):
    """In the interpreter."""
    *sizes, config = (KERNEL | KERNEL_SLOW)[spec]
    x, w = operands(*sizes, spec)
    codes, scale = w8a8.quantize_tokens(x, w8a8._element(w))
    kernel = w8a8._kernel(w).matmul
    run = functools.partial(kernel, config=config, out_dtype=jnp.float32, interpret=True)
    got, want = jax.jit(run)(codes, scale, w), w8a8.matmul(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "int4-sym", "qoq4-g64"])
@pytest.mark.parametrize(("m", "n"), [(8, 64), (8, 256), (300, 256), (300, 40)])
def test_lowers_for_cuda(spec, m, n):
    """The kernel for two operands of 8 bits, or the weight-only one; what no kernel takes, XLA."""
    few = n == 64 or (m == 8 and spec in ("int8", "fp8_e4m3"))
    kernel = "" if n == 40 else "weight-only" if few else "8-bit units"
    x, w = operands((), m, 512, n, spec, jnp.bfloat16)
    assert w8a8.kernel_of(*jax.eval_shape(lambda: (x, w))) == kernel  # of shapes, as reports have
    text = jax.jit(w8a8.matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == bool(kernel)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("k", [37, 128])
def test_kernel_of_tokens(k, dtype):
    """In the interpreter; one of the tokens is zeros."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, k)), jnp.bfloat16)
    x = x.at[0, 1].set(0)
    got = tokens.kernel(x, dtype=dtype, interpret=True)
    want = jax.jit(functools.partial(tokens.plain, dtype=dtype))(x)
    assert not tokens.refusal(k, dtype)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(("bits", "kernel"), [(8, w8a8_mosaic_gpu), (4, w4a8_mosaic_gpu)])
def test_every_shape_gets_blocks_that_fit(bits, kernel):
    for k, n in ((4096, 14336), (14336, 4096), (1536, 576)):
        for m in (1, 65, 129, 1000, 4096):
            c = tuned.rounded(bits, 1, m, n, k)
            assert kernel.shared_bytes(c) <= tuned.SHARED_BYTES
            assert c.stages >= 2
            assert c.block_m % 16 == 0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int8-asym", "without a zero point"),
        ("int8-g16", "scale for each group"),
        ("int4", "neither int8 or int4"),
        ("int4-g16-sym", "scale for each group"),
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


@pytest.mark.parametrize("spec", ["int8-a8", "fp8_e4m3-a8", "int4-sym-a8", "qoq4-g16"])
def test_weights_of_such_a_codec_run_it(spec):
    """In a rewritten function, its gradient straight through the rounding, and by name in the table."""
    x, _ = operands((), 4, 32, 8, spec)
    fast = sx.quantize(spec)(lambda w, x: x @ w.T, params=0)
    dense = jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), jnp.float32)
    packed = fast.encode(dense, x)
    want = w8a8.matmul(x, packed)
    np.testing.assert_array_equal(jax.jit(fast)(packed, x), want)
    assert f"w{w8a8.bits_of(packed)}a8: x in 8 bits too" in str(fast.explain(packed, x))
    got = jax.grad(lambda x: (fast(packed, x) * want).sum())(x)
    np.testing.assert_allclose(got, want @ packed.decode(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_integer_scales_of_groups_cost_little(tails):
    """They are about as near as float scales of groups, and far nearer than those of channels."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 1024)) if tails == "normal" else rng.standard_t(4, (64, 1024))
    w = jnp.asarray(values, jnp.float32)

    def error(spec):
        return jnp.linalg.norm(codecs.pack(w, codecs.get(spec), lead=(0,), inner=(1,)).decode() - w)

    for group in (64, 128):
        grouped = error(f"int4-g{group}-sym")
        assert error(f"qoq4-g{group}") < 1.03 * grouped < 0.85 * error("int4-sym")


def test_what_can_not_be_multiplied_in_8_bits_is_multiplied_as_it_is():
    x, w = operands((), 4, 32, 8, "int8-a8")
    assert codecs.get("w8a8") == w.codec
    with pytest.raises(ValueError, match="int8-a8"):
        codecs.get("int8-g64-a8")
    with pytest.raises(NotImplementedError, match="scale for each group"):
        matmul(x, operands((), 4, 32, 8, "int8-g16")[1], implementation="w8a8")
