"""Programs as operations and values: every higher-order primitive, with bytes counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from stowax.memory_planner import trace

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)  # 128 bytes


def names(graph):
    return [op.name for op in graph.walk()]


@jax.custom_jvp
def jvp_rule(x):
    return jnp.sin(x)


jvp_rule.defjvp(lambda x, t: (jnp.sin(x[0]), jnp.cos(x[0]) * t[0]))


@jax.custom_vjp
def vjp_rule(x):
    return jnp.sin(x)


vjp_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@pytest.mark.parametrize(
    "call",
    [
        jax.jit(jnp.sin),
        jax.jit(jax.jit(jnp.sin)),
        jvp_rule,
        vjp_rule,
        jax.checkpoint(jnp.sin),
        lambda x: checkpoint_name(jnp.sin(x), "saved"),
    ],
    ids=["jit", "jit in jit", "custom_jvp", "custom_vjp", "checkpoint", "name"],
)
def test_calls_are_read_through(call):
    graph = trace(lambda x: call(x) * 2.0, X)
    assert names(graph) == ["sin", "mul"]
    assert [v.nbytes for op in graph.ops for v in op.outputs] == [128, 128]
    assert graph.ops[0].inputs == graph.inputs
    assert graph.ops[1].inputs[0] is graph.ops[0].outputs[0]
    assert graph.ops[1].inputs[1].literal
    assert graph.outputs == graph.ops[1].outputs


def test_what_a_gradient_recomputes_stands_behind_a_barrier():
    loss = lambda x: jnp.sin(jnp.sin(x)).sum()
    graph = trace(jax.grad(jax.checkpoint(loss)), X)
    assert names(graph).count("barrier") == 1
    at = names(graph).index("barrier")
    assert "sin" in names(graph)[at:]
    assert "barrier" not in names(trace(jax.grad(jax.checkpoint(loss, prevent_cse=False)), X))


def test_scan_keeps_its_body_and_counts_its_trips():
    def fn(w, x, xs):
        return jax.lax.scan(lambda c, row: (c @ w + row, c.sum()), x, xs)

    w = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    graph = trace(fn, w, X, jax.ShapeDtypeStruct((5, 4, 8), jnp.float32))
    (scan,) = graph.ops
    assert (scan.name, scan.trips, scan.consts, scan.carries) == ("scan", 5, 1, 1)
    (body,) = scan.blocks
    assert [v.nbytes for v in scan.inputs] == [256, 128, 640]
    assert [v.nbytes for v in body.inputs] == [256, 128, 128]
    assert [v.nbytes for v in scan.outputs] == [128, 20]
    assert [op.name for op in body.ops] == ["dot_general", "add", "reduce_sum"]
    assert body.flops == 2 * 4 * 8 * 8 + 32 + 32
    assert scan.flops == 5 * body.flops


def test_while_and_cond():
    def fn(x, n):
        x = jax.lax.while_loop(lambda c: c[1] < n, lambda c: (jnp.sin(c[0]), c[1] + 1), (x, 0))[0]
        return jax.lax.cond(n > 3, lambda x: x @ x.T, lambda x: jnp.zeros((4, 4)), x)

    graph = trace(fn, X, jax.ShapeDtypeStruct((), jnp.int32))
    loop = next(op for op in graph.ops if op.name == "while")
    assert [v.nbytes for v in loop.outputs] == [128, 4]
    assert "sin" in [op.name for op in loop.blocks[0].ops]
    cond = next(op for op in graph.ops if op.name == "cond")
    assert len(cond.blocks) == 2
    assert cond.flops == 2 * 4 * 4 * 8
    assert cond.outputs[0].nbytes == 64


def test_shard_map_counts_the_bytes_of_one_device():
    mesh = Mesh(jax.devices()[:4], "x")
    rows = PartitionSpec("x")
    fn = jax.shard_map(lambda x: jnp.sin(x) + 1.0, mesh=mesh, in_specs=rows, out_specs=rows)
    graph = trace(fn, X)
    skipped = ("pvary", "pcast", "convert_element_type")  # some versions cast the 1.0 inside
    first, *inside, last = [op for op in graph.ops if op.name not in skipped]
    assert [op.name for op in inside] == ["sin", "add"]
    assert [op.outputs[0].nbytes for op in (first, *inside, last)] == [32] * 4


def test_bytes_are_packed_and_spaces_known():
    def fn(w, x):
        return jax.device_put(x, jax.memory.Space.Host), w.astype(jnp.float32)

    graph = trace(fn, jax.ShapeDtypeStruct((9,), jnp.int4), X)
    assert [v.nbytes for v in graph.inputs] == [5, 128]
    assert [v.space for v in graph.outputs] == ["host", "device"]
    assert repr(graph.inputs[0]) == "args[0]:int4[9]"


def test_arguments_have_paths_and_donation_covers_their_leaves():
    tree = {"w": X, "b": [X]}
    graph = trace(lambda p, x: (p["w"] + x, p["b"][0]), tree, X, donate=0)
    assert [v.name for v in graph.inputs] == ["args[0]['b'][0]", "args[0]['w']", "args[1]"]
    assert graph.donated == set(graph.inputs[:2])
    last = trace(lambda p, x: x, tree, X, donate=-1)
    assert last.donated == {last.inputs[2]}


def test_a_jaxpr_is_a_program_too():
    graph = trace(jax.make_jaxpr(lambda x: x + 1.0)(X), donate=0)
    assert names(graph) == ["add"]
    assert graph.donated == set(graph.inputs)


def test_producers_and_users():
    graph = trace(lambda x: jnp.sin(x) * jnp.cos(x) + x, X)
    sin, cos, mul, add = graph.ops
    assert graph.users[graph.inputs[0]] == [sin, cos, add]
    assert graph.producers[mul.inputs[1]] is cos
    assert mul.inputs[0] in graph.users
    assert add.outputs[0] not in graph.users


@pytest.mark.parametrize(
    ("fn", "shapes", "flops"),
    [
        (lambda a, b: a @ b, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
        (lambda a: a.T + 1.0, [(3, 5)], 15),
        (lambda a: a.sum(0), [(3, 5)], 15),
        (lambda a: a.reshape(-1)[2:4], [(3, 5)], 0),
        (lambda a: jnp.sort(a), [(16,)], 64),
    ],
)
def test_flops(fn, shapes, flops):
    graph = trace(fn, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert graph.flops == flops


def test_flops_of_a_grouped_convolution():
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", feature_group_count=2
    )
    x = jax.ShapeDtypeStruct((1, 4, 8, 8), jnp.float32)
    graph = trace(conv, x, jax.ShapeDtypeStruct((6, 2, 3, 3), jnp.float32))
    assert graph.flops == 2 * (6 * 8 * 8) * (2 * 3 * 3)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"`donate` has \[2\]; there are 1 arguments"):
        trace(jnp.sin, X, donate=2)
    with pytest.raises(ValueError, match="`fn` is a jaxpr, so `args` must be left out"):
        trace(jax.make_jaxpr(jnp.sin)(X), X)


def test_an_unknown_higher_order_primitive_is_refused_by_name():
    primitive = jax.extend.core.Primitive("strange_call")
    primitive.def_abstract_eval(lambda x, *, body: x)
    jaxpr = jax.make_jaxpr(jnp.sin)(X)
    with pytest.raises(
        NotImplementedError, match=r"primitive `strange_call`.*scan, while and cond"
    ):
        trace(lambda x: primitive.bind(x, body=jaxpr), X)
