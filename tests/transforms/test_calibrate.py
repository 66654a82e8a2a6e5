"""Calibrated solvers in any program: every weight is solved on the inputs that really reach it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stowax as sx
from stowax.transforms.solvers import Solved
from tests.transforms.check import Plain, Quick, decode, randn, relative_error, weight
from tests.transforms.test_eleven import scanned

N = 32
SPEC = "int3-g16"


def inputs(seed, *shape):
    """Correlated inputs, as layers see them: a few directions hold most of their size."""
    mixing = np.random.default_rng(7).standard_normal((8, shape[-1])) * 2
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape[:-1], 8)) @ mixing / 4 + 0.1 * rng.standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


X = inputs(0, 128, N)


def plain():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    return fn, {"a": weight(0, N, N), "b": weight(1, N, N)}, X


def scan_stack():
    fn = lambda p, x: lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]
    return fn, {"w": weight(0, 2, N, N)}, X


def reverse_scan():
    step = lambda x, w: (x + jnp.tanh(x @ w), x.sum())
    fn = lambda p, x: lax.scan(step, x, p["w"], reverse=True)
    return fn, {"w": weight(0, 2, N, N)}, X


def unrolled_stack():
    def fn(p, x):
        for i in range(2):
            x = x + jnp.tanh(x @ p["w"][i])
        return x

    return fn, {"w": weight(0, 2, N, N)}, X


def indexed_stack():
    def fn(p, x):
        return lax.fori_loop(0, 2, lambda i, x: x + jnp.tanh(x @ p["w"][i]), x)

    return fn, {"w": weight(0, 2, N, N)}, X


def jitted_layers():
    layer = jax.jit(lambda w, x: x + jax.nn.silu(x @ w.T))

    def fn(p, x):
        for w in p:
            x = jax.checkpoint(layer)(w, x)
        return x

    return fn, [weight(i, N, N).T for i in range(2)], X


def linen_scan():
    model, variables, _ = scanned()
    return model, variables, inputs(0, 64, N)


def dense_experts():
    fn = lambda p, x: jnp.einsum(
        "tef,efd->td", jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"])), p["down"]
    )
    return fn, {"up": weight(0, 3, N, N), "down": weight(1, 3, N, N)}, X


def ragged_experts():
    def fn(p, x):
        sizes = jnp.array([50, 48, 30], jnp.int32)
        return lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    return fn, {"up": weight(0, 3, N, N), "down": weight(1, 3, N, N)}, X


def convolution():
    spec = ("NHWC", "HWIO", "NHWC")
    conv = lambda w, x: lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=spec)
    fn = lambda p, x: conv(p["b"], jnp.tanh(conv(p["a"], x)))
    shape = (3, 2, 8, 8)
    return fn, {"a": randn(0, *shape) / 7, "b": randn(1, *shape) / 7}, inputs(0, 4, 6, 6, 8)


def attention():
    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bhtk", x, p[name]) for name in "qkv")
        probs = jax.nn.softmax(q @ k.mT / 4)
        return jnp.einsum("bhtk,hkd->btd", probs @ v, p["out"])

    tree = {name: weight(i, N, 2, 16) / 4 for i, name in enumerate("qkv")}
    return fn, tree | {"out": weight(3, 2, 16, N)}, inputs(0, 8, 16, N)


CASES = {
    "plain": plain,
    "scan": scan_stack,
    "scan in reverse": reverse_scan,
    "unrolled": unrolled_stack,
    "indexed": indexed_stack,
    "jitted layers": jitted_layers,
    "linen scan": linen_scan,
    "dense experts": dense_experts,
    "ragged experts": ragged_experts,
    "convolution": convolution,
    "attention": attention,
}


@dataclasses.dataclass(frozen=True)
class Spy(sx.transforms.solvers.Solver):
    """Keeps the hessians that it is given, and encodes."""

    calibration: tuple = dataclasses.field(default=(), compare=False)
    seen: list = dataclasses.field(default_factory=list, compare=False)
    name = "spy"
    needs = frozenset({"hessian"})

    def solve(self, w, codec, *, hessian=None):
        self.seen.append(np.asarray(hessian))
        return Solved(codec.encode(w), {})


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_solved_on_its_inputs(name):
    fn, params, x = CASES[name]()
    fast = sx.quantize(Plain(), solver=Spy([x]))(fn)
    encoded = fast.encode(params)
    assert codes(encoded) == codes(sx.quantize(Plain(), solver=Quick())(fn).encode(params, x))
    for row in fast.report.rows:
        assert "fallback" not in row.info, row
        assert row.info["tokens"] > 0


def codes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["plain", "scan", "linen scan", "ragged experts"])
def test_calibrated_output_is_closer(name):
    fn, params, x = CASES[name]()
    solved = sx.quantize(SPEC, solver=sx.gptq([x], clip=None))(fn)  # clips take long to compile
    encoded = solved.encode(params)
    for row in solved.report.rows:
        assert "fallback" not in row.info, row
        assert row.info["tokens"] > 0
        assert row.info["output_error"] < row.info["rounding_output_error"], row
    rounded = sx.quantize(SPEC)(fn).encode(params, x)
    jitted = jax.jit(fn)
    want = jitted(params, x)
    error = lambda p: relative_error(jitted(decode(p), x), want)
    assert error(encoded) < 0.9 * error(rounded)
    assert relative_error(jax.jit(solved)(encoded, x), jitted(decode(encoded), x)) < 1e-5


def moment(*inputs):
    x = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in inputs])
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["plain", "scan", "unrolled", "jitted layers"])
def test_later_layers_see_quantized_ones(name):
    """The second hessian is of what the quantized first layer gives."""
    fn, params, x = CASES[name]()
    batches = [x[:64], x[64:]]
    spy = Spy(batches)
    fast = sx.quantize("int2-g16", solver=spy)(fn)
    encoded = decode(fast.encode(params))
    first = {
        "plain": lambda x: jnp.tanh(x @ encoded["a"]),
        "scan": lambda x: x + jnp.tanh(x @ encoded["w"][0]),
        "unrolled": lambda x: x + jnp.tanh(x @ encoded["w"][0]),
        "jitted layers": lambda x: x + jax.nn.silu(x @ encoded[0].T),
    }[name]
    assert len(spy.seen) == 2
    np.testing.assert_allclose(spy.seen[0], moment(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(spy.seen[1], moment(first(x)), rtol=1e-3, atol=1e-4)


def test_experts_see_their_own_tokens():
    fn, params, x = ragged_experts()
    spy = Spy([x])
    sx.quantize({"up": Plain(), "": None}, solver=spy)(fn).encode(params)
    for seen, rows in zip(spy.seen, (x[:50], x[50:98], x[98:])):
        np.testing.assert_allclose(seen, moment(rows), rtol=1e-3, atol=1e-4)


def test_convolutions_see_patches():
    fn, params, x = convolution()
    spy = Spy([x])
    sx.quantize({"^a$": Plain(), "": None}, solver=spy)(fn).encode(params)
    padded = np.pad(
        x, ((0, 0), (0, 1), (0, 1), (0, 0))
    )  # SAME, for 3 x 2 windows in steps of 2 x 1
    patches = [
        padded[:, i : i + 3, j : j + 2].reshape(len(x), -1) for i in (0, 2, 4) for j in range(6)
    ]
    np.testing.assert_allclose(spy.seen[0], moment(*patches), rtol=1e-3, atol=1e-4)


def test_tied_weights_are_solved_where_they_are_multiplied():
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    ids = jnp.arange(64).reshape(4, 16) % 40
    fast = sx.quantize(Plain(), solver=Spy([ids]))(fn)
    encoded = fast.encode({"table": randn(0, 40, N)})
    assert "fallback" not in fast.report.rows[0].info
    assert relative_error(fast(encoded, ids), fn(decode(encoded), ids)) < 1e-5


def unreached(p, x):
    sizes = jnp.array([100, 0, 28], jnp.int32)
    return lax.ragged_dot(x, p["w"], sizes)


def grouped_convolution(p, x):
    x = x.reshape(8, 4, 4, N)
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=spec, feature_group_count=N
    )


@pytest.mark.parametrize(
    ("fn", "shape", "reason"),
    [
        (unreached, (3, N, N), "no calibration token reached it"),
        (
            grouped_convolution,
            (3, 3, 1, N),
            "the inputs of `conv_general_dilated` are not collected",
        ),
        (
            lambda p, x: p["w"][jnp.int32(x[:, 0] > 0)],
            (40, N),
            "the inputs of `gather` are not collected",
        ),
        (
            lambda p, x: lax.cond(False, lambda: x @ p["w"], lambda: x),
            (N, N),
            "no calibration token reached it",
        ),
    ],
)
def test_what_is_rounded_instead_says_why(fn, shape, reason):
    fast = sx.quantize("int8", solver=sx.gptq([X]))(fn)
    fast.encode({"w": weight(0, *shape)})
    info = fast.report.rows[0].info
    assert (info["fallback"], info["reason"]) == ("round", reason)


def test_nothing_after_the_last_weight_is_run():
    calls = []

    def fn(p, x):
        y = x @ p["w"]
        jax.debug.callback(lambda v: calls.append(v), y.sum())
        return y

    sx.quantize("int8", solver=sx.gptq([X]))(fn).encode({"w": weight(0, N, N)})
    jax.effects_barrier()
    assert not calls


def test_batches_of_several_arguments():
    fn = lambda x, p, scale: (x * scale) @ p["w"]
    batches = [(X, jnp.float32(2)), (X + 1, jnp.float32(3))]
    fast = sx.quantize(Plain(), solver=Spy(batches))(fn, params=1)
    fast.encode({"w": weight(0, N, N)})
    seen = fast.transform.solver.seen[0]
    np.testing.assert_allclose(seen, moment(2 * X, 3 * (X + 1)), rtol=1e-3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "`calibration` is empty"), ([X, X[:5]], "must have one shape")],
)
def test_bad_calibration(batches, message):
    fn, params, _ = plain()
    with pytest.raises(ValueError, match=message):
        sx.quantize("int8", solver=sx.gptq(batches))(fn).encode(params)


def test_different_branches():
    fn = lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: -x @ p["w"])
    with pytest.raises(NotImplementedError, match="`cond`: calibration batches take different"):
        sx.quantize("int8", solver=sx.gptq([X + 9, X - 9]))(fn).encode({"w": weight(0, N, N)})


def test_one_calibration_in_a_chain():
    first, second = sx.gptq([X]), sx.gptq([X + 1])
    fn, params, _ = plain()
    fast = sx.chain(
        sx.quantize({"a": "int8"}, solver=first), sx.quantize("int4-g16", solver=second)
    )
    with pytest.raises(ValueError, match="different calibration sets"):
        fast(fn).encode(params)
