"""Gradients through a rewritten function: right, and without a decoded weight kept for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stowax.transforms.core import is_packed
from tests.transforms import test_control as control
from tests.transforms.check import decode, randn, relative_error, rewrite, weight

N = control.N

BUILDS = {
    "scan": control.scan_xs,
    "fori_loop": control.fori_indexed,
    "cond": control.cond,
    "remat with a policy": control.remat_policy,
    "custom_vjp": control.custom_vjp,
    "custom_vjp in scan in remat": control.custom_vjp_in_scan_in_remat,
}


def loss_of(fn):
    def loss(p, x, *rest):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(p, x, *rest)))

    return loss


@pytest.mark.parametrize("name", BUILDS)
def test_lossless_codec_gives_the_reference(name):
    """With weights stored as float32, gradients of weights and inputs are those of the original."""
    fn, params, args = BUILDS[name]()
    fast, encoded = rewrite(fn, params, *args, spec="f32")
    got = jax.jit(jax.grad(loss_of(fast), argnums=(0, 1)))(encoded, *args)
    want = jax.jit(jax.grad(loss_of(fn), argnums=(0, 1)))(params, *args)
    assert relative_error(decode(got), want) < 2e-6


@pytest.mark.parametrize("name", ["custom_vjp in scan in remat", "cond"])
def test_frozen_weights_and_trainable_inputs(name):
    fn, params, args = BUILDS[name]()
    fast, encoded = rewrite(fn, params, *args)
    got = jax.jit(jax.grad(loss_of(fast), argnums=1))(encoded, *args)
    through_decode = lambda p, *rest: loss_of(fn)(decode(p), *rest)
    want = jax.jit(jax.grad(through_decode, argnums=1))(encoded, *args)
    assert relative_error(got, want) < 2e-6


@pytest.mark.parametrize(
    ("name", "spec"), [("custom_vjp in scan in remat", "int8"), ("fori_loop", "int4-g8")]
)
def test_gradients_of_scales(name, spec):
    """They are those through decoding; codes are frozen."""
    fn, params, args = BUILDS[name]()
    fast, encoded = rewrite(fn, params, *args, spec=spec)
    through_decode = lambda p, *rest: loss_of(fn)(decode(p), *rest)
    got = jax.jit(jax.grad(loss_of(fast), allow_int=True))(encoded, *args)["w"].parts
    want = jax.jit(jax.grad(through_decode, allow_int=True))(encoded, *args)["w"].parts
    floats = [k for k, v in want.items() if v.dtype != jax.dtypes.float0]
    assert "scale" in floats
    assert any(v.dtype == jax.dtypes.float0 for v in got.values())
    for part in floats:
        assert np.any(np.asarray(want[part]) != 0)
        rtol, atol = (2e-2, 2e-3) if got[part].dtype == jnp.float16 else (1e-4, 0)
        np.testing.assert_allclose(got[part], want[part], rtol=rtol, atol=atol)


def test_jvp():
    fn, params, (x,) = control.scan_xs()
    fast, encoded = rewrite(fn, params, x)
    tangent = lambda f, p: jax.jvp(lambda x: f(p, x), (x,), (jnp.ones_like(x),))[1]
    got, want = jax.jit(tangent, static_argnums=0)(fast, encoded), tangent(fn, decode(encoded))
    assert relative_error(got, want) < 2e-6


def conv():
    fn = lambda p, x: lax.conv(x, p["w"], (1, 1), "SAME")
    return fn, {"w": randn(0, 8, 4, 3, 3)}, (randn(1, 2, 4, 9, 9),)


def ragged():
    sizes = jnp.array([1, 2, 1], jnp.int32)
    return lambda p, x: lax.ragged_dot(x, p["w"], sizes), {"w": weight(0, 3, N, 8)}, (control.X,)


def decoded_matmul():
    """One weight, two ways to contract it: one of them has to decode."""
    return lambda p, x: (x @ p["w"]) @ p["w"].T, {"w": weight(0, N, 24)}, (control.X,)


SAVING = BUILDS | {"conv": conv, "ragged_dot": ragged, "decoded matmul": decoded_matmul}
SAVING.pop("remat with a policy")  # it asks for its dots to be saved


@pytest.mark.parametrize("name", SAVING)
def test_no_decoded_weight_is_kept_for_the_backward_pass(name):
    fn, params, args = SAVING[name]()
    fast, encoded = rewrite(fn, params, *args)
    assert is_packed(encoded["w"])
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: fast(encoded, x, *args[1:]), x)[1], args[0])
    sizes = {v.size for v in jax.tree.leaves(kept) if jnp.issubdtype(v.dtype, jnp.floating)}
    size = params["w"].size
    layers = params["w"].shape[0] if params["w"].ndim == 3 else 1
    assert not sizes & {size, size // layers}
