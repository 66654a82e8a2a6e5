"""Decode with the weights in host memory: milliseconds a step against what the link to the host allows.

  python -m stowax.experiments.bench_stream --layers=16

A Llama of the shape of 8 billion parameters, scanned, random weights in bfloat16 (`--spec` packs them first). The floor
is the bytes on the host over the measured rate of one large copy. Writes out/bench_stream.json. One H100: 2 minutes;
what to expect is in docs/plans.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.experiments import sizes
from stowax.experiments.kernel_timing import median_seconds
from stowax.experiments.results import write_json
from stowax.transforms.report import text_table

LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the 32.")
BATCH = flags.DEFINE_integer("batch", 1, "Rows of the batch, a token each.")
SPECS = flags.DEFINE_list("specs", ["", "int8", "int4-g128-sym"], "Codecs; '' is bfloat16.")
DIM = flags.DEFINE_integer("dim", 4096, "Width; the other sizes follow.")
STEPS = flags.DEFINE_integer("steps", 5, "Steps that are timed.")
OUT = flags.DEFINE_string("out", "out/bench_stream.json", "Results.")

HEADER = ("weights", "on host, MB", "device, MB", "ms a step", "floor, ms", "of the link")


def link_bytes_per_second() -> float:
    """Of one large copy from host to device memory, inside a program as the steps have it."""
    host = jax.device_put(jnp.ones((1 << 30,), jnp.uint8), jax.memory.Space.Host)
    copy = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device) + jnp.uint8(0))
    return host.nbytes / median_seconds(lambda: copy(host), STEPS.value)


def measure(spec: str, functions: Any, link: float) -> dict[str, Any]:
    params, step = sizes.random_params(sizes.llama8b(LAYERS.value, DIM.value)), functions.step
    token, cache = jnp.ones((BATCH.value, 1), jnp.int32), functions.init_cache(BATCH.value, 256)
    if spec:
        step = sx.quantize({"embed|norm": None, "": spec})(step, params=0)
        params = step.encode(params, token, cache)
    streamed = sx.offload(step, weights="host")
    host = jax.block_until_ready({**params, "layers": streamed.place(params["layers"])})
    del params
    compiled = jax.jit(streamed).lower(host, token, cache).compile()
    seconds = median_seconds(lambda: compiled(host, token, cache), STEPS.value)
    report = memory_planner.memory_report(compiled)
    moved = memory_planner.tree_nbytes(host["layers"])
    return {
        "spec": spec or "bfloat16",
        "host_bytes": moved,
        "device_bytes": report.peak,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * moved / link,
        "share": moved / link / seconds,
    }


def main(_: list[str]) -> None:
    link = link_bytes_per_second()
    print(f"link: {link / 1e9:.1f} GB/s", flush=True)
    functions = models.functions(sizes.llama8b(LAYERS.value, DIM.value))
    rows = []
    for spec in SPECS.value:
        rows.append(measure(spec, functions, link))
        print(rows[-1], flush=True)
    megabytes = lambda n: f"{n / 1e6:,.0f}"
    cells = [
        (r["spec"], megabytes(r["host_bytes"]), megabytes(r["device_bytes"]), f"{r['ms']:.1f}", f"{r['floor_ms']:.1f}",
         f"{r['share']:.0%}")
        for r in rows
    ]  # fmt: skip
    print(text_table(HEADER, cells))
    settings = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "link": link}
    write_json(Path(OUT.value), settings | {"layers": LAYERS.value, "rows": rows})


if __name__ == "__main__":
    app.run(main)
