"""Attention of a long prompt with a compressed cache on a GPU: the library's kernel against replay, and cuDNN alone.

  python -m stowax.experiments.bench_prefill --tokens=8192,32768

Expected on one H100, 32 query and 8 KV heads of 128: 32,768 tokens in 14.7 ms (cuDNN alone 13.3, replayed 370).
Half a minute; writes out/bench_prefill.json.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax

import stowax as sx
from stowax.models.llama import attend
from stowax.pallas_kernels.codecs import LayoutError
from stowax.transforms.kv import prefill
from stowax.transforms.report import text_table

from . import kv_methods
from .kernel_timing import median_seconds
from .results import write_json

TOKENS = flags.DEFINE_list(
    "tokens", ["8192", "32768"], "Of the prompt; the cache has room for so many."
)
METHOD = flags.DEFINE_string("method", "kivi4", "How the cache is kept: one of `kv_methods`.")
HEADS = flags.DEFINE_string("heads", "32x8x128", "Query heads x heads of the cache x elements.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of which the median is taken.")
OUT = flags.DEFINE_string("out", "out/bench_prefill", "Where the JSON goes.")

HEADER = ("tokens", "what", "ms", "error against replay")


def step(params: Any, rows: Any, cache: Any) -> Any:
    """One layer's attention: new rows of q, k and v are given."""
    q, k, v = rows
    index = cache["index"]
    write = lambda c, new: lax.dynamic_update_slice(c, new, (0, index, 0, 0))
    k, v = write(cache["k"], k), write(cache["v"], v)
    return attend(q, k, v, index), {"k": k, "v": v, "index": index + q.shape[1]}


def measure(tokens: int) -> list[dict[str, Any]]:
    n, k, h = map(int, HEADS.value.split("x"))
    rows = [
        jax.random.normal(jax.random.key(i), (1, tokens, heads, h), jnp.bfloat16)
        for i, heads in enumerate((n, k, k))
    ]
    shape = jax.ShapeDtypeStruct((1, tokens, k, h), jnp.bfloat16)
    empty = {"k": shape, "v": shape, "index": jax.ShapeDtypeStruct((), jnp.int32)}
    fast = sx.compress_kv(kv_methods.METHODS[METHOD.value]())(step, params=0, cache=2)
    cache = fast.init_cache(empty, None, [x[:, :1] for x in rows])
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    ms = milliseconds(jax.jit(cudnn), *rows)[0]
    found = [{"tokens": tokens, "what": "cuDNN alone, causal, bf16", "ms": ms}]
    behind = {**cache, "index": jnp.int32(tokens // 2)}
    half = [x[:, tokens // 2 :] for x in rows]
    for what, x, held in (("into an empty cache", rows, cache), ("its second half", half, behind)):
        run = jax.jit(lambda *a: fast(None, *a)[0])
        ms, got = milliseconds(run, x, held)
        with mock.patch.object(prefill, "form", side_effect=LayoutError("for comparison")):
            replay_ms, want = milliseconds(jax.jit(lambda *a: fast(None, *a)[0]), x, held)
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        found += [
            {"tokens": tokens, "what": what, "ms": ms, "error": error},
            {"tokens": tokens, "what": f"{what}, replayed", "ms": replay_ms},
        ]
    return found


def milliseconds(run: Any, *args: Any) -> tuple[float, jax.Array]:
    """Of a run, and its result in float32."""
    out = run(*args)
    ms = 1e3 * median_seconds(lambda: run(*args), REPEATS.value, warm=1)
    return ms, out.astype(jnp.float32)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = f"{row['error']:.1e}" if "error" in row else ""
    return str(row["tokens"]), row["what"], f"{row['ms']:.2f}", error


def main(_: list[str]) -> None:
    device, rows = jax.devices()[0], []
    for tokens in map(int, TOKENS.value):
        rows += measure(tokens)
        print(text_table(HEADER, list(map(cells, rows))), flush=True)
        content = {"device": device.device_kind, "jax": jax.__version__, "method": METHOD.value}
        write_json(Path(OUT.value + ".json"), {**content, "heads": HEADS.value, "rows": rows})


if __name__ == "__main__":
    app.run(main)
