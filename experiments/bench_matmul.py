"""Low-bit matmul on a GPU against bf16, XLA's own int8 and int4, and torch: time and share of the roofline.

  python -m stowax.experiments.bench_matmul --shapes=4096x14336,8192x28672 --m=1,16,64,128,256,1024 --torch

Expected on one H100 (4096x14336, int4-g128-sym): 12.8 us at M = 1, 20 at 64, 28 at 128, where bf16 takes 42 to 53.
About 1 s for each row; writes out/bench_matmul.json and .png.
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
from stowax.pallas_kernels import codecs, kernel_name, matmul
from stowax.pallas_kernels.codecs import Packed
from stowax.transforms.report import text_table

from . import chains, kernel_timing, pictures, roofline, torch_peers, xla_peers
from .results import write_json

SHAPES = flags.DEFINE_list("shapes", ["4096x14336", "14336x4096"], "KxN of the weights.")
ROWS = flags.DEFINE_list("m", ["1", "16", "64", "128", "256", "1024"], "Rows of x.")
SPECS = flags.DEFINE_list(
    "specs",
    ["xla-int8", "xla-int4", "int8", "int4-g128-sym", "int4-g128", "int2-g128-sym"],
    "Codecs; xla-int8 and xla-int4: arrays with scales (of channels; of groups of 128) in plain JAX.",
)
TORCH = flags.DEFINE_bool("torch", False, "Also cuBLAS and tinygemm's int4 through torch.")
CHAIN = flags.DEFINE_bool(
    "chain", False, "Also time products there and back in a chain, launches included."
)
REPEATS = flags.DEFINE_integer(
    "repeats", 0, "Also run each of ours so often, and tell where bits differ."
)
OUT = flags.DEFINE_string("out", "out/bench_matmul", "Where the JSON and the picture go.")

HEADER = (
    "weights", "K x N", "M", "us", "of which longest", "of bf16", "TB/s", "roofline", "bound", "there and back us",
    "chained us", "error", "path",
)  # fmt: skip


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
        if x.dtype == jnp.int8:  # scales of groups
            return jax.random.randint(key, x.shape, 1, 17, jnp.int8)
        zero = "zero" in jax.tree_util.keystr(path)
        low, high = (0.0, 15.0) if zero else (0.01, 0.03)
        x = jax.random.uniform(key, x.shape, jnp.float32, low, high).astype(x.dtype)
        return jnp.round(x) if zero else x

    return jax.tree_util.tree_map_with_path(fill, template)


def dense(n: int, k: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, n, k), jnp.bfloat16) / 64


def bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bmk,bnk->bmn", x, w)


def path(spec: str, k: int) -> tuple[Callable[[int, int, int], Any], Callable[[Any, Any], Any]]:
    """What makes the weight of ``(n, k, seed)``, and what multiplies by it."""
    if spec == "bf16":
        return dense, bf16
    if spec.startswith("xla-"):
        group = k if spec == "xla-int8" else 128
        return lambda n, k, seed: xla_peers.weight(spec, group, n, k, seed), xla_peers.matmul
    return functools.partial(packed, spec), matmul


def measure(spec: str, k: int, n: int, m: int) -> dict[str, Any]:
    """One row of ours or of XLA."""
    x = jax.random.normal(jax.random.key(0), (1, m, k), jnp.bfloat16)
    make, product = path(spec, k)
    first = make(n, k, 0)
    nbytes = tree_nbytes(first)
    sets = [first] + [make(n, k, i) for i in range(1, kernel_timing.copies(nbytes))]
    kernels = kernel_timing.kernels_us(product, x, sets)
    us, longest = sum(kernels.values()), max(kernels.values())
    row: dict[str, Any] = {"spec": spec, "k": k, "n": n, "m": m, "us": us}
    row |= {"kernel_us": longest, "nbytes": nbytes}
    if CHAIN.value:
        row |= chains.measure(product, x, [(w, make(k, n, 100 + i)) for i, w in enumerate(sets)])
    if isinstance(first, Packed):
        want = matmul(x, first, implementation="reference", preferred_element_type=jnp.float32)
        run = jax.jit(matmul)
        found = run(x, first)
        got = found.astype(jnp.float32)
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        same = all(bool(jnp.array_equal(run(x, first), found)) for _ in range(REPEATS.value))
        row["path"] = kernel_name(x, first) + ("" if same else "; BITS DIFFER")
    return row


def compared(row: dict[str, Any], base: float, limits: roofline.Roofline) -> dict[str, Any]:
    """The row beside bf16, which takes `base` us, and beside what the device can do."""
    if "us" not in row:
        return row
    k, n, m = row["k"], row["n"], row["m"]
    moved = row.pop("nbytes") + 2 * m * (k + n)
    share = limits.share(row["us"], moved, 2 * m * k * n)
    return {**row, "of_bf16": row["us"] / base, "tb_per_s": moved / row["us"] / 1e6, **share}


def torch_rows(cases: list[tuple[int, int, int]]) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """torch's rows of each case."""
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {case: [] for case in cases}
    for row in torch_peers.rows("matmul", cases) if TORCH.value else []:
        k, n, m = case = tuple(row.pop("case"))
        found[case].append({"k": k, "n": n, "m": m, **row})
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda name, form: format(row[name], form) if name in row else ""
    return (
        row["spec"], f"{row['k']} x {row['n']}", str(row["m"]), number("us", ".1f"), number("kernel_us", ".1f"),
        number("of_bf16", ".2f"), number("tb_per_s", ".2f"), number("roofline", ".0%"), row.get("bound", ""),
        number("pair_us", ".1f"), number("chained_us", ".1f"), number("error", ".1e"),
        row.get("path", row.get("refusal", "")),
    )  # fmt: skip


def main(_: list[str]) -> None:
    shapes = [tuple(map(int, shape.split("x"))) for shape in SHAPES.value]
    cases = [(k, n, int(m)) for k, n in shapes for m in ROWS.value]
    theirs = torch_rows(cases)
    limits, rows, device = roofline.measured(), [], jax.devices()[0]
    for k, n, m in cases:
        found = [measure(spec, k, n, m) for spec in ["bf16", *SPECS.value]] + theirs[k, n, m]
        rows += [compared(row, found[0]["us"], limits) for row in found]
        print("\n".join("  ".join(cells(r)) for r in rows[-len(found) :]), flush=True)
        content = {
            "device": device.device_kind,
            "jax": jax.__version__,
            **vars(limits),
            "rows": rows,
        }
        write_json(Path(OUT.value + ".json"), content)
    print(text_table(HEADER, list(map(cells, rows))))
    pictures.times(rows, "m", "rows of x (M)", Path(OUT.value + ".png"), device.device_kind)


if __name__ == "__main__":
    app.run(main)
