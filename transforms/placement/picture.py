"""The picture of a plan: bytes over time by tensor, before and after, and where the buffers can lie."""

from __future__ import annotations

import html as escape
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowax.memory_planner import format_bytes

from .timeline import Band, Box

if TYPE_CHECKING:
    from .plan import Plan

_COLORS = ("#1f6feb", "#e08e45", "#3a9d5d", "#b0413e", "#7d5ba6", "#d4a72c", "#4aa3a2", "#c46b9a")
_COLORS += ("#8a6d3b", "#5b7fa6", "#a3b86c", "#6b6b8d")
_PLAIN = {"arguments and outputs": "#9aa5b1", "others": "#dfe3e8"}


def draw(plan: Plan, path: Path) -> None:
    """Writes the picture; the ending of `path` says which kind."""
    figure = _figure(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=110)


def html(plan: Plan) -> str:
    """The table and the picture, for a notebook."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as text, not as curves
        _figure(plan).savefig(buffer, format="svg", bbox_inches="tight")
    svg = buffer.getvalue()
    return f"<pre>{escape.escape(str(plan))}</pre>{svg[svg.index('<svg') :]}"


def _figure(plan: Plan) -> Any:
    from matplotlib.figure import Figure

    unit = 2**30 if plan.before > 2**31 else 2**20
    count = 3 if plan.boxes else 2
    figure = Figure(figsize=(4.6 * count, 5.2))
    axes: Any = figure.subplots(1, count)
    names = dict.fromkeys(band.name for line in plan.timelines for band in line)
    named = [name for name in names if name not in _PLAIN]
    colors = {**_PLAIN, **{n: _COLORS[i % len(_COLORS)] for i, n in enumerate(named)}}
    titles = (
        f"as it is: {format_bytes(plan.before)}",
        f"{plan.strategy}: {format_bytes(plan.after)}",
    )
    top = 1.05 * max(plan.before, plan.after, plan.budget or 0) / unit
    for ax, line, title in zip(axes, plan.timelines, titles):
        _timeline(ax, line, colors, unit)
        if plan.budget is not None:
            ax.axhline(plan.budget / unit, color="#c0392b", lw=1.2, ls="--")
        ax.set(ylim=(0, top))
        ax.set_title(f"{title}", fontsize=10, loc="left")
    axes[0].set_ylabel("GiB" if unit == 2**30 else "MiB")
    if plan.boxes:
        _packing(axes[2], plan.boxes, colors, unit)
    for ax in axes:
        ax.set_xlabel("share of the operations")
        ax.set_xlim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    _legend(figure, plan, colors)
    return figure


def _timeline(ax: Any, line: Sequence[Band], colors: Mapping[str, str], unit: int) -> None:
    if not line:
        return
    count = len(line[0].nbytes)
    x = [i / count for i in range(count + 1)]
    heights = [[v / unit for v in (*band.nbytes, *band.nbytes[-1:])] for band in line]
    ax.stackplot(x, heights, colors=[colors[band.name] for band in line], step="post", lw=0)


def _packing(ax: Any, boxes: Sequence[Box], colors: Mapping[str, str], unit: int) -> None:
    from matplotlib.patches import Rectangle

    for box in boxes:
        corner, size = (box.start, box.offset / unit), (box.end - box.start, box.nbytes / unit)
        color = colors.get(box.name, _PLAIN["others"])
        ax.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white", lw=0.4))
    ax.set_ylim(0, 1.05 * max(box.offset + box.nbytes for box in boxes) / unit)
    ax.set_title("where its temporaries can lie, offsets", fontsize=10, loc="left")


def _legend(figure: Any, plan: Plan, colors: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = dict.fromkeys(band.name for line in plan.timelines for band in line)
    handles: list[Any] = [Patch(color=colors[name], label=name) for name in used]
    if plan.budget is not None:
        label = f"budget: {format_bytes(plan.budget)}"
        handles.append(Line2D([], [], color="#c0392b", ls="--", label=label))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.05, 0.02),
        ncol=3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"predicted bytes on {plan.device}", fontsize=11, x=0.08, ha="left")
