"""Predicted peak memory against XLA's, its compilers for TPU and GPU ahead of time: neither is needed.

  python -m stowax.experiments.check_peak --device=v5e
  python -m stowax.experiments.check_peak --device=h100
  python -m stowax.experiments.check_peak --programs=llama-decode,equinox-mlp-train --noresume

Compiles the programs of `planner_programs`; `ahead` says what must be installed. About 40 minutes for all on 2 cores;
goes on where it stopped. ``XLA`` is the most bytes that the compiler has alive at once,
``allocated`` what it asks for, with the gaps of its packing; ``of temporaries`` is the error of those alone (0 if
there are none to speak of). ``plain`` is the error of plain liveness, every result written in
program order. ``tuned`` programs were looked at while the rules were made. The second table corrects the prediction
of one program by its measured peak, and predicts variants of it with that.

Expected with jax 0.11.2: median error below 3 %, none above 10 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from stowax import memory_planner
from stowax.transforms.report import text_table

from . import ahead
from .planner_pictures import save_picture
from .planner_programs import PROGRAMS, VARIANTS, Program
from .results import Results

DEVICE = flags.DEFINE_enum("device", "v5e", ahead.DEVICES, "For which device to compile.")
NAMES = flags.DEFINE_list("programs", [], "Which; all by default.")
RESULTS = flags.DEFINE_string("results", "out/check_peak", "Without device and ending.")
RESUME = flags.DEFINE_bool("resume", True, "Keep the measurements that the JSON file has.")

HEADER = (
    "program",
    "set",
    "predicted MiB",
    "XLA MiB",
    "error %",
    "of temporaries",
    "plain",
    "allocated MiB",
)
CORRECTED_HEADER = ("variant", "XLA MiB", "error %", "corrected by", "error %")


def measure(program: Program) -> dict[str, Any]:
    """Compiles a program; bytes as XLA has them."""
    fn, args, donate = program.build()
    start = time.perf_counter()
    compiled = ahead.compile_for(DEVICE.value, fn, *args, donate=donate)
    return {
        "xla": memory_planner.live_peak(compiled),
        "allocated": memory_planner.memory_report(compiled).peak,
        "compile_s": time.perf_counter() - start,
    }


def predict(program: Program, **options: Any) -> memory_planner.Prediction:
    fn, args, donate = program.build()
    return memory_planner.predict(fn, *args, donate=donate, device=DEVICE.value, **options)


def compare(name: str, program: Program, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    prediction = predict(program)
    given, xla = prediction.arguments + prediction.outputs, measured["xla"]
    error = lambda got, want: 100 * (got / want - 1)
    return {
        **measured,
        "name": name,
        "tuned": program.tuned,
        "predicted": prediction.peak,
        "temporaries": prediction.temporaries,
        "error": error(prediction.peak, xla),
        "temporaries_error": error(prediction.temporaries, xla - given)
        if xla > 1.01 * given
        else 0.0,
        "plain_error": error(predict(program, rules=memory_planner.PLAIN).peak, xla),
    }


def corrected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Variants of a program, predicted with the correction that its own measurement gives."""
    measured = {row["name"]: row["xla"] for row in rows}
    found = []
    for base, variants in VARIANTS.items():
        for name in variants:
            if base not in measured or name not in measured:
                continue
            factor = predict(PROGRAMS[base]).corrected(measured[base]).correction
            before, after = (predict(PROGRAMS[name], correction=c).peak for c in (1.0, factor))
            error = lambda got, want: 100 * (got / want - 1)
            found.append(
                {
                    "name": name,
                    "xla": measured[name],
                    "error": error(before, measured[name]),
                    "base": base,
                    "correction": factor,
                    "corrected_error": error(after, measured[name]),
                }
            )
    return found


def line(row: dict[str, Any]) -> tuple[str, ...]:
    size = lambda key: f"{row[key] / 2**20:,.0f}"
    percent = lambda key: f"{row[key]:+.1f}"
    return (
        row["name"],
        "tuned" if row["tuned"] else "held out",
        size("predicted"),
        size("xla"),
        percent("error"),
        percent("temporaries_error"),
        percent("plain_error"),
        size("allocated"),
    )


def corrected_line(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['xla'] / 2**20:,.0f}",
        f"{row['error']:+.1f}",
        f"{row['base']} (x {row['correction']:.3f})",
        f"{row['corrected_error']:+.1f}",
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and largest absolute error in percent, by set."""
    sets = {
        "all": rows,
        "tuned": [row for row in rows if row["tuned"]],
        "held out": [row for row in rows if not row["tuned"]],
    }
    errors = {name: [abs(row["error"]) for row in part] for name, part in sets.items() if part}
    return {
        name: {"programs": len(part), "median": statistics.median(part), "worst": max(part)}
        for name, part in errors.items()
    }


def main(_: list[str]) -> None:
    ahead.prepare()
    out = f"{RESULTS.value}_{DEVICE.value}"
    settings = {"device": DEVICE.value, "jax": jax.__version__} | ahead.compiler(DEVICE.value)
    results = Results(Path(f"{out}.json"), settings, resume=RESUME.value)
    names = NAMES.value or list(PROGRAMS)
    for name in names:
        if not results.has(name):
            results.add({"name": name, **measure(PROGRAMS[name])})
            print(name, f"{results.variants[-1]['xla'] / 2**20:,.0f} MiB", flush=True)
    measured = {v["name"]: v for v in results.variants if v["name"] in names}
    rows = [compare(name, PROGRAMS[name], measured[name]) for name in names]
    variants = corrected(rows)
    results.write(rows=rows, summary=summary(rows), corrected=variants)
    print(text_table(HEADER, [line(row) for row in rows]))
    for part, figures in summary(rows).items():
        print(f"{part}: {figures['programs']} programs, median error", end=" ")
        print(f"{figures['median']:.1f} %, worst {figures['worst']:.1f} %")
    print(text_table(CORRECTED_HEADER, [corrected_line(row) for row in variants]))
    save_picture(Path(f"{out}.png"), rows, predict(PROGRAMS[names[0]]), names[0])


if __name__ == "__main__":
    app.run(main)
