"""Predictions against the real TPU compiler, on programs that compile in seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json
from stowax.experiments import tpu_estimates
tpu_estimates.prepare()
import jax, jax.numpy as jnp
import stowax as sx
from stowax import memory_planner

def shaped(*shape, dtype=jnp.bfloat16, kind="device"):
    sharding = tpu_estimates.sharding("v5e").with_memory_kind(kind)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def layers(x, ws, wrap=lambda f: f):
    body = wrap(lambda x, w: (x + jnp.tanh(x @ w) @ w.T, None))
    return jnp.sum(jax.lax.scan(body, x, ws)[0])

def remat(x, ws):
    return layers(x, ws, lambda f: jax.checkpoint(f, prevent_cse=False))

def step(ws, x):
    def loss(ws):
        y = x
        for up, down in ws:
            y = y + jax.nn.relu(y @ up) @ down
        return jnp.mean(y.astype(jnp.float32) ** 2)

    return jax.tree.map(lambda w, g: w - 0.01 * g, ws, jax.grad(loss)(ws))

def append(cache, row, index):
    cache = jax.lax.dynamic_update_slice(cache, row, (0, index, 0))
    return cache, jnp.einsum("bsd,bd->bs", cache, row[:, 0])

def update(ws, state, x):
    grads = jax.grad(lambda ws: layers(x, ws))(ws)
    speed = {"m": 0.9 * state["m"] + grads}
    return ws - 0.1 * speed["m"], speed

stack, state = shaped(16, 2048, 2048), {"m": shaped(16, 2048, 2048, kind="pinned_host")}
x, ws = shaped(32768, 2048), shaped(6, 2048, 2048)
PROGRAMS = {
    "scan": (jax.grad(layers, 1), (x, ws), ()),
    "remat": (jax.grad(remat, 1), (x, ws), ()),
    "step": (step, ([(shaped(2048, 8192), shaped(8192, 2048))], x), (0,)),
    "update": (sx.offload(update, optimizer="host"), (stack, state, shaped(2048, 2048)), (0, 1)),
    "cache": (append, (shaped(32, 8192, 1024), shaped(32, 1, 1024), shaped(dtype=jnp.int32)), (0,)),
}

def peaks(fn, args, donate):
    compiled = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
    predicted = memory_planner.predict(fn, *args, donate=donate, device="v5e")
    given = predicted.arguments + predicted.outputs
    return given, predicted.peak, memory_planner.live_peak(compiled)

print(json.dumps({name: peaks(*program) for name, program in PROGRAMS.items()}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
def test_the_tpu_compiler_agrees():
    """In a process of its own: libtpu may be loaded once in each, and a crash of it is an error here."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    errors = {name: predicted / xla - 1 for name, (_, predicted, xla) in peaks.items()}
    assert max(map(abs, errors.values())) <= 0.1, errors
    assert sorted(map(abs, errors.values()))[len(errors) // 2] <= 0.03, errors
    assert any(xla > 1.5 * given for given, _, xla in peaks.values())
