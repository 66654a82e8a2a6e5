"""A decode step of a Llama of the shape of 8 billion parameters, rewritten: milliseconds and bytes.

  python -m stowax.experiments.bench_decode --layers=8
  python -m stowax.experiments.bench_decode --layers=8 --context=32768 --specs=int4-g128-sym --caches=int8,int4-g64,kv4

The first line is the model as it is, in bfloat16; then each codec of weights with the model's own cache; then each
method of caches with the first codec. A step has the sampling of a token in it; it is timed waited for, in flight
(calls that nothing waits for), and in a loop on the device. Random weights and rows: it times, it does not judge. One
H100, 2 minutes; what to expect is in docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.experiments import kv_methods, sizes
from stowax.experiments.results import write_json
from stowax.transforms.report import counted, text_table

LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the 32.")
BATCH = flags.DEFINE_integer("batch", 1, "Rows of the batch, a token each.")
CONTEXT = flags.DEFINE_integer(
    "context", 256, "Tokens that the cache has room for, nearly all used."
)
SPECS = flags.DEFINE_list(
    "specs", ["int8", "int4-g128-sym", "int4-g128"], "Codecs of the linear layers."
)
CACHES = flags.DEFINE_list("caches", [], "Methods of caches, by the names of kv_methods.")
SCAN = flags.DEFINE_bool("scan", True, "Stack the layers and scan over them, or write them out.")
STEPS = flags.DEFINE_integer("steps", 15, "Steps that are timed.")
OUT = flags.DEFINE_string("out", "", "JSON file for the results; none by default.")

ROUNDS = 5  # of steps in flight, and of loops
HEADER = (
    "linear layers",
    "caches",
    "weights, MB",
    "caches, MB",
    "ms a step",
    "of bf16",
    "in flight",
    "of bf16",
    "in a loop",
    "of bf16",
    "paths",
)


def filled(cache: Any) -> Any:
    """A cache as after a long text: rows at random, and the next token's position near the end."""

    def fill(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return jnp.full(x.shape, CONTEXT.value - (2 * ROUNDS + 3) * STEPS.value - 1, x.dtype)
        key = jax.random.key(x.size % 97)
        if x.dtype == jnp.uint8:
            return jax.random.bits(key, x.shape, jnp.uint8)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.uniform(key, x.shape, jnp.float32, 0.01, 0.02).astype(x.dtype)
        return x

    return jax.tree.map(fill, cache)


def step_ms(step: Any, params: Any, cache: Any, token: jax.Array) -> tuple[float, float, float]:
    """Medians of a step that is waited for, of one of many in flight, and of one in a loop on the device.

    Each takes the token that the one before sampled. The cache is donated.
    """

    def sampled(params: Any, token: jax.Array, cache: Any) -> Any:
        logits, cache = step(params, token, cache)
        return jnp.argmax(logits, -1).astype(token.dtype).reshape(token.shape), cache

    def looped(params: Any, token: jax.Array, cache: Any) -> Any:
        one = lambda _, carry: sampled(params, *carry)
        return jax.lax.fori_loop(0, STEPS.value, one, (token, cache))

    def seconds(run: Any, count: int) -> float:
        nonlocal token, cache
        start = time.perf_counter()
        for _ in range(count):
            token, cache = run(params, token, cache)
        jax.block_until_ready(token)
        return time.perf_counter() - start

    def median_ms(run: Any, count: int, steps: int, times: int) -> float:
        """Of so many calls in flight, `steps` in all, so many times after the first."""
        found = [seconds(run, count) for _ in range(1 + times)]
        return 1e3 * statistics.median(found[1:]) / steps

    n, (run, loop) = STEPS.value, (jax.jit(f, donate_argnums=2) for f in (sampled, looped))
    return median_ms(run, 1, 1, n), median_ms(run, n, n, ROUNDS), median_ms(loop, 1, n, ROUNDS)


@dataclasses.dataclass(frozen=True)
class Result:
    spec: str
    method: str
    weights: int
    caches: int
    ms: float
    in_flight: float
    in_loop: float
    paths: str

    def row(self, base: Result) -> tuple[str, ...]:
        megabytes = lambda n: f"{n / 1e6:,.0f}"
        sizes = megabytes(self.weights), megabytes(self.caches)
        ways = ("ms", "in_flight", "in_loop")
        times = [(getattr(self, way), getattr(self, way) / getattr(base, way)) for way in ways]
        return (self.spec, self.method, *sizes, *(f"{t:.2f}" for t in sum(times, ())), self.paths)


def measure(functions: Any, params: Any, token: jax.Array, spec: str, method: str) -> Result:
    shapes = jax.eval_shape(lambda: functions.init_cache(BATCH.value, CONTEXT.value))
    size = memory_planner.tree_nbytes
    if not spec:
        cache = filled(functions.init_cache(BATCH.value, CONTEXT.value))
        times = step_ms(functions.step, params, cache, token)
        return Result("bf16", "model's own", size(params), size(shapes), *times, "")
    parts: list[Any] = [sx.quantize({"embed|norm": None, "": spec})]
    if method:
        parts.append(sx.compress_kv(kv_methods.get(method)))
    apply = sx.chain(*parts)
    fast = apply(functions.step, params=0, cache=2 if method else ())
    packed = fast.encode(params, token, shapes)
    cache = functions.init_cache(BATCH.value, CONTEXT.value)
    cache = filled(fast.init_cache(shapes, packed, token) if method else cache)
    table = fast.explain(packed, token, cache)
    uses = [use.how for row in table.rows for use in row.uses if use.op == "matmul" and use.how]
    caches = table.caches.rows if table.caches is not None else []
    sites = [site.path for row in caches for site in row.sites]
    paths = "; ".join(filter(None, (counted(uses, "; "), counted(sites, "; "))))
    nbytes = size(packed), size(cache)
    times = step_ms(fast, packed, cache, token)
    return Result(spec, method or "model's own", *nbytes, *times, paths)


def main(_: list[str]) -> None:
    c = sizes.llama8b(LAYERS.value)
    functions = models.functions(c, scan=SCAN.value)
    params, token = sizes.random_params(c, SCAN.value), jnp.ones((BATCH.value, 1), jnp.int32)
    cases = [
        ("", ""),
        *((s, "") for s in SPECS.value),
        *((SPECS.value[0], m) for m in CACHES.value),
    ]
    found: list[Result] = []
    for spec, method in cases:
        found.append(measure(functions, params, token, spec, method))
        print("  ".join(found[-1].row(found[0])), flush=True)
    print(text_table(HEADER, [r.row(found[0]) for r in found]))
    if OUT.value:
        settings = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        settings |= {"layers": LAYERS.value, "batch": BATCH.value, "context": CONTEXT.value}
        rows = [dataclasses.asdict(r) for r in found]
        write_json(Path(OUT.value), {**settings, "scan": SCAN.value, "rows": rows})


if __name__ == "__main__":
    app.run(main)
