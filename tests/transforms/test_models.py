"""Models that we did not write, or wrote without a thought of stowax: one call rewrites each."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import stowax as sx
from stowax.transforms.core import is_packed
from tests.transforms.check import Case, by_name, check_case, decode, init, randn, relative_error

N = 16
X = randn(100, 2, 4, N)
HEADS = tuple(f"{part}/kernel" for part in ("key", "out", "query", "value"))


def linen(module, *args):
    return lambda: (sx.flax.linen(module), init(module, *args), args)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 8):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(N)(x.reshape(x.shape[0], -1))


class Experts(nn.Module):
    """Top-2 of 4 experts; each token's products are summed by its gates."""

    ragged: bool

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, N)
        gates = jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
        shape = nn.initializers.normal()
        up, down = (self.param(k, shape, s) for k, s in (("up", (4, N, 32)), ("down", (4, 32, N))))
        if not self.ragged:
            hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, up))
            return jnp.einsum("tef,efd,te->td", hidden, down, gates)
        top, experts = lax.top_k(gates, 2)
        order = jnp.argsort(experts.ravel())
        sizes = jnp.bincount(experts.ravel(), length=4).astype(jnp.int32)
        hidden = jax.nn.silu(lax.ragged_dot(x[order // 2], up, sizes))
        out = lax.ragged_dot(hidden, down, sizes) * top.ravel()[order][:, None]
        return jnp.zeros_like(x).at[order // 2].add(out)


def nnx_attention():
    module = nnx.MultiHeadAttention(num_heads=2, in_features=N, decode=False, rngs=nnx.Rngs(0))
    fn, params = sx.flax.nnx(module)
    return fn, params, (X,)


def equinox_mlp():
    """Weights and activation functions in one pytree."""
    model = eqx.nn.MLP(N, N, 32, depth=2, key=jax.random.key(0))
    return lambda model, x: jax.vmap(model)(x), model, (X[0],)


def equinox_attention():
    model = eqx.nn.MultiheadAttention(2, N, key=jax.random.key(0))
    return lambda model, x: jax.vmap(lambda t: model(t, t, t))(x), model, (X,)


def haiku_transformer():
    haiku = pytest.importorskip("haiku")

    def forward(x):
        x = x + haiku.MultiHeadAttention(2, 8, w_init_scale=1.0, model_size=N)(x, x, x)
        return x + haiku.nets.MLP([32, N])(x)

    model = haiku.without_apply_rng(haiku.transform(forward))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    params = jax.tree.map(lambda s: randn(0, *s.shape) / 4, shapes)
    return model.apply, params, (X,)


CASES = [
    Case("linen attention", linen(nn.MultiHeadDotProductAttention(2), X), tuple(f"params/{k}" for k in HEADS)),
    Case("nnx attention", nnx_attention, HEADS),
    Case(
        "linen convolutions",
        linen(ConvNet(), randn(1, 2, 8, 8, 3)),
        ("params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"),
    ),
    Case(
        "linen experts",
        linen(Experts(ragged=False), X),
        ("params/down", "params/router/kernel", "params/up"),
    ),
    Case(
        "linen ragged experts",
        linen(Experts(ragged=True), X),
        ("params/down", "params/router/kernel", "params/up"),
    ),
    Case("equinox MLP", equinox_mlp, tuple(f"layers/{i}/weight" for i in range(3))),
    Case(
        "equinox attention",
        equinox_attention,
        tuple(f"{k}_proj/weight" for k in ("key", "output", "query", "value")),
    ),
    Case("haiku transformer", haiku_transformer),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning:haiku")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_model(case):
    if "ragged" in case.name:
        check_case(case, "f32", 1e-6)  # routes may flip in fewer bits
    else:
        check_case(case, bound=0.03)


def test_equinox_under_filter_jit_and_grad():
    """Static leaves stay static; gradients reach what `eqx.partition` leaves to train."""
    fn, model, (x,) = equinox_mlp()
    fast = sx.quantize({"layers/0": None, "": "int8"})(fn)
    encoded = fast.encode(model, x)
    assert is_packed(encoded.layers[1].weight)
    assert encoded.activation is model.activation
    trainable = lambda leaf: eqx.is_inexact_array(leaf) and leaf.dtype == jnp.float32
    train, frozen = eqx.partition(encoded, trainable)
    loss = lambda f: lambda train, m: jnp.sum(f(eqx.combine(train, m), x) ** 2)
    got = eqx.filter_jit(eqx.filter_grad(loss(fast)))(train, frozen)
    plain = lambda model, x: fn(decode(model), x)
    want = eqx.filter_grad(loss(plain))(train, frozen)
    assert relative_error(got, want) < 1e-5
    assert np.any(got.layers[0].weight != 0)


def test_linen_method_and_options():
    embed = nn.Embed(20, N)
    ids = jnp.array([[1, 2]])
    fast = sx.quantize("int8")(sx.flax.linen(embed, method="attend"))
    variables = init(embed, ids)
    encoded = fast.encode(variables, X)
    assert fast.__name__ == "Embed"
    got = fast(encoded, X)
    assert relative_error(got, embed.apply(decode(encoded), X, method="attend")) < 1e-6


def test_nnx_state_stays_as_it_is():
    """Batch statistics are used, not weights, and a call does not change them."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(N, N, rngs=rngs)
            self.norm = nnx.BatchNorm(N, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.dense(x)))

    module = Net(nnx.Rngs(0))
    module.norm.mean[...] = randn(0, N)
    module.eval()
    fn, params = sx.flax.nnx(module)
    assert set(params) == {"dense", "norm"}
    fast = sx.quantize("int8")(fn)
    encoded = fast.encode(params, X)
    before = module.norm.mean[...]
    assert relative_error(fast(encoded, X), module(X)) < 0.02
    assert np.array_equal(before, module.norm.mean[...])
