"""Gradient of a 24-layer transformer under memory budgets: our plan against named rules, milliseconds and bytes.

  python -m stowax.experiments.bench_remat --device=h100

Each program is compiled and run here; the peak is XLA's own (`memory_report`), beside what was predicted. Writes
out/bench_remat.json and .png. Expected on one H100: in docs/plans.md. 5 minutes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.experiments import pictures, sizes
from stowax.experiments.kernel_timing import median_seconds
from stowax.experiments.results import write_json
from stowax.transforms.placement import BASELINES
from stowax.transforms.report import text_table

LAYERS = flags.DEFINE_integer("layers", 24, "Layers.")
DIM = flags.DEFINE_integer("dim", 1024, "Width; the feed-forward is 4 times as wide.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.")
SCAN = flags.DEFINE_bool("scan", True, "Scan over the layers, or write them out.")
SHARES = flags.DEFINE_list(
    "shares",
    ["1.0", "0.8", "0.6", "0.5", "0.4", "0.3"],
    "Budgets, as shares of the peak without remat.",
)
STRATEGIES = flags.DEFINE_list("strategies", list(BASELINES), "Named rules beside our plans.")
HOST = flags.DEFINE_string("host", "0B", "Host memory that our plans may use.")
DEVICE = flags.DEFINE_string("device", "h100", "The device's name for the planner.")
STEPS = flags.DEFINE_integer("steps", 10, "Runs that are timed.")
OUT = flags.DEFINE_string("out", "out/bench_remat", "Results, without an ending.")

HEADER = (
    "plan",
    "budget, MiB",
    "predicted, MiB",
    "XLA, MiB",
    "error",
    "ms",
    "planned ms",
    "host, MiB",
)


def problem() -> tuple[Any, Any, Any]:
    """The gradient, parameters and tokens."""
    c = sizes.transformer(LAYERS.value, DIM.value)
    params = models.init_params(c, scan=SCAN.value)
    tokens = sizes.random_tokens(c, BATCH.value, LENGTH.value)
    return jax.value_and_grad(sizes.loss(c, SCAN.value)), params, tokens


def measure(name: str, plan: sx.Plan, fn: Any, args: Any) -> dict[str, Any]:
    args = plan.place(*args)
    compiled = jax.jit(plan.apply(fn)).lower(*args).compile()
    report = memory_planner.memory_report(compiled)
    seconds = median_seconds(lambda: compiled(*args), STEPS.value)
    return {
        "name": name,
        "budget": plan.budget,
        "predicted": plan.after,
        "xla": report.peak,
        "ms": 1e3 * seconds,
        "planned_ms": 1e3 * plan.step_after,
        "host": report.host,
        "again": len(plan.again),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    mib = lambda n: "" if n is None else f"{n / 2**20:,.0f}"
    error = f"{row['predicted'] / row['xla'] - 1:+.1%}"
    sizes = mib(row["budget"]), mib(row["predicted"]), mib(row["xla"])
    return (
        row["name"],
        *sizes,
        error,
        f"{row['ms']:.2f}",
        f"{row['planned_ms']:.2f}",
        mib(row["host"]),
    )


def main(_: list[str]) -> None:
    fn, *args = problem()
    rows: list[dict[str, Any]] = []

    def add(name: str, **options: Any) -> None:
        start = time.perf_counter()
        try:
            plan = sx.plan(fn, *args, device=DEVICE.value, **options)
            seconds = time.perf_counter() - start
            rows.append(measure(name, plan, fn, args) | {"solve_s": seconds})
        except Exception as error:  # out of memory, or no plan: the others go on
            print(f"{name}: {str(error)[:300]}", flush=True)
            return
        print("  ".join(cells(rows[-1])), f"(planned in {seconds:.1f} s)", flush=True)

    for strategy in STRATEGIES.value:
        add(strategy, strategy=strategy)
    base = next((r["xla"] for r in rows if r["name"] == "keep-all"), 0)
    for share in map(float, SHARES.value) if base else ():
        add(f"ours {share:.0%}", hbm=int(share * base), host=HOST.value)
    print(text_table(HEADER, list(map(cells, rows))))
    kind = jax.devices()[0].device_kind
    settings = {"device": kind, "jax": jax.__version__, "layers": LAYERS.value, "scan": SCAN.value}
    settings |= {"dim": DIM.value, "batch": BATCH.value, "length": LENGTH.value}
    write_json(Path(OUT.value + ".json"), settings | {"rows": rows})
    pictures.front(rows, Path(OUT.value + ".png"), kind)


if __name__ == "__main__":
    app.run(main)
