"""Devices as data, their calibration, and what the roofline makes of them."""

import json

import jax
import jax.numpy as jnp
import pytest

from stowax import memory_planner
from stowax.memory_planner import device, op_seconds, seconds, trace


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "v5e", "v6e", "cpu"])
def test_every_device_is_complete(name):
    found = device(name)
    assert found.name == name
    assert found.source
    assert found.backend in ("gpu", "tpu", "cpu")
    assert memory_planner.rules_for(found.backend).source
    assert found.hbm_bytes >= 2**34 * 0.9
    assert 0 < found.from_host <= found.bandwidth
    assert all(rate > 0 for rate in found.flops.values())
    assert found.peak(jnp.bfloat16) >= found.peak(jnp.float32)


def test_rates_widen_to_what_the_device_has():
    a100, v5e = device("a100"), device("v5e")
    assert a100.peak(jnp.float8_e4m3fn) == a100.peak(jnp.bfloat16)
    assert a100.peak(jnp.int4) == 2 * a100.peak(jnp.int8)
    assert v5e.peak(jnp.int4) == v5e.peak(jnp.int8) == 2 * v5e.peak(jnp.bfloat16)
    assert device("h100").peak(jnp.float8_e5m2) == device("h100").peak(jnp.int8)


def test_measured_figures_replace_published_ones(tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"bandwidth": 2.8e12, "flops": {"bfloat16": 6.6e14}}))
    found = device("h100", path)
    assert found.bandwidth == 2.8e12
    assert found.peak(jnp.bfloat16) == 6.6e14
    assert found.peak(jnp.int8) == device("h100").peak(jnp.int8)
    assert "measured: bandwidth, flops" in found.source


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"bandwith": 1.0}, r"`measured` has \['bandwith'\]; a device has"),
        ({"bandwidth": -1.0}, r"positive numbers, which these are not: \['bandwidth'\]"),
        ({"flops": {"int8": "fast"}}, r"positive numbers, which these are not: \['int8'\]"),
        ({"flops": 3.0}, "`flops` is 3.0"),
        ("missing.json", "missing.json can't be read as JSON"),
    ],
)
def test_errors_of_measurements(measured, message):
    with pytest.raises(ValueError, match=message):
        device("v5e", measured)


def test_an_unknown_device():
    with pytest.raises(ValueError, match="`name` is 'h999'; known devices: h100, h200"):
        device("h999")


def test_a_product_is_bound_by_flops_or_by_bytes():
    v5e = device("v5e")
    large = trace(lambda x: x @ x, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    assert seconds(large, v5e) == pytest.approx(2 * 4096**3 / v5e.peak(jnp.bfloat16))
    thin = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    matrix = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    moved = 2 * (4096 + 4096**2 + 4096)
    assert seconds(trace(jnp.dot, thin, matrix), v5e) == pytest.approx(moved / v5e.bandwidth)


def test_loops_count_every_trip_and_fused_values_no_bytes():
    v5e = device("v5e")
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    once = trace(lambda x: jnp.sin(x) + 1.0, x)
    loop = trace(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) + 1.0, None), x, length=7)[0], x)
    assert seconds(loop, v5e) == pytest.approx(7 * seconds(once, v5e))
    assert seconds(once, v5e) == pytest.approx(4 * x.size * 4 / v5e.bandwidth)
    assert seconds(once, v5e, {*once.inputs, *once.outputs}) == pytest.approx(
        2 * x.size * 4 / v5e.bandwidth
    )


def test_transfers_use_the_host_link():
    v5e = device("v5e")
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    graph = trace(lambda x: jax.device_put(x, jax.memory.Space.Host), x)
    assert op_seconds(graph.ops[0], v5e) == pytest.approx(x.size * 4 / v5e.to_host)


def test_of_a_slice_only_the_slice_is_read():
    v5e = device("v5e")
    stack = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    graph = trace(lambda s, i: jax.lax.dynamic_index_in_dim(s, i, keepdims=False), stack, 0)
    (op,) = (op for op in graph.ops if op.name == "dynamic_slice")
    assert op_seconds(op, v5e) < 4 * 1024 * 4 / v5e.bandwidth
