"""Packed matmul against the reference: values, gradients, tiles, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax.pallas_kernels import codecs, kernel_name, matmul
from stowax.pallas_kernels.matmul import xla

SHAPES = {  # batch, M, K, N
    "vector": ((), 1, 32, 16),
    "matrix": ((), 5, 48, 24),
    "ragged group": ((), 3, 40, 7),
    "batch": ((3,), 2, 32, 8),
    "two batch axes": ((2, 3), 1, 16, 4),
}
CODECS = ["f32", "int8-tensor", "int3-g16", "nf4-g16", "mxfp4"]


def operands(batch, m, k, n, spec="int8", dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*batch, m, k)), dtype)
    w = jnp.asarray(rng.standard_normal((*batch, n, k)), dtype)
    lead = tuple(range(len(batch) + 1))
    return x, codecs.pack(w, codecs.get(spec), lead=lead, inner=(len(batch) + 1,))


@pytest.mark.parametrize("spec", CODECS)
def test_codecs(spec):
    x, w = operands(*SHAPES["ragged group"], spec=spec)
    want = matmul(x, w, implementation="reference")
    np.testing.assert_allclose(jax.jit(matmul)(x, w), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    x, w = operands(*SHAPES[shape])
    want = np.einsum("...mk,...nk->...mn", x, w.decode())
    np.testing.assert_allclose(jax.jit(matmul)(x, w), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_named_implementations(name):
    x, w = operands(*SHAPES["batch"])
    got = matmul(x, w, implementation=name)
    np.testing.assert_allclose(got, matmul(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "tile_rows", "tiles"), [(24, 8, 3), (23, 8, 3), (24, 100, 1), (3, 1, 3)])  # fmt: skip
def test_tiles(monkeypatch, rows, tile_rows, tiles):
    """Tiles of rows, an uneven last one, one row a tile: the same result and gradient."""
    x, w = operands((2,), 5, 32, rows, spec="int4-g16")
    monkeypatch.setattr(xla, "TILE_BYTES", tile_rows * 32 * 4)
    assert xla.tile_count(w) == tiles
    both = lambda run: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(x, w)))))(x)
    dense = w.decode()
    reference = lambda x, _: jnp.einsum("...mk,...nk->...mn", x, dense)
    for got, want in zip(both(matmul), both(reference)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert kernel_name(x, w) == "xla: decode + dot" + (f", {tiles} tiles" if tiles > 1 else "")


def test_at_most_a_tile_is_decoded(monkeypatch):
    """No float array of the whole weight is anywhere in the program."""
    x, w = operands((), 2, 32, 64, spec="int4-g16")
    monkeypatch.setattr(xla, "TILE_BYTES", 8 * 32 * 4)
    text = jax.jit(matmul).lower(x, w).as_text()
    assert "tensor<8x32xf32>" in text
    assert "tensor<64x32xf32>" not in text


@pytest.mark.parametrize(
    ("dtype", "preferred", "out"),
    [
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float16, None, jnp.float16),
    ],
)
def test_dtypes(dtype, preferred, out):
    x, w = operands(*SHAPES["matrix"], dtype=dtype)
    got = matmul(x, w, preferred_element_type=preferred)
    want = matmul(x, w, implementation="reference", preferred_element_type=preferred)
    assert got.dtype == want.dtype == out
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=2e-2, atol=2e-1)


def test_gradients_reach_scales():
    x, w = operands(*SHAPES["matrix"])
    grad = lambda run: jax.grad(lambda w: jnp.sum(run(x, w) ** 2), allow_int=True)(w)
    got, want = grad(matmul), grad(lambda x, w: x @ w.decode().T)
    np.testing.assert_allclose(got.parts["scale"], want.parts["scale"], rtol=1e-2)


def test_bad_input():
    x, w = operands((), 2, 32, 8)
    with pytest.raises(ValueError, match=r"`x` \(2, 31\) and `w` \(8, 32\)"):
        matmul(x[:, 1:], w)
    with pytest.raises(ValueError, match="`implementation` is 'cublas'"):
        matmul(x, w, implementation="cublas")
