"""Weights inside control flow and custom rules: packed to the inside, and the same result."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import stowax as sx
from stowax.transforms.core import compat
from stowax.transforms.core.interpret import RULES
from tests.transforms.check import (
    Case,
    by_name,
    check_case,
    decode,
    primitives,
    randn,
    relative_error,
    rewrite,
    weight,
)

N = 16
X = randn(100, 4, N)


def one():
    return {"w": weight(0, N, N)}


def stack(layers: int = 3):
    return {"w": weight(0, layers, N, N)}


def layer(w, x):
    return x + jnp.tanh(x @ w)


def nested_jit():
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    outer = jax.jit(lambda p, x: inner(p["w"], inner(p["w"], x)))
    return outer, one(), (X,)


def shared_inner_jaxpr():
    inner = jax.jit(layer)

    def fn(p, x):
        for w in p["layers"]:
            x = inner(w, x)
        return x

    return fn, {"layers": [weight(i, N, N) for i in range(3)]}, (X,)


def scan_xs():
    return lambda p, x: lax.scan(lambda x, w: (layer(w, x), x.sum()), x, p["w"]), stack(), (X,)


def scan_reverse():
    def fn(p, x):
        return lax.scan(lambda x, w: (layer(w, x), x[0]), x, p["w"], reverse=True, unroll=2)

    return fn, stack(), (X,)


def scan_const():
    return lambda p, x: lax.scan(lambda x, _: (layer(p["w"], x), None), x, length=3)[0], one(), (X,)


def scan_invariant_carry():
    def fn(p, x):
        step = lambda carry, _: ((carry[0], layer(carry[0], carry[1])), None)
        return lax.scan(step, (p["w"], x), length=3)[0][1]

    return fn, one(), (X,)


def scan_changed_carry():
    def fn(p, x):
        step = lambda carry, _: ((carry[0] * 0.5, layer(carry[0], carry[1])), None)
        return lax.scan(step, (p["w"], x), length=3)[0][1] @ p["w"]

    return fn, one(), (X,)


def scan_in_scan():
    def fn(p, x):
        group = lambda x, ws: lax.scan(lambda x, w: (layer(w, x), None), x, ws)
        return lax.scan(group, x, p["w"].reshape(2, 3, N, N))[0]

    return fn, stack(6), (X,)


def while_loop():
    def fn(p, x):
        body = lambda state: (state[0] + 1, layer(p["w"], state[1]))
        return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    return fn, one(), (X,)


def while_invariant_carry():
    def fn(p, x):
        body = lambda state: (state[0] + 1, state[1], layer(state[1], state[2]))
        return lax.while_loop(lambda state: state[0] < 3, body, (0, p["w"], x))[2]

    return fn, one(), (X,)


def while_condition():
    def fn(p, x):
        cond = lambda x: jnp.sum(x @ p["w"]) ** 2 > 1e9
        return lax.while_loop(cond, lambda x: x * 0.5, x) @ p["w"]

    return fn, one(), (X,)


def fori_indexed():
    body = lambda i, x, w: layer(w[i], x)
    fn = lambda p, x: lax.fori_loop(0, 3, functools.partial(body, w=p["w"]), x)
    return fn, stack(), (X,)


def cond():
    def fn(p, x, flag):
        return lax.cond(flag > 0, lambda w: x @ w, lambda w: jnp.tanh(x @ w.T), p["w"])

    return fn, one(), (X, jnp.int32(1))


def switch():
    def fn(p, x, which):
        branches = [lambda w, x, k=k: x @ (w.T if k % 2 else w) * k for k in range(3)]
        return lax.switch(which, branches, p["w"], x)

    return fn, one(), (X, jnp.int32(2))


def remat():
    return lambda p, x: jax.checkpoint(layer)(p["w"], x), one(), (X,)


def remat_policy():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return lambda p, x: jax.checkpoint(layer, policy=policy)(p["w"], x), one(), (X,)


@jax.custom_jvp
def jvp_matmul(w, x):
    return x @ w


jvp_matmul.defjvp(lambda primals, tangents: (jvp_matmul(*primals), tangents[1] @ primals[0]))


@jax.custom_vjp
def vjp_matmul(w, x):
    return x @ w


vjp_matmul.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g * 3, (g @ kept[0].T) * 7)
)


def custom_jvp():
    return lambda p, x: jvp_matmul(p["w"], x), one(), (X,)


def custom_vjp():
    return lambda p, x: vjp_matmul(p["w"], x), one(), (X,)


def custom_vjp_in_scan_in_remat():
    @jax.checkpoint
    def fn(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(vjp_matmul(w, x)), None), x, p["w"])[0]

    return fn, stack(), (X,)


def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(spec, out, reduced=False):
    def fn(p, x):
        def local(w, x):
            y = x @ w
            return lax.psum(y, "d") if reduced else y

        x_spec = PartitionSpec(None, "d") if reduced else PartitionSpec()
        run = jax.shard_map(local, mesh=mesh(), in_specs=(spec, x_spec), out_specs=out)
        return run(p["w"], x)

    return fn, one(), (X,)


def vmapped_experts():
    return lambda p, x: jax.vmap(layer)(p["w"], jnp.stack([x] * 3)), stack(), (X,)


def named_scopes():
    def fn(p, x):
        with jax.named_scope("block"):
            return layer(p["w"], x)

    return fn, one(), (X,)


def closed_over_constant():
    table = np.linspace(0, 1, N, dtype=np.float32)
    return lambda p, x: (x + table) @ p["w"], one(), (X,)


CASES = [
    Case("nested jit", nested_jit),
    Case("shared inner jaxpr", shared_inner_jaxpr),
    Case("scan over layers", scan_xs),
    Case("scan in reverse", scan_reverse),
    Case("scan with a constant", scan_const),
    Case("scan with an unchanged carry", scan_invariant_carry),
    Case("scan with a changed carry", scan_changed_carry, how=("xla", "decode")),
    Case("scan in scan", scan_in_scan),
    Case("while", while_loop),
    Case("while with an unchanged carry", while_invariant_carry),
    Case("while with a weight in its condition", while_condition),
    Case("fori_loop with an index", fori_indexed),
    Case("cond", cond, how=("xla", "decode")),
    Case("switch", switch, how=("xla", "decode")),
    Case("remat", remat),
    Case("remat with a policy", remat_policy),
    Case("custom_jvp", custom_jvp),
    Case("custom_vjp", custom_vjp),
    Case("custom_vjp in scan in remat", custom_vjp_in_scan_in_remat),
    Case("shard_map of outputs", lambda: sharded(PartitionSpec(None, "d"), PartitionSpec(None, "d"))),
    Case("shard_map of a copy", lambda: sharded(PartitionSpec(), PartitionSpec())),
    Case(
        "shard_map of the contraction",
        lambda: sharded(PartitionSpec("d"), PartitionSpec(), True),
        how=("decode",),
    ),
    Case("vmap over experts", vmapped_experts),
    Case("named scopes", named_scopes),
    Case("closed-over constant", closed_over_constant),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_case(case):
    check_case(case)


def test_stacked_vectors_are_kept():
    """A scan over the rows of a matrix multiplies by vectors, which are no weights."""
    fn = lambda p, x: lax.scan(lambda _, row: (_, x @ row), None, p["w"].T)[1]
    with pytest.warns(UserWarning, match="take no weight"):
        row = sx.quantize("int8")(fn).explain(one(), X)["w"]
    assert (row.codec, row.reason) == ("", "no weight: used by dot_general")
    with pytest.raises(ValueError, match="take no weight"):
        sx.quantize("int8")(fn).encode(one(), X)


def test_one_program_for_equal_layers():
    """Layers that share an inner jaxpr share one `jit` in the rewritten program."""
    fn, params, args = shared_inner_jaxpr()
    fast, encoded = rewrite(fn, params, *args)
    _, rewritten = fast.jaxprs(encoded, *args)
    calls = [
        e.params["jaxpr"] for e in compat.open_jaxpr(rewritten)[0].eqns if e.primitive.name == "jit"
    ]
    assert len(calls) == 3
    assert len(set(map(id, calls))) == 1


def test_scan_stays_a_scan():
    fn, params, args = scan_xs()
    fast, encoded = rewrite(fn, params, *args)
    before, after = fast.jaxprs(encoded, *args)
    lengths = [
        [e.params["length"] for e in compat.open_jaxpr(j)[0].eqns if e.primitive.name == "scan"]
        for j in (before, after)
    ]
    assert lengths == [[3], [3]]


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (custom_jvp, "custom_jvp_call"),
        (custom_vjp, "custom_vjp_call"),
        (remat, "remat2"),
        (cond, "cond"),
    ],
)
def test_construct_is_kept(build, kept):
    fn, params, args = build()
    fast, encoded = rewrite(fn, params, *args)
    assert kept in primitives(fast.jaxprs(encoded, *args)[1])


def test_names_are_kept():
    fn, params, args = named_scopes()
    fast, encoded = rewrite(fn, params, *args)
    after = fast.jaxprs(encoded, *args)[1]
    scopes = {compat.where(eqn) for eqn in compat.open_jaxpr(after)[0].eqns}
    assert scopes == {"block"}
    assert fast.explain(params, *args)["w"].uses[0].where == "block"


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_are_kept(ordered):
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum(), ordered=ordered)
        y = lax.fori_loop(0, 2, lambda i, x: layer(p["w"], x), x)
        jax.debug.callback(lambda v: seen.append(float(v)), y.sum(), ordered=ordered)
        return y

    fast, encoded = rewrite(fn, one(), X)
    jax.jit(fast)(encoded, X)
    jax.effects_barrier()
    assert len(seen) == 2
    assert seen[0] == pytest.approx(float(X.sum()), rel=1e-5)


def test_vmap_of_the_rewritten():
    fn, params, (x,) = scan_xs()
    fast, encoded = rewrite(fn, params, x)
    xs = jnp.stack([x, 2 * x])
    got = jax.jit(jax.vmap(fast, in_axes=(None, 0)))(encoded, xs)
    want = jax.jit(jax.vmap(fn, in_axes=(None, 0)))(decode(encoded), xs)
    assert relative_error(got, want) < 1e-6


def test_vmap_over_packed_weights():
    """An axis in front of the buffers, as `jax.vmap` makes it, is no part of the tensor."""
    fn, _, (x,) = remat()
    fast = sx.quantize("int8")(fn)
    many = [fast.encode({"w": weight(i, N, N)}, x) for i in range(2)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *many)
    got = jax.jit(jax.vmap(fast, in_axes=(0, None)))(stacked, x)
    assert relative_error(got, jnp.stack([jax.jit(fast)(m, x) for m in many])) < 1e-6


def test_unknown_construct_is_refused_by_name(monkeypatch):
    """A primitive with an inner program and no rule: an error that names it and the weight."""
    fn, params, args = remat()
    encoded = sx.quantize("int8")(fn).encode(params, *args)
    monkeypatch.delitem(RULES, "remat2")
    with pytest.raises(ValueError, match="'w', which is no weight: used by remat2"):
        sx.quantize("int8")(fn).encode(params, *args)
    with pytest.raises(NotImplementedError, match=r"`remat2` .* weight w Packed\(int8"):
        sx.quantize("int8")(fn)(encoded, *args)
    got = sx.quantize("int8")(fn, strict=False)(encoded, *args)
    assert relative_error(got, fn(decode(encoded), *args)) < 1e-6


def test_high_level_remat_is_refused_by_name():
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this jax has no flag jax_remat3")
    fn, params, args = remat()
    encoded = sx.quantize("int8")(fn).encode(params, *args)
    jax.config.update("jax_remat3", True)
    try:
        with pytest.raises(NotImplementedError, match="call_hi_primitive"):
            jax.jit(sx.quantize("int8")(fn))(encoded, *args)
    finally:
        jax.config.update("jax_remat3", False)
