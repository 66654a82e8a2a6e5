"""Decode attention over packed caches on a GPU against cuDNN in bf16, XLA on integers, and torch.

Kernel time, the join of parts included, and share of the roofline.

  python -m stowax.experiments.bench_attention --cases=1x2048,1x8192,1x32768,16x8192 --torch
  python -m stowax.experiments.bench_attention --specs=kv4,kv2,kivi4,kivi2 --forms=plain,weights,ragged

Expected on one H100, 32 query and 8 KV heads of 128: int4 18.7 us at 1 x 32k (cuDNN 51), 56 at 16 x 8k (175).
About 3 s for each row; writes out/bench_attention.json and .png.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from stowax.memory_planner import tree_nbytes
from stowax.pallas_kernels import Rows, attention_kernel, decode_attention
from stowax.pallas_kernels.codecs import RowCodec, per_token
from stowax.transforms.report import text_table

from . import kernel_timing, kv_methods, pictures, roofline, torch_peers, xla_peers
from .results import write_json

CASES = flags.DEFINE_list("cases", ["1x2048", "1x8192", "1x32768", "16x8192"], "Batch x tokens.")
SPECS = flags.DEFINE_list(
    "specs",
    ["xla-int8", "xla-int4", "int8", "int4-g64-sym", "int4-g64", "int4-g32"],
    "Row codecs, or methods of `kv_methods`: the codecs of their keys and values; xla-int8 and xla-int4: arrays with "
    "scales (of rows; of groups of 64) in plain JAX.",
)
TORCH = flags.DEFINE_bool("torch", False, "Also torch's flash and cuDNN attention in bf16.")
HEADS = flags.DEFINE_string("heads", "32x8x128", "Query heads x heads of the cache x elements.")
FORMS = flags.DEFINE_list(
    "forms",
    ["plain"],
    "Of ours: plain; weights, which are a result too; ragged: every other head has a tenth of the tokens.",
)
OUT = flags.DEFINE_string("out", "out/bench_attention", "Where the JSON and the picture go.")

HEADER = ("cache", "B x S", "us", "of bf16", "TB/s", "roofline", "bound", "error", "path")


def codecs(spec: str) -> tuple[RowCodec, RowCodec]:
    """Of keys and of values."""
    method = kv_methods.METHODS[spec]() if spec in kv_methods.METHODS else None
    if method is None or method.key is None or method.value is None:
        return per_token(spec), per_token(spec)
    return method.key, method.value


def random_rows(codec: Any, b: int, k: int, s: int, h: int, seed: int) -> Rows:
    """Rows of random codes."""
    keys, bits = jax.random.split(jax.random.key(seed), 3), codec.codec.bits
    parts = {}
    shapes = codec.part_shapes((b, k, s, h))
    for name, shape in shapes.items():
        if shape.dtype == jnp.uint8:
            parts[name] = jax.random.bits(keys[0], shape.shape, jnp.uint8)
        elif name == "scale":
            step = 2.0 ** (1 - bits) if "mean" not in shapes else 1  # rows of about unit size
            x = step * jax.random.uniform(keys[1], shape.shape, jnp.float32, 0.5, 1.5)
            parts[name] = x.astype(shape.dtype)
        elif name == "mean":
            parts[name] = (0.3 * jax.random.normal(keys[2], shape.shape)).astype(shape.dtype)
        else:
            x = jax.random.randint(keys[2], shape.shape, 0, 2**bits)
            parts[name] = x.astype(shape.dtype)
    return Rows(parts, codec, h)


def dense(b: int, k: int, s: int, h: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (b, s, k, h), jnp.bfloat16)


def cudnn(lengths: jax.Array, q: jax.Array, kv: Any) -> jax.Array:
    return jax.nn.dot_product_attention(
        q[:, None], *kv, query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths,
        implementation="cudnn",
    )  # fmt: skip


def ours(lengths: jax.Array, form: str, q: jax.Array, kv: Any) -> tuple[jax.Array, ...]:
    return decode_attention(q, kv[0], kv[1], lengths, weights=form == "weights")


def path(
    spec: str, form: str, sizes: tuple[int, int, int, int], lengths: jax.Array
) -> tuple[Callable[[int], Any], Callable[[jax.Array, Any], Any]]:
    """What makes the keys (of an even seed) or values ``[B, K, S, H]`` of a seed, and what attends to them."""
    if spec == "bf16":
        return lambda seed: dense(*sizes, seed), functools.partial(cudnn, lengths)
    if spec.startswith("xla-"):
        group = sizes[-1] if spec == "xla-int8" else 64
        return lambda seed: xla_peers.rows(spec, group, *sizes, seed), xla_peers.attention
    own = codecs(spec)
    attend = functools.partial(ours, lengths, form)
    return lambda seed: random_rows(own[seed % 2], *sizes, seed), attend


def measure(spec: str, b: int, s: int, form: str = "plain") -> dict[str, Any]:
    """One row of ours or of XLA."""
    n, k, h = map(int, HEADS.value.split("x"))
    q = jax.random.normal(jax.random.key(0), (b, n, h), jnp.bfloat16)
    lengths = jnp.full((b,), s, jnp.int32)
    if form == "ragged":
        short = jnp.arange(k) % 2 == 1
        lengths = jnp.where(short, lengths[:, None] // 10, lengths[:, None])
    make, attend = path(spec, form, (b, k, s, h), lengths)
    pair = lambda i: (make(2 * i), make(2 * i + 1))
    first = pair(0)
    nbytes = tree_nbytes(first)
    sets = [first] + [pair(i) for i in range(1, kernel_timing.copies(nbytes))]
    us = kernel_timing.kernel_us(attend, q, sets)
    row: dict[str, Any] = {
        "spec": spec if form == "plain" else f"{spec}, {form}",
        "b": b,
        "s": s,
        "us": us,
    }
    row["nbytes"] = float(lengths.mean()) / s * nbytes
    if isinstance(first[0], Rows):
        want = decode_attention(q, *first, lengths, implementation="reference")[0]
        got, want = (x.astype(jnp.float32) for x in (jax.jit(attend)(q, first)[0], want))
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        row["path"] = attention_kernel(q, *first)
    return row


def forms(spec: str) -> list[str]:
    return ["plain"] if spec.startswith("xla-") else FORMS.value


def compared(row: dict[str, Any], base: float, limits: roofline.Roofline) -> dict[str, Any]:
    """The row beside bf16, which takes `base` us, and beside what the device can do."""
    if "us" not in row:
        return row
    n, _, h = map(int, HEADS.value.split("x"))
    nbytes, queries = row.pop("nbytes"), row["b"] * n * h
    share = limits.share(row["us"], nbytes + 4 * queries, 4 * queries * row["s"])
    return {**row, "of_bf16": row["us"] / base, "tb_per_s": nbytes / row["us"] / 1e6, **share}


def torch_rows(cases: list[tuple[int, int]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """torch's rows of each case."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {case: [] for case in cases}
    heads = tuple(map(int, HEADS.value.split("x")))
    for row in torch_peers.rows("attention", [c + heads for c in cases]) if TORCH.value else []:
        b, s, *_ = row.pop("case")
        found[b, s].append({"b": b, "s": s, **row})
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda name, form: format(row[name], form) if name in row else ""
    return (
        row["spec"], f"{row['b']} x {row['s']}", number("us", ".1f"), number("of_bf16", ".2f"),
        number("tb_per_s", ".2f"), number("roofline", ".0%"), row.get("bound", ""), number("error", ".1e"),
        row.get("path", row.get("refusal", "")),
    )  # fmt: skip


def main(_: list[str]) -> None:
    cases = [(int(b), int(s)) for b, s in (case.split("x") for case in CASES.value)]
    theirs = torch_rows(cases)
    limits, rows, device = roofline.measured(), [], jax.devices()[0]
    for b, s in cases:
        found = [measure("bf16", b, s)]
        found += [measure(spec, b, s, form) for spec in SPECS.value for form in forms(spec)]
        found += theirs[b, s]
        rows += [compared(row, found[0]["us"], limits) for row in found]
        print("\n".join("  ".join(cells(r)) for r in rows[-len(found) :]), flush=True)
        content = {
            "device": device.device_kind,
            "jax": jax.__version__,
            **vars(limits),
            "heads": HEADS.value,
        }
        write_json(Path(OUT.value + ".json"), {**content, "rows": rows})
    print(text_table(HEADER, list(map(cells, rows))))
    one = [r for r in rows if r["b"] == rows[0]["b"]]
    pictures.times(one, "s", "tokens in the cache", Path(OUT.value + ".png"), device.device_kind)


if __name__ == "__main__":
    app.run(main)
