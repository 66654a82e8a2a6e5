"""Low-bit matmuls as the TPU compiler sees them, on a machine without a TPU: estimates, not measurements.

  python -m stowax.experiments.tpu_estimates --codecs=bf16,int8,int4-g64 --rows=16,128 --chips=v5e,v6e

Compiles ``x[M, K] @ w[N, K].T`` ahead of time, needs `libtpu` (``pip install stowax[tpu]``), about 20 s a row on
2 cores. A row is a codec, M, and a path: ``bf16`` is XLA's own matmul of a bfloat16 weight, ``xla`` decodes and then
multiplies, ``mosaic_tpu`` is our kernel.

* ``compute us`` of our kernel counts the instruction bundles of the compiler's final schedule, one a cycle, times the
  trips of its loops. Only our kernel has it.
* ``memory us`` is what must move at least (`x`, the packed weight, the result) over the bandwidth of the chip.
* ``compiler us`` is ``cost_analysis()["optimal_seconds"]``. It does not look into a Pallas kernel, so our path has
  none; of the loop over tiles of ``xla`` it sees one trip, so time and bytes of that path are multiplied by the tiles.
  Blank where the compiler does not know an op.

Expected: our kernel at int4 and M = 16 in about 0.4 of the time in which bf16 can read its weight on v5e, 0.5 on v6e.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.matmul import mosaic_tpu, xla
from stowax.transforms.report import text_table

from .results import write_json

CODECS = flags.DEFINE_list(
    "codecs",
    ["bf16", "int8", "int4-g64", "int4-g128", "int3-g64", "int2-g64", "nf4-g64", "fp8_e4m3"],
    "What the weight is stored in.",
)
ROWS = flags.DEFINE_list("rows", ["16", "128", "1024"], "Rows of `x`, M.")
SHAPE = flags.DEFINE_list("shape", ["4096", "14336"], "K and N.")
CHIP_NAMES = flags.DEFINE_list("chips", ["v5e", "v6e"], "For which TPUs.")
OUT = flags.DEFINE_string("out", "out/tpu_estimates.json", "Where the figures go.")

HEADER = ("chip", "codec", "M", "path", "memory us", "compute us", "compiler us", "MB accessed", "temp MB")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """What an estimate needs of a TPU.

    Attributes:
      topology: its name for the compiler.
      bandwidth: of its memory, bytes/s, as published.
      clock: cycles/s.
    """

    topology: str
    bandwidth: float
    clock: float


# Bandwidths as published. The clock of v5e is where its published peak comes out; that of v6e is assumed.
CHIPS = {"v5e": Chip("v5e:2x2", 819e9, 1.5e9), "v6e": Chip("v6e:2x2", 1640e9, 1.75e9)}


def prepare(dump: str = "") -> None:
    """Sets what the compiler reads when it is loaded: no TPU is here, another process may compile too.

    Args:
      dump: a folder for the compiler's schedules.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    if dump:
        wanted = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = wanted


@functools.cache
def sharding(chip: str) -> NamedSharding:
    """One device of `chip`, which need not be here."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip].topology
    ).devices
    return NamedSharding(Mesh(devices[:1], "x"), PartitionSpec())


def compile_for(chip: str, f: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """`f` on arguments like `args` (arrays, shapes), compiled for `chip`."""
    on = sharding(chip)
    with jax.sharding.use_abstract_mesh(on.mesh.abstract_mesh):
        return jax.jit(f, in_shardings=on, out_shardings=on).lower(*args).compile()


def weight(spec: str, k: int, n: int) -> codecs.Packed:
    """The shapes of a packed bfloat16 ``[N, K]``."""
    pack = lambda w: codecs.pack(w, codecs.get(spec), lead=(0,), inner=(1,))
    return jax.eval_shape(pack, jax.ShapeDtypeStruct((n, k), jnp.bfloat16))


def estimate(chip: str, spec: str, m: int, k: int, n: int, path: str, dump: str) -> dict[str, Any]:
    """A row of the table."""
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    w: Any = jax.ShapeDtypeStruct((n, k), jnp.bfloat16) if spec == "bf16" else weight(spec, k, n)
    run = {"bf16": lambda x, w: x @ w.T, "xla": xla.matmul, "mosaic_tpu": mosaic_tpu.matmul}[path]
    clear(dump)
    compiled = compile_for(chip, run, x, w)
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    moved = w.size * 2 if spec == "bf16" else w.nbytes
    moved += 2 * m * (k + n)
    is_ours = path == "mosaic_tpu"
    trips = xla.tile_count(w) if path == "xla" else 1
    is_known = not is_ours and cost["optimal_seconds"] > 0
    return {
        "chip": chip,
        "codec": spec,
        "rows": m,
        "path": path,
        "memory_s": moved / CHIPS[chip].bandwidth,
        "compute_s": cycles(dump, x, w) / CHIPS[chip].clock if is_ours else None,
        "compiler_s": trips * cost["optimal_seconds"] if is_known else None,
        "bytes_accessed": None if is_ours else trips * cost["bytes accessed"],
        "temp_bytes": memory.temp_size_in_bytes,
    }


def clear(dump: str) -> None:
    for old in glob.glob(f"{dump}/*"):
        os.remove(old)


def cycles(dump: str, x: Any, w: codecs.Packed) -> int:
    """Bundles of the kernel's schedule times its trips."""
    plan = mosaic_tpu.plan(x, w)
    outside, inside = bundles(dump, "low_bit_matmul")
    trips = plan.tiles // plan.unroll
    blocks = math.ceil(x.shape[0] / plan.rows) * math.ceil(w.shape[0] / plan.row_block)
    return blocks * (outside + inside * trips)


def bundles(dump: str, kernel: str) -> tuple[int, int]:
    """Of a kernel's final schedule, outside and inside of the loops in its body: those are marked ``>>``."""
    (path,) = glob.glob(f"{dump}/*{kernel}*-final_bundles.txt")
    marks = re.findall(r"^ *0x[0-9a-f]+ +(?:\w\w)?: (>*)", Path(path).read_text(), re.MULTILINE)
    inside = sum(mark == ">>" for mark in marks)
    return len(marks) - inside, inside


def line(row: dict[str, Any]) -> tuple[str, ...]:
    number = lambda v, scale, digits: "" if v is None else f"{v * scale:.{digits}f}"
    return (
        row["chip"],
        row["codec"],
        str(row["rows"]),
        row["path"],
        *(number(row[key], 1e6, 1) for key in ("memory_s", "compute_s", "compiler_s")),
        number(row["bytes_accessed"], 1e-6, 1),
        number(row["temp_bytes"], 1e-6, 1),
    )


def main(_: list[str]) -> None:
    k, n = map(int, SHAPE.value)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as dump:
        prepare(dump)
        for chip, spec, m in itertools.product(
            CHIP_NAMES.value, CODECS.value, map(int, ROWS.value)
        ):
            for path in ("bf16",) if spec == "bf16" else ("xla", "mosaic_tpu"):
                rows.append(estimate(chip, spec, m, k, n, path, dump))
                print(*line(rows[-1]), sep="\t", flush=True)
                write_json(Path(OUT.value), {"k": k, "n": n, "jax": jax.__version__, "rows": rows})
    print(text_table(HEADER, [line(row) for row in rows]))


if __name__ == "__main__":
    app.run(main)
