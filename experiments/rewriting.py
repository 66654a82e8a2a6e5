"""How long the rewriting takes, against the tracing of the model that comes before it.

  python -m stowax.experiments.rewriting

Three forms of one model: the layers unrolled, each layer under its own jit, and scanned; weights in 4 bits
(`quantize`), then a decode step with a cache in 4 bits (`compress_kv`). Expected: rewriting weights takes no longer
than tracing when unrolled, and well under 60 ms in the other forms (2 cores, 30 layers); for caches see `docs/kv.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

import stowax as sx
from stowax import models
from stowax.models.llama import rope_angles
from stowax.transforms.core import Interpreter, trace
from stowax.transforms.report import text_table

LAYERS = flags.DEFINE_integer(
    "layers", 30, "Layers of the model; the other sizes are SmolLM2-135M's."
)

HEADER = ("layers", "equations", "trace ms", "rewrite ms")
FORMS = ("unrolled", "jit", "scanned")


def measure(config: models.LlamaConfig, form: str, repeats: int = 3) -> dict[str, Any]:
    """Median milliseconds to trace the model in a form, and to rewrite the trace; both in a warm process."""
    shapes = jax.eval_shape(lambda: models.init_params(config, scan=form == "scanned"))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    transform = sx.quantize({"embed": None, "": "int4-g64"})
    encoded = transform(forward_of(config, form)).encode(shapes, tokens)
    times = [_trace_and_rewrite(config, form, encoded, tokens) for _ in range(repeats + 1)]
    traced, rewritten, count = zip(*times[1:])  # the first round warms up
    return {
        "form": form,
        "equations": count[0],
        "trace_ms": statistics.median(traced),
        "rewrite_ms": statistics.median(rewritten),
    }


def _trace_and_rewrite(
    config: models.LlamaConfig, form: str, encoded: Any, tokens: Any
) -> tuple[float, float, int]:
    forward = forward_of(config, form)
    start = time.perf_counter()
    program = trace(forward, (encoded, tokens), {}, (0,))
    traced = time.perf_counter()

    def rewritten(*leaves: Any) -> list[Any]:
        return Interpreter(strict=True).run_arrays(None, program.jaxpr, leaves)

    jax.make_jaxpr(rewritten)(*program.leaves)
    end = time.perf_counter()
    return 1e3 * (traced - start), 1e3 * (end - traced), len(program.jaxpr.eqns)


def measure_cache(config: models.LlamaConfig, form: str, repeats: int = 3) -> dict[str, Any]:
    """As `measure`, for `compress_kv` on a decode step; what is rewritten is found anew each time."""
    scan = form == "scanned"
    params = jax.eval_shape(lambda: models.init_params(config, scan=scan))
    own = jax.eval_shape(lambda: models.functions(config, scan=scan).init_cache(1, 2048))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    transform = sx.compress_kv(sx.recipes.kv4())
    fast = lambda: transform(step_of(config, form), params=0, cache=2)
    cache = jax.eval_shape(lambda: fast().init_cache(own, params, tokens))
    plain = [_milliseconds(step_of(config, form), params, tokens, own) for _ in range(repeats + 1)]
    whole = [_milliseconds(fast(), params, tokens, cache) for _ in range(repeats + 1)]
    traced, both = (statistics.median(ms for ms, _ in times[1:]) for times in (plain, whole))
    return {
        "form": form,
        "equations": plain[0][1],
        "trace_ms": traced,
        "rewrite_ms": both - traced,
    }


def _milliseconds(fn: Callable[..., Any], *args: Any) -> tuple[float, int]:
    """To trace `fn` (of the processor: others may be using it too), and the number of its equations."""
    start = time.process_time()
    jaxpr = jax.make_jaxpr(fn)(*args)
    return 1e3 * (time.process_time() - start), len(jaxpr.eqns)


def step_of(config: models.LlamaConfig, form: str) -> Callable[..., Any]:
    """A decode step; a new function object each time."""
    if form == "jit":
        return _jit_step(config)
    inner = models.functions(config, scan=form == "scanned").step
    return lambda params, tokens, cache: inner(params, tokens, cache)


def _jit_step(config: models.LlamaConfig) -> Callable[..., Any]:
    model: Any = nnx.eval_shape(lambda: models.Llama(config, scan=False, rngs=nnx.Rngs(0)))
    whole, block = nnx.split(model)[0], nnx.split(model.layers["0"])[0]

    @jax.jit
    def layer(params: Any, x: jax.Array, rope: Any, index: jax.Array, cache: Any) -> Any:
        return nnx.merge(block, params)(x, rope, index, cache)

    def step(params: Any, tokens: jax.Array, cache: Any) -> Any:
        model, index, after = nnx.merge(whole, params), cache["index"], {}
        x, rope = model.embed(tokens), rope_angles(config, index, tokens.shape[1])
        for i, own in cache["layers"].items():
            x, after[i] = layer(params["layers"][i], x, rope, index, own)
        logits = model.logits(model.final_norm(x))
        return logits, {"index": index + tokens.shape[1], "layers": after}

    return step


def forward_of(config: models.LlamaConfig, form: str) -> Callable[..., jax.Array]:
    """A new function object each time, so that no cache of JAX's answers for the trace."""
    if form == "jit":
        return _jit_layers(config)
    inner = models.functions(config, scan=form == "scanned").forward
    return lambda params, tokens: inner(params, tokens)


def _jit_layers(config: models.LlamaConfig) -> Callable[..., jax.Array]:
    model: Any = nnx.eval_shape(lambda: models.Llama(config, scan=False, rngs=nnx.Rngs(0)))
    whole, block = nnx.split(model)[0], nnx.split(model.layers["0"])[0]

    @jax.jit
    def layer(params: Any, x: jax.Array, rope: Any) -> jax.Array:
        return nnx.merge(block, params)(x, rope, jnp.int32(0))[0]

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(whole, params)
        x, rope = model.embed(tokens), rope_angles(config, jnp.int32(0), tokens.shape[1])
        for i in range(config.layers):
            x = layer(params["layers"][str(i)], x, rope)
        return model.logits(model.final_norm(x))

    return forward


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (r["form"], r["equations"], f"{r['trace_ms']:.0f}", f"{r['rewrite_ms']:.0f}") for r in rows
    ]
    return text_table(HEADER, cells)


def smollm2(layers: int = 30) -> models.LlamaConfig:
    """The sizes of SmolLM2-135M."""
    return models.LlamaConfig(
        vocab_size=49152, dim=576, layers=layers, heads=9, kv_heads=3, head_dim=64, ffn_dim=1536
    )


def main(_: list[str]) -> None:
    for what, how in (("quantize", measure), ("compress_kv", measure_cache)):
        print(what)
        print(table([how(smollm2(LAYERS.value), form) for form in FORMS]))


if __name__ == "__main__":
    app.run(main)
