"""The rules of prediction, one small program each, with bytes counted by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from stowax import memory_planner
from stowax.memory_planner import PLAIN, predict

MIB = 2**20
SQUARE = jax.ShapeDtypeStruct((512, 512), jnp.float32)  # 1 MiB
HALF = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)  # 1/2 MiB


def temporaries(fn, *args, **options):
    """In MiB."""
    return predict(fn, *args, device="v5e", **options).temporaries / MIB


def test_arguments_and_outputs():
    found = predict(lambda x, y: (x @ y, x + 1.0), SQUARE, SQUARE)
    assert (found.arguments, found.outputs, found.temporaries) == (2 * MIB, 2 * MIB, 0)
    assert found.peak == 4 * MIB
    assert found.fits


def test_a_donated_argument_takes_an_output():
    fn = lambda x, y: (x + y, y @ y)
    found = predict(fn, SQUARE, SQUARE, donate=0)
    assert (found.arguments, found.outputs, found.temporaries) == (2 * MIB, MIB, 0)


def test_an_output_waits_until_its_donated_argument_was_read():
    fn = lambda x, y: (x @ y, x @ x @ y)
    both = predict(fn, SQUARE, SQUARE, donate=0)
    assert both.temporaries > predict(fn, SQUARE, SQUARE).temporaries


def test_elementwise_operations_are_fused():
    fn = lambda x: jnp.sum(jnp.sin(x) * jnp.cos(x) + 1.0, axis=0)
    assert temporaries(fn, SQUARE) < 0.01
    assert temporaries(fn, SQUARE, rules=PLAIN) == 3


def test_a_product_is_written_with_what_follows_it_at_the_narrowest_dtype():
    def fn(x, y):
        z = jnp.tanh((x @ y).astype(jnp.float32))
        return z @ z.T, z * 2.0

    assert temporaries(fn, HALF, HALF) == 0.5


def test_what_reads_too_many_arrays_is_written():
    def fn(n, *arrays):
        x = functools.reduce(jnp.multiply, arrays[:n])
        return x.sum(0), x @ arrays[-1]

    arrays = [SQUARE] * 4
    assert temporaries(functools.partial(fn, 2), *arrays) < 0.01
    # Rounded to bfloat16: only a product, and a sum made along with it, read it.
    assert temporaries(functools.partial(fn, 3), *arrays) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("queries", "row", "expected"),
    [(1024, 1024, 1), (512, 4096, 1), (4096, 4096, 2), (512, 16384, 1)],
)
def test_softmax_is_fused_as_far_as_its_rows_fit(queries, row, expected):
    def fn(q, k, v):
        return jax.nn.softmax(q @ k, axis=-1) @ v

    q = jax.ShapeDtypeStruct((queries, 64), jnp.float32)
    k = jax.ShapeDtypeStruct((64, row), jnp.float32)
    v = jax.ShapeDtypeStruct((row, 64), jnp.float32)
    assert temporaries(fn, q, k, v) * MIB == pytest.approx(expected * queries * row * 4, rel=0.02)


def test_a_cache_is_updated_in_place_only_if_donated():
    def fn(cache, row):
        return jax.lax.dynamic_update_slice(cache, row, (3, 0))

    row = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    kept, donated = predict(fn, SQUARE, row), predict(fn, SQUARE, row, donate=0)
    assert kept.peak - donated.peak == MIB
    assert donated.temporaries == 0


def test_a_scan_keeps_a_stack_for_each_residual():
    def loss(ws, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    ws = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)  # 8 MiB
    plain = temporaries(jax.grad(loss), ws, x)
    assert 2 * 8 * 8 <= plain <= 2 * 8 * 8 + 3 * 8

    def rematerialized(ws, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    assert temporaries(jax.grad(rematerialized), ws, x) <= plain - 8 * 8


def test_recomputation_behind_a_barrier_is_not_merged():
    def loss(ws, x, wrap):
        for w in ws:
            x = wrap(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))(x, w)
        return x.sum()

    ws = [SQUARE] * 6
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    grad = lambda wrap: temporaries(jax.grad(functools.partial(loss, wrap=wrap)), ws, x)
    assert grad(jax.checkpoint) < grad(lambda f: f)


def test_casts_of_scanned_weights_are_made_once():
    def fn(ws, x):
        body = lambda x, w: (x + x @ w.astype(jnp.bfloat16), None)
        return jax.lax.scan(body, x, ws)[0]

    ws = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    found = predict(fn, ws, HALF)
    assert "args[0].cast" in [b.name for b in found.at_peak]
    assert {b.name: b.nbytes for b in found.at_peak}["args[0].cast"] == 4 * MIB


def test_take_along_axis_and_its_gradient_need_no_array_of_its_own():
    def loss(logits, targets):
        return jnp.take_along_axis(logits, targets[:, None], axis=1).sum()

    targets = jax.ShapeDtypeStruct((512,), jnp.int32)
    assert temporaries(jax.grad(loss), SQUARE, targets) < 0.01


def test_host_values_take_no_device_memory():
    def fn(x):
        y = jax.device_put(x @ x, jax.memory.Space.Host)
        return y

    found = predict(fn, SQUARE)
    assert found.outputs == 0
    assert found.temporaries == MIB


def test_an_update_runs_when_its_gradient_is_there():
    def step(ws, x):
        grads = jax.grad(lambda ws: jnp.sum(functools.reduce(jnp.matmul, ws, x)))(ws)
        return [w - 0.1 * g for w, g in zip(ws, grads)]

    ws = [SQUARE] * 12
    row = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    assert temporaries(step, ws, row, donate=0) < 3


def test_the_timeline_and_the_table():
    found = predict(lambda x: jnp.sin(x @ x) @ jnp.cos(x @ x.T), SQUARE, device="v5e")
    assert max(m.nbytes for m in found.timeline) == found.peak
    assert [m.op for m in found.timeline][-1] == "dot_general"
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["arguments", "1.00", "MiB"]
    assert "of v5e" in lines[3]
    assert "float32[512,512]" in lines[4]


def test_buffers_lie_beside_each_other_within_the_peak():
    def fn(x):
        y = x @ x
        for _ in range(4):
            y = jnp.tanh(y @ x) @ y
        return y

    found = predict(fn, SQUARE, device="v5e")
    offsets = found.offsets(found.temporaries)
    placed = [(b, o) for b, o in zip(found.buffers, offsets, strict=True) if b.nbytes]
    assert all(o + b.nbytes <= found.temporaries for b, o in placed)
    for (a, x), (b, y) in itertools.combinations(placed, 2):
        apart = a.end <= b.start or b.end <= a.start
        assert apart or x + a.nbytes <= y or y + b.nbytes <= x
    with pytest.raises(memory_planner.PackingError):
        found.offsets(found.temporaries - 1)


def test_a_measurement_corrects_the_program_and_its_variants():
    loss = lambda x: jnp.sum(jnp.sin(x @ x) @ jnp.cos(x @ x.T))
    found = predict(jax.grad(loss), SQUARE)
    measured = found.arguments + found.outputs + round(1.25 * found.temporaries)
    corrected = found.corrected(measured)
    assert corrected.peak == measured
    assert corrected.correction == pytest.approx(1.25)
    variant = predict(jax.grad(jax.checkpoint(loss)), SQUARE, correction=corrected.correction)
    assert variant.temporaries == pytest.approx(
        1.25 * predict(jax.grad(jax.checkpoint(loss)), SQUARE).temporaries
    )
    report = memory_planner.memory_report(jax.jit(jax.grad(loss)).lower(SQUARE).compile())
    assert found.corrected(report).peak == report.peak
    with pytest.raises(ValueError, match=r"peak of 1.00 KiB.*alone take 2.00 MiB"):
        found.corrected(1024)


def test_live_peak_is_at_most_what_is_allocated():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(SQUARE).compile()
    report = memory_planner.memory_report(compiled)
    assert 2 * MIB <= memory_planner.live_peak(compiled) <= report.peak


@pytest.mark.parametrize("device", ["h100", "cpu", memory_planner.device("v6e")])
def test_every_backend_has_rules(device):
    assert predict(lambda x: x @ x, SQUARE, device=device).peak == 2 * MIB


def test_errors():
    with pytest.raises(ValueError, match="known devices"):
        predict(jnp.sin, SQUARE, device="abacus")
    with pytest.raises(ValueError, match=r"`backend` is 'npu'; there are rules for tpu, gpu, cpu"):
        memory_planner.rules_for("npu")
