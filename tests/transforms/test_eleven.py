"""Eleven ways to use a weight that other tools miss or refuse: each must be packed, and right."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import stowax as sx
from tests.transforms.check import Case, by_name, check_case, init, randn, relative_error, weight


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(32)(nn.LayerNorm()(x))
        return x + nn.Dense(32)(nn.gelu(h)), None


def scanned(remat: bool = False):
    """A Linen stack: parameters ``[layers, ...]``, one body."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block, prevent_cse=False) if remat else Block
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return stack()(x, None)[0]

    x = randn(1, 4, 32)
    model = Stack()
    return model.apply, init(model, x), (x,)


def after_a_float_run():
    @jax.jit
    def fn(w, x):
        return x @ w

    w, x = weight(0, 32, 16), randn(1, 4, 32)
    fn(w, x)  # the cache of jit is warm
    return fn, {"w": w}["w"], (x,)


def left_operand():
    fn = lambda p, x: jnp.einsum("fd,btd->fbt", p["w"], x)
    return fn, {"w": weight(0, 32, 16).T}, (randn(1, 2, 3, 32),)


def three_operands():
    fn = lambda p, x: jnp.einsum("bd,df,fe->be", x, p["a"], p["b"])
    return fn, {"a": weight(0, 32, 64), "b": weight(1, 64, 16)}, (randn(2, 4, 32),)


def tied_embedding():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(50, 32)
            return embed.attend(nn.Dense(32)(embed(tokens)))

    tokens = jnp.array([[3, 49, 0], [7, 7, 1]])
    model = Tied()
    return model.apply, init(model, tokens), (tokens,)


def used_twice():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
    return fn, {"w": weight(0, 32, 32)}, (randn(1, 4, 32),)


def through_layout_ops():
    def fn(p, x):
        a = x @ p["t"].T
        b = x @ p["r"].reshape(32, 48)
        c = x.astype(jnp.bfloat16) @ p["c"].astype(jnp.bfloat16)
        return a, b, c.astype(jnp.float32)

    params = {"t": weight(0, 32, 48).T, "r": weight(1, 32, 6, 8), "c": weight(2, 32, 48)}
    return fn, params, (randn(3, 4, 32),)


def dict_of_params():
    def fn(params, x):
        for layer in params["layers"]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x

    layers = [{"w": weight(i, 32, 32), "b": randn(9 + i, 32)} for i in range(3)]
    return fn, {"layers": layers}, (randn(20, 4, 32),)


CASES = [
    Case("linen scan", scanned, ("params/ScanBlock_0/Dense_0/kernel", "params/ScanBlock_0/Dense_1/kernel")),
    Case(
        "linen scan of remat",
        lambda: scanned(remat=True),
        ("params/ScanCheckpointBlock_0/Dense_0/kernel", "params/ScanCheckpointBlock_0/Dense_1/kernel"),
    ),
    Case("after a float run", after_a_float_run, ("0",)),
    Case("left operand", left_operand),
    Case("three operands", three_operands),
    Case("tied embedding", tied_embedding),
    Case("used twice", used_twice),
    Case("through layout ops", through_layout_ops, rounding=5e-3),
    Case("dict of params", dict_of_params),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=by_name)
@pytest.mark.parametrize(("spec", "bound"), [("f32", 1e-6), ("int8", 0.02)])
def test_case(case, spec, bound):
    check_case(case, spec, bound)


@pytest.mark.parametrize("case", CASES[:2], ids=by_name)
def test_stack_in_groups(case):
    check_case(case, "int4-g16", 0.2)


@pytest.mark.parametrize("spec", ["int8", "int4-g16"])
def test_export(spec):
    fn, params, args = dict_of_params()
    fast = sx.quantize(spec)(fn)
    encoded = fast.encode(params, *args)
    artifact = jax.export.export(jax.jit(fast))(encoded, *args).serialize()
    loaded = jax.export.deserialize(bytearray(artifact))
    assert relative_error(loaded.call(encoded, *args), jax.jit(fast)(encoded, *args)) == 0
