"""Decode attention over packed caches as the TPU compiler sees it, on a machine without a TPU: estimates.

  python -m stowax.experiments.tpu_attention_estimates --cases=1x32768,16x8192 --chips=v5e,v6e

Needs `libtpu` (``pip install stowax[tpu]``), 10 to 40 s a row on 2 cores. Columns and how to read them are those of
`tpu_estimates`, and besides:

* ``bf16`` is XLA's own attention to a bfloat16 cache, ``xla`` decodes blocks of tokens and attends to them. Time and
  bytes of its loop over blocks are those of one trip times the trips.
* ``memory us`` is the time of reading the cache once. ``copied MB`` are float16 tables, which XLA copies for our
  kernel as bits (Mosaic takes no float16): they are read and written once more, where they do not fit into VMEM.
* ``compute us`` counts what opens and closes a row of the batch in each block, so it is somewhat too high.

Expected: our kernel at int4-g64-sym-bf16 in 0.26 of the time in which a bfloat16 cache can be read, on v5e.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from stowax.pallas_kernels import Rows, pack_rows
from stowax.pallas_kernels.codecs import RowCodec, per_token
from stowax.pallas_kernels.decode_attention import mosaic_tpu, xla
from stowax.transforms.report import text_table

from . import kv_methods, tpu_estimates
from .results import write_json
from .tpu_estimates import CHIP_NAMES, CHIPS, OUT

CASES = flags.DEFINE_list("cases", ["1x32768", "16x8192"], "Batch x tokens.")
SPECS = flags.DEFINE_list(
    "specs",
    ["bf16", "int8", "int4-g64-sym", "int4-g64-sym-bf16", "int4-g32", "kivi4", "kivi2", "kv4", "kv2"],
    "bf16, row codecs, or methods of `kv_methods`: the codecs of their keys and values.",
)  # fmt: skip
PATHS = flags.DEFINE_list("paths", ["xla", "mosaic_tpu"], "Of packed caches.")
HEADS = flags.DEFINE_string("heads", "32x8x128", "Query heads x heads of the cache x elements.")

HEADER = (
    "chip", "cache", "B x S", "path", "memory us", "compute us", "compiler us", "copied MB", "MB accessed",
)  # fmt: skip
OPTIONS: dict[str, Any] = {"scale": 0.09, "soft_cap": None, "window": None}


def codecs(spec: str) -> tuple[RowCodec, RowCodec]:
    """Of keys and of values."""
    method = kv_methods.METHODS[spec]() if spec in kv_methods.METHODS else None
    if method is None or method.key is None or method.value is None:
        return per_token(spec), per_token(spec)
    return method.key, method.value


def caches(spec: str, b: int, k: int, s: int, h: int) -> list[Any]:
    """Shapes of keys and values."""
    rows = jax.ShapeDtypeStruct((b, k, s, h), jnp.bfloat16)
    if spec == "bf16":
        return [rows, rows]
    return [jax.eval_shape(functools.partial(pack_rows, codec=c), rows) for c in codecs(spec)]


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    """To rows in full, ``[B, K, S, H]``, as XLA does it."""
    x = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[2])
    scores = jnp.einsum("bkgh,bksh->bkgs", x, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(keys.shape[2]) < lengths[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, OPTIONS["scale"] * scores, -1e30), axis=-1)
    out = jnp.einsum(
        "bkgs,bksh->bkgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)


def estimate(chip: str, spec: str, b: int, s: int, path: str, dump: str) -> dict[str, Any]:
    """A row of the table."""
    n, k, h = map(int, HEADS.value.split("x"))
    keys, values = caches(spec, b, k, s, h)
    q, lengths = (
        jax.ShapeDtypeStruct((b, n, h), jnp.bfloat16),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    run = {"bf16": attend, "xla": xla.decode_attention, "mosaic_tpu": mosaic_tpu.decode_attention}
    options = {} if path == "bf16" else OPTIONS
    if path == "xla":
        options = options | {"seen": None, "full": None}
    tpu_estimates.clear(dump)
    f = functools.partial(run[path], **options)
    compiled = tpu_estimates.compile_for(chip, f, q, keys, values, lengths)
    cost: Any = compiled.cost_analysis()
    is_ours = path == "mosaic_tpu"
    is_known = not is_ours and cost["optimal_seconds"] > 0
    trips = s // xla.block_of(keys, values, keys.heads) if path == "xla" else 1
    leaves = jax.tree.leaves((keys, values))
    nbytes = lambda xs: sum(x.size * x.dtype.itemsize for x in xs)
    return {
        "chip": chip,
        "spec": spec,
        "b": b,
        "s": s,
        "path": path,
        "memory_s": nbytes(leaves) / CHIPS[chip].bandwidth,
        "compute_s": cycles(dump, keys, b) / CHIPS[chip].clock if is_ours else None,
        "compiler_s": trips * cost["optimal_seconds"] if is_known else None,
        "copied_bytes": nbytes(x for x in leaves if x.dtype == jnp.float16) if is_ours else None,
        "bytes_accessed": None if is_ours else trips * cost["bytes accessed"],
    }


def cycles(dump: str, keys: Rows, b: int) -> int:
    """Bundles of the kernel's schedule times its trips."""
    together = mosaic_tpu.heads_together(keys.heads)
    cut = mosaic_tpu.Config.of(together, b * keys.tokens)
    block = min(cut.block, keys.tokens)
    outside, inside = tpu_estimates.bundles(dump, "low_bit_attention")
    steps = b * (keys.heads // together) * math.ceil(keys.tokens / block)
    return steps * (outside + inside * (block // cut.chunk))


def line(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda key, scale: "" if row[key] is None else f"{row[key] * scale:.1f}"
    times = (number(key, 1e6) for key in ("memory_s", "compute_s", "compiler_s"))
    sizes = (number(key, 1e-6) for key in ("copied_bytes", "bytes_accessed"))
    return row["chip"], row["spec"], f"{row['b']} x {row['s']}", row["path"], *times, *sizes


def main(_: list[str]) -> None:
    xla.BLOCK_BYTES = xla.DEVICE_BLOCK_BYTES  # this machine has but a CPU
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as dump:
        tpu_estimates.prepare(dump)
        for chip, case, spec in itertools.product(CHIP_NAMES.value, CASES.value, SPECS.value):
            b, s = map(int, case.split("x"))
            for path in ["bf16"] if spec == "bf16" else PATHS.value:
                rows.append(estimate(chip, spec, b, s, path, dump))
                print(*line(rows[-1]), sep="\t", flush=True)
                write_json(Path(OUT.value), {"jax": jax.__version__, "rows": rows})
    print(text_table(HEADER, [line(row) for row in rows]))


if __name__ == "__main__":
    app.run(main)
