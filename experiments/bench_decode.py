"""A decode step of a Llama of the shape of 8 billion parameters, rewritten to low-bit weights: milliseconds and bytes.

  python -m stowax.experiments.bench_decode --layers=8

Random weights: it times, it does not judge. Expected on one H100: 4.4 ms in bf16, 1.35 in int8, 1.1 in int4. 30 s.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.transforms.report import counted, text_table

LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the 32.")
BATCH = flags.DEFINE_integer("batch", 1, "Rows of the batch, a token each.")
SPECS = flags.DEFINE_list(
    "specs", ["int8", "int4-g128-sym", "int4-g128"], "Codecs of the linear layers."
)
STEPS = flags.DEFINE_integer("steps", 50, "Steps that are timed.")

HEADER = ("linear layers", "weights, MB", "ms a step", "of bf16", "matmuls")


def config(layers: int) -> models.LlamaConfig:
    return models.LlamaConfig(
        vocab_size=32_000,
        dim=4096,
        layers=layers,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14_336,
    )


def random_params(c: models.LlamaConfig) -> Any:
    shapes = jax.eval_shape(lambda: models.init_params(c))
    draw = lambda s: 0.02 * jax.random.normal(jax.random.key(s.size % 97), s.shape, jnp.bfloat16)
    return jax.tree.map(draw, shapes)


def step_ms(step: Any, params: Any, cache: Any, token: jax.Array) -> float:
    """The median of single steps; the cache is donated."""
    step = jax.jit(step, donate_argnums=2)
    times = []
    for _ in range(5 + STEPS.value):
        start = time.perf_counter()
        logits, cache = step(params, token, cache)
        jax.block_until_ready(logits)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[5:])


def main(_: list[str]) -> None:
    c = config(LAYERS.value)
    functions, params = models.functions(c), random_params(c)
    token = jnp.ones((BATCH.value, 1), jnp.int32)
    cache = lambda: functions.init_cache(BATCH.value, 256, jnp.bfloat16)
    megabytes = lambda tree: f"{memory_planner.tree_nbytes(tree) / 1e6:,.0f}"
    base = step_ms(functions.step, params, cache(), token)
    rows = [("bf16", megabytes(params), f"{base:.2f}", "1.00", "")]
    for spec in SPECS.value:
        fast = sx.quantize({"embed|norm": None, "": spec})(functions.step, params=0)
        packed = fast.encode(params, token, jax.eval_shape(cache))
        ms = step_ms(fast, packed, cache(), token)
        uses = [use for row in fast.explain(packed, token, cache()).rows for use in row.uses]
        how = counted([use.how for use in uses if use.op == "matmul" and use.how], "; ")
        rows.append((spec, megabytes(packed), f"{ms:.2f}", f"{ms / base:.2f}", how))
        print("  ".join(rows[-1]), flush=True)
    print(text_table(HEADER, rows))


if __name__ == "__main__":
    app.run(main)
