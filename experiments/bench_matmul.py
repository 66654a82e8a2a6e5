"""Low-bit matmul against bf16 on a GPU: kernel time, bandwidth, and what a link of a chain costs.

  python -m stowax.experiments.bench_matmul --shapes=4096x14336,8192x28672 --m=1,16,64,128,256,1024

Expected on one H100 (4096x14336, int4-g128-sym): 13.5 us at M = 1, 20 at 64, 34 at 128, where bf16 takes 42 to 49.
About 1 s for each row; writes out/bench_matmul.json and .png.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from stowax.pallas_kernels import codecs, kernel_name, matmul
from stowax.pallas_kernels.codecs import Packed
from stowax.transforms.report import text_table

from . import kernel_timing, pictures
from .results import write_json

SHAPES = flags.DEFINE_list("shapes", ["4096x14336", "14336x4096"], "KxN of the weights.")
ROWS = flags.DEFINE_list("m", ["1", "16", "64", "128", "256", "1024"], "Rows of x.")
SPECS = flags.DEFINE_list(
    "specs", ["int8", "int4-g128-sym", "int4-g128", "int2-g128-sym"], "Codecs."
)
CHAIN = flags.DEFINE_bool("chain", False, "Also time a link of a chain, launches included.")
OUT = flags.DEFINE_string("out", "out/bench_matmul", "Where the JSON and the picture go.")

HEADER = ("weights", "K x N", "M", "us", "of bf16", "TB/s", "chained us", "error", "path")


def packed(spec: str, n: int, k: int, seed: int) -> Packed:
    """A random weight of random codes: encoding takes longer than all timing."""
    codec = codecs.get(spec)
    template = jax.eval_shape(
        lambda: codecs.pack(jnp.zeros((1, n, k), jnp.bfloat16), codec, lead=(0, 1), inner=(2,))
    )
    key = jax.random.key(seed)

    def fill(path: Any, x: Any) -> jax.Array:
        if x.dtype == jnp.uint8:
            return jax.random.bits(key, x.shape, jnp.uint8)
        zero = "zero" in jax.tree_util.keystr(path)
        low, high = (0.0, 15.0) if zero else (0.01, 0.03)
        x = jax.random.uniform(key, x.shape, jnp.float32, low, high).astype(x.dtype)
        return jnp.round(x) if zero else x

    return jax.tree_util.tree_map_with_path(fill, template)


def dense(n: int, k: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, n, k), jnp.bfloat16) / 64


def bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bmk,bnk->bmn", x, w)


def link(product: Any, x: jax.Array, w: Any) -> jax.Array:
    """The output as the next input."""
    y = product(x, w)
    k = x.shape[-1]
    return (
        y[..., :k] if y.shape[-1] >= k else jnp.tile(y, (1, 1, -(-k // y.shape[-1])))[..., :k]
    ) * 0.5


def measure(spec: str, k: int, n: int, m: int, base: float) -> dict[str, Any]:
    """One row; `base` is the time of bf16."""
    x = jax.random.normal(jax.random.key(0), (1, m, k), jnp.bfloat16)
    make, product = (dense, bf16) if spec == "bf16" else (functools.partial(packed, spec), matmul)
    first = make(n, k, 0)
    nbytes = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(first))
    sets = [first] + [make(n, k, i) for i in range(1, kernel_timing.copies(nbytes))]
    us = kernel_timing.kernel_us(product, x, sets)
    row: dict[str, Any] = {
        "spec": spec,
        "k": k,
        "n": n,
        "m": m,
        "us": us,
        "of_bf16": us / (base or us),
    }
    row["tb_per_s"] = (nbytes + 2 * m * (k + n)) / us / 1e6
    if CHAIN.value:
        row["chained_us"] = kernel_timing.chained_us(functools.partial(link, product), x, sets)
    if isinstance(first, Packed):
        want = matmul(x, first, implementation="reference", preferred_element_type=jnp.float32)
        got = matmul(x, first).astype(jnp.float32)
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        row["path"] = kernel_name(x, first)
    return row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda name, form: format(row[name], form) if name in row else ""
    return (
        row["spec"], f"{row['k']} x {row['n']}", str(row["m"]), number("us", ".1f"), number("of_bf16", ".2f"),
        number("tb_per_s", ".2f"), number("chained_us", ".1f"), number("error", ".1e"), row.get("path", ""),
    )  # fmt: skip


def main(_: list[str]) -> None:
    device, rows = jax.devices()[0], []
    for shape in SHAPES.value:
        k, n = map(int, shape.split("x"))
        for m in map(int, ROWS.value):
            base = measure("bf16", k, n, m, 0)
            rows += [base] + [measure(spec, k, n, m, base["us"]) for spec in SPECS.value]
            print("\n".join("  ".join(cells(r)) for r in rows[-1 - len(SPECS.value) :]), flush=True)
            write_json(
                Path(OUT.value + ".json"),
                {"device": device.device_kind, "jax": jax.__version__, "rows": rows},
            )
    print(text_table(HEADER, list(map(cells, rows))))
    pictures.times(rows, "m", "rows of x (M)", Path(OUT.value + ".png"), device.device_kind)


if __name__ == "__main__":
    app.run(main)
