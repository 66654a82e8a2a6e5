"""What the benches of kernels run beside ours, with the clock put aside."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from stowax.experiments import chains, torch_peers, xla_peers
from stowax.experiments.roofline import Roofline
from stowax.pallas_kernels import codecs, matmul


def test_roofline_says_which_bound_and_how_near():
    limits = Roofline(tb_per_s=2.0, tflops=500.0)
    assert limits.share(10.0, nbytes=10e6, flops=1e9) == {"roofline": 0.5, "bound": "memory"}
    assert limits.share(10.0, nbytes=1e6, flops=4e9) == {"roofline": 0.8, "bound": "arithmetic"}


def test_plain_jax_decodes_groups():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    scale = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    want = (codes * np.repeat(scale, 2, 0)).sum(0)
    coded = jnp.asarray(codes).astype(jnp.int4), jnp.asarray(scale)
    np.testing.assert_allclose(xla_peers.matmul(jnp.ones((1, 4)), coded)[0], want)


def test_torch_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--torch: torch is not installed"):
        torch_peers.rows("matmul", [(128, 128, 1)])


@pytest.mark.parametrize("spec", ["int4-g128-sym", "int4-g128", "int8", "bf16"])
def test_a_chain_keeps_the_size_of_its_numbers(spec):
    rng = np.random.default_rng(0)

    def make(n, k):
        w = jnp.asarray(rng.uniform(-1, 2, (1, n, k)), jnp.bfloat16)  # not 0 in the mean
        return w if spec == "bf16" else codecs.pack(w, codecs.get(spec), lead=(0, 1), inner=(2,))

    product = (lambda x, w: x @ w.mT) if spec == "bf16" else matmul
    x = jnp.asarray(rng.standard_normal((1, 4, 256)), jnp.bfloat16)
    pair = make(512, 256), make(256, 512)
    by = chains.gain(product, x, pair) ** -0.5
    assert by < 0.1
    y, pair = x, [chains.scaled(w, by) for w in pair]
    for _ in range(32):
        y = chains.link(product, y, pair)
    assert 1e-2 < float(jnp.linalg.norm(y.astype(float)) / jnp.linalg.norm(x.astype(float))) < 1e2
