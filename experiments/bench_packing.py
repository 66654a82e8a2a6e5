"""Packing of MiniMalloc's eleven hard problems: greedy heuristics against branch and bound; a table, JSON, a picture.

  python -m stowax.experiments.bench_packing

Expected on 2 CPU cores: all eleven packed into their capacity, none in more than 2 s; best fit by size, which is what
XLA does, needs 1.3 to 1.4 times the capacity. A first run compiles the search for 5 to 6 s, before it measures.

Problems and their licence: `tests/memory_planner/data/minimalloc/README.md`. Moffitt, MiniMalloc, ASPLOS 2023.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from stowax.experiments.results import write_json
from stowax.memory_planner import Buffer, PackingTimeout, packing
from stowax.memory_planner.packing.buffers import problem_of
from stowax.memory_planner.packing.heuristics import ORDERS, greedy, place
from stowax.transforms.report import text_table

DATA = flags.DEFINE_string(
    "data",
    str(Path(__file__).resolve().parents[1] / "tests/memory_planner/data/minimalloc"),
    "Folder of problems, each `<name>.<capacity>.csv`.",
)
NAMES = flags.DEFINE_list("names", [], "Problems to pack; all that there are when empty.")
TIME_LIMIT = flags.DEFINE_float("time_limit", 30.0, "Seconds for each.")
WORKERS = flags.DEFINE_integer("workers", 2, "Threads that search.")
OUT = flags.DEFINE_string("out", "out/packing", "Folder for results.json and packing.png.")

HEADER = ("problem", "buffers", "live", "best fit", "greedy", "s", "nodes", "found by")

Offsets = Sequence[int]


def problems(folder: Path, names: Sequence[str]) -> dict[str, tuple[list[Buffer], int]]:
    """Buffers and capacity by name."""
    found = {tuple(path.name.split(".")[:2]): path for path in sorted(folder.glob("*.*.csv"))}
    unknown = set(names) - {name for name, _ in found}
    if unknown or not found:
        raise ValueError(
            f"`names`: no {sorted(unknown)} in {folder}, which has {[n for n, _ in found]}"
        )
    return {
        name: (packing.read_buffers(path), int(capacity))
        for (name, capacity), path in found.items()
        if not names or name in names
    }


def best_fit(buffers: Sequence[Buffer]) -> Offsets:
    """Best fit by size, in bytes."""
    problem = problem_of(buffers, 1)
    return [int(o) * problem.unit for o in place(problem, ORDERS["size"](problem), "best")]


def height(buffers: Sequence[Buffer], offsets: Offsets) -> int:
    return max(offset + b.size for b, offset in zip(buffers, offsets))


def measure(name: str, buffers: Sequence[Buffer], capacity: int) -> tuple[dict[str, Any], Offsets]:
    """A row, heights as parts of the capacity and seconds of the whole call; and the packing."""
    problem = problem_of(buffers, 1)
    start = time.perf_counter()
    try:
        found = packing.find_packing(
            buffers, capacity, time_limit=TIME_LIMIT.value, workers=WORKERS.value
        )
    except PackingTimeout:
        found = packing.Packing((), "time limit", 0)
    seconds = time.perf_counter() - start
    row = {
        "name": name,
        "buffers": len(buffers),
        "capacity": capacity,
        "live": problem.max_live() * problem.unit / capacity,
        "best_fit": height(buffers, best_fit(buffers)) / capacity,
        "greedy": greedy(problem, 0).height * problem.unit / capacity,
        "seconds": seconds,
        "nodes": found.nodes,
        "method": found.method,
    }
    return row, found.offsets


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        str(row["buffers"]),
        *(f"{row[key]:.4f}" for key in ("live", "best_fit", "greedy")),
        f"{row['seconds']:.2f}",
        f"{row['nodes']:,}",
        row["method"],
    )


def picture(
    name: str, buffers: Sequence[Buffer], capacity: int, offsets: Offsets, path: Path
) -> None:
    """Offset over time: best fit by size beside the packing found."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    greedy_offsets = best_fit(buffers)
    for axes, title, each in (
        (panels[0], "best fit by size", greedy_offsets),
        (panels[1], "branch and bound", offsets),
    ):
        draw(axes, buffers, each)
        axes.axhline(capacity, color="#c00", lw=1.2)
        axes.set(
            xlabel="time", title=f"{title}: {height(buffers, each) / capacity:.3f} of the capacity"
        )
    panels[0].set(ylabel="offset", ylim=(0, 1.02 * height(buffers, greedy_offsets)))
    figure.suptitle(f"Problem {name}, {len(buffers)} buffers; the red line is the capacity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(axes: Axes, buffers: Sequence[Buffer], offsets: Offsets) -> None:
    """A rectangle for each buffer, the colour by how long it lives."""
    longest = max(b.upper - b.lower for b in buffers)
    for b, offset in zip(buffers, offsets):
        width = b.upper - b.lower
        color = plt.get_cmap("viridis")(1 - (width / longest) ** 0.5)
        axes.add_patch(
            Rectangle((b.lower, offset), width, b.size, facecolor=color, edgecolor="#222", lw=0.3)
        )
    axes.set_xlim(min(b.lower for b in buffers), max(b.upper for b in buffers))


def main(_: list[str]) -> None:
    chosen, out = problems(Path(DATA.value), NAMES.value), Path(OUT.value)
    first = next(iter(chosen))
    measure(first, *chosen[first])  # compiles the search, or loads what an earlier run compiled
    measured = {name: measure(name, *problem) for name, problem in chosen.items()}
    rows = [row for row, _ in measured.values()]
    print(text_table(HEADER, [cells(row) for row in rows]))
    settings = {"time_limit": TIME_LIMIT.value, "workers": WORKERS.value}
    write_json(out / "results.json", {**settings, "problems": rows})
    drawn = next((name for name, (_, offsets) in measured.items() if offsets), None)
    if drawn:
        picture(drawn, *chosen[drawn], measured[drawn][1], out / "packing.png")


if __name__ == "__main__":
    app.run(main)
