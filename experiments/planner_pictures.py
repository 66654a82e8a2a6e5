"""Pictures of predicted memory: against what was measured, and over the course of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from stowax.memory_planner import Prediction

GIB = 2**30


def save_picture(
    path: Path, rows: Sequence[Mapping[str, Any]], prediction: Prediction, name: str
) -> None:
    """Left: error of every program. Right: the timeline of one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.28 * len(rows) + 2))
    draw_errors(left, rows)
    draw_timeline(right, prediction, name)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_errors(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    colors = {True: "#9bb8d3", False: "#d98c3f"}
    for tuned, label in ((True, "tuned on"), (False, "held out")):
        part = [(i, row) for i, row in enumerate(rows) if row["tuned"] == tuned]
        heights = [row["error"] for _, row in part]
        axes.barh([-i for i, _ in part], heights, color=colors[tuned], label=label)
    axes.set_yticks([-i for i in range(len(rows))], [row["name"] for row in rows])
    axes.axvline(0, color="#444", lw=1)
    axes.set_xlabel("predicted peak - XLA's, %")
    axes.legend(frameon=False)


def draw_timeline(axes: Any, prediction: Prediction, name: str, named: int = 6) -> None:
    """Bytes over program order; the largest buffers at the peak one upon another, the rest above them."""
    total = [moment.nbytes / GIB for moment in prediction.timeline]
    base = [(prediction.arguments + prediction.outputs) / GIB] * len(total)
    layers, labels = [base], ["arguments and outputs"]
    for buffer in prediction.at_peak[:named]:
        alive = range(buffer.start, buffer.end)
        layers.append([buffer.nbytes / GIB if i in alive else 0.0 for i in range(len(total))])
        labels.append(buffer.name)
    sums = [sum(column) for column in zip(*layers)]
    layers.append([max(t - s, 0.0) for t, s in zip(total, sums)])
    axes.stackplot(range(len(total)), layers, labels=[*labels, "other temporaries"], step="post")
    axes.axhline(prediction.peak / GIB, color="#444", lw=1, ls="--")
    axes.set_ylim(0, 1.25 * prediction.peak / GIB)
    axes.set_title(f"{name}: predicted peak {prediction.peak / GIB:.2f} GiB")
    axes.set_xlabel("operation that writes, in order; loop bodies once")
    axes.set_ylabel("GiB")
    axes.legend(frameon=False, fontsize=7, loc="upper right")
