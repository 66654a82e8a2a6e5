"""Liveness against a simulator that knows nothing of spans."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp

from stowax import memory_planner
from stowax.memory_planner import PLAIN, predict, trace

SIZES = st.integers(1, 6)


@st.composite
def programs(draw):
    """A function of arrays of several sizes, and the sizes: sums of, and slices from, what there is."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=3))
    steps = draw(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), SIZES), min_size=1, max_size=12)
    )
    returned = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    in_loop = draw(st.booleans())

    def straight(*arrays):
        values = list(arrays)
        for a, b, size in steps:
            left, right = values[a % len(values)], values[b % len(values)]
            values.append(jnp.resize(jnp.sin(left), size) * jnp.sum(right))
        return [values[i % len(values)] for i in returned]

    def looped(*arrays):
        body = lambda carry, _: (carry + 1.0, straight(carry, *arrays))
        return jax.lax.scan(body, arrays[0], length=3)

    return (looped if in_loop else straight), [
        jax.ShapeDtypeStruct((s,), jnp.float32) for s in sizes
    ]


def simulate(block, kept):
    """The most bytes alive: runs the operations, and after each one drops what nobody reads later."""
    alive, most = {}, 0
    views = {"reshape", "squeeze", "transpose", "copy"}
    base = {}  # a view stands for what it shows
    for i, op in enumerate(block.ops):
        if op.name in views:
            base[op.outputs[0]] = base.get(op.inputs[0], op.inputs[0])
            continue
        alive.update({v: v.nbytes for v in op.outputs if v not in kept})
        inner = 0
        if op.name == "scan":
            (body,) = op.blocks
            inner = simulate(body, set(stacked(body, op.carries, views)))
        most = max(most, sum(alive.values()) + inner)
        ahead = [v for later in block.ops[i + 1 :] for v in later.inputs] + list(block.outputs)
        needed = {root(block, v, views) for v in ahead}
        alive = {v: size for v, size in alive.items() if v in needed}
    return most


def root(block, value, views):
    while (op := block.producers.get(value)) is not None and op.name in views:
        value = op.inputs[0]
    return value


def stacked(body, carries, views):
    return [root(body, v, views) for v in body.outputs[carries:]]


@hypothesis.given(programs())
def test_plain_liveness_is_what_a_simulator_finds(program):
    fn, shapes = program
    graph = trace(fn, *shapes)
    kept = {root(graph, v, {"reshape", "squeeze", "transpose", "copy"}) for v in graph.outputs}
    assert predict(graph, rules=PLAIN).temporaries == simulate(graph, kept)


@hypothesis.given(programs())
def test_fusion_and_reuse_need_no_more(program):
    fn, shapes = program
    fused = predict(fn, *shapes, device="v5e")
    assert fused.temporaries <= predict(fn, *shapes, rules=PLAIN).temporaries
    assert fused.peak == fused.arguments + fused.outputs + fused.temporaries
    assert max((m.nbytes for m in fused.timeline), default=fused.peak) == fused.peak
    assert sum(b.nbytes for b in fused.at_peak) == fused.temporaries


def test_predicting_twice_gives_the_same():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    fn = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x @ x) @ jnp.tanh(x)))
    results = {memory_planner.predict(fn, x).peak for _ in range(5)}
    assert len(results) == 1
