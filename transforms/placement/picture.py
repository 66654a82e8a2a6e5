"""The picture of a plan: bytes over time, before and after."""

from __future__ import annotations

import html as escape
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowax.memory_planner import format_bytes

if TYPE_CHECKING:
    from .plan import Plan


def draw(plan: Plan, path: Path) -> None:
    """Writes the picture; the ending of `path` says which kind."""
    figure = _figure(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def html(plan: Plan) -> str:
    """The table and the picture, for a notebook."""
    buffer = io.StringIO()
    _figure(plan).savefig(buffer, format="svg", bbox_inches="tight")
    svg = buffer.getvalue()
    return f"<pre>{escape.escape(str(plan))}</pre>{svg[svg.index('<svg') :]}"


def _figure(plan: Plan) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes: Any = figure.add_subplot()
    unit = 2**30 if plan.before > 2**31 else 2**20
    for line, label, color in zip(
        plan.timelines, ("as it is", plan.strategy), ("#9aa5b1", "#1f6feb")
    ):
        x = [i / max(1, len(line) - 1) for i in range(len(line))]
        y = [v / unit for v in line]
        peak = max(line, default=0)
        axes.fill_between(x, y, alpha=0.25, color=color, step="mid", lw=0)
        axes.plot(
            x, y, color=color, lw=1, drawstyle="steps-mid", label=f"{label}: {format_bytes(peak)}"
        )
    if plan.budget is not None:
        axes.axhline(
            plan.budget / unit,
            color="#c0392b",
            lw=1,
            ls="--",
            label=f"budget: {format_bytes(plan.budget)}",
        )
    axes.set(
        xlabel="share of the operations",
        ylabel="GiB" if unit == 2**30 else "MiB",
        xlim=(0, 1),
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f"predicted bytes on {plan.device}", fontsize=10, loc="left")
    return figure
