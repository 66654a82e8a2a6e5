"""Decode attention over packed caches against cuDNN in bf16 on a GPU: kernel time, the join of parts included.

  python -m stowax.experiments.bench_attention --cases=1x2048,1x8192,1x32768,16x8192
  python -m stowax.experiments.bench_attention --specs=kv4,kv2,kivi4,kivi2 --forms=plain,weights,ragged

Expected on one H100, 32 query and 8 KV heads of 128: int4 20.6 us at 1 x 32k (cuDNN 51), 63 at 16 x 8k (175).
About 3 s for each row; writes out/bench_attention.json and .png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from stowax.pallas_kernels import Rows, attention_kernel, decode_attention
from stowax.pallas_kernels.codecs import RowCodec, per_token
from stowax.transforms.report import text_table

from . import kernel_timing, kv_methods, pictures
from .results import write_json

CASES = flags.DEFINE_list("cases", ["1x2048", "1x8192", "1x32768", "16x8192"], "Batch x tokens.")
SPECS = flags.DEFINE_list(
    "specs",
    ["int8", "int4-g64-sym", "int4-g64", "int4-g32"],
    "Row codecs, or methods of `kv_methods`: the codecs of their keys and values.",
)
HEADS = flags.DEFINE_string("heads", "32x8x128", "Query heads x heads of the cache x elements.")
FORMS = flags.DEFINE_list(
    "forms",
    ["plain"],
    "plain; weights, which are a result too; ragged: every other head has a tenth of the tokens.",
)
OUT = flags.DEFINE_string("out", "out/bench_attention", "Where the JSON and the picture go.")

HEADER = ("cache", "B x S", "us", "of bf16", "TB/s", "error", "path")


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


def measure(spec: str, b: int, s: int, base: float, form: str = "plain") -> dict[str, Any]:
    """One row; `base` is the time of bf16."""
    n, k, h = map(int, HEADS.value.split("x"))
    q, lengths = (
        jax.random.normal(jax.random.key(0), (b, n, h), jnp.bfloat16),
        jnp.full((b,), s, jnp.int32),
    )
    if spec == "bf16":
        one: Any = lambda i: jax.random.normal(jax.random.key(i), (b, s, k, h), jnp.bfloat16)
        attend: Any = lambda q, kv: jax.nn.dot_product_attention(
            q[:, None], *kv, query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths,
            implementation="cudnn",
        )  # fmt: skip
    else:
        own = codecs(spec)
        one = lambda i: random_rows(own[i % 2], b, k, s, h, i)
        if form == "ragged":
            short = jnp.arange(k) % 2 == 1
            lengths = jnp.where(short, lengths[:, None] // 10, lengths[:, None])
        attend = lambda q, kv: decode_attention(q, kv[0], kv[1], lengths, weights=form == "weights")
    first: Any = (one(0), one(1))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(first))
    sets = [first] + [(one(2 * i), one(2 * i + 1)) for i in range(1, kernel_timing.copies(nbytes))]
    us = kernel_timing.kernel_us(attend, q, sets)
    name = spec if form == "plain" else f"{spec}, {form}"
    row: dict[str, Any] = {"spec": name, "b": b, "s": s, "us": us, "of_bf16": us / (base or us)}
    row["tb_per_s"] = float(lengths.mean()) / s * nbytes / us / 1e6
    if spec != "bf16":
        want = decode_attention(q, first[0], first[1], lengths, implementation="reference")[0]
        got, want = (x.astype(jnp.float32) for x in (jax.jit(attend)(q, first)[0], want))
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        row["path"] = attention_kernel(q, *first)
    return row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda name, form: format(row[name], form) if name in row else ""
    return (
        row["spec"], f"{row['b']} x {row['s']}", number("us", ".1f"), number("of_bf16", ".2f"),
        number("tb_per_s", ".2f"), number("error", ".1e"), row.get("path", ""),
    )  # fmt: skip


def main(_: list[str]) -> None:
    device, rows = jax.devices()[0], []
    for case in CASES.value:
        b, s = map(int, case.split("x"))
        base = measure("bf16", b, s, 0)
        found = [base, *(measure(x, b, s, base["us"], f) for x in SPECS.value for f in FORMS.value)]
        rows += found
        print("\n".join("  ".join(cells(r)) for r in found), flush=True)
        write_json(
            Path(OUT.value + ".json"),
            {
                "device": device.device_kind,
                "jax": jax.__version__,
                "heads": HEADS.value,
                "rows": rows,
            },
        )
    print(text_table(HEADER, list(map(cells, rows))))
    one = [r for r in rows if r["b"] == rows[0]["b"]]
    pictures.times(one, "s", "tokens in the cache", Path(OUT.value + ".png"), device.device_kind)


if __name__ == "__main__":
    app.run(main)
