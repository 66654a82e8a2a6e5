"""The plots and the page that a person looks at."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Variant = Mapping[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } caption { text-align: left; color: #555; padding: .3em 0 }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child, td.text { text-align: left; white-space: normal } th { background: #f5f5f5 }
tr.base td { background: #eef4fb } svg { max-width: 100%; height: auto }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """One self-contained HTML page; `sections` are titles and HTML."""
    body = "".join(f"<h2>{html.escape(name)}</h2>\n{content}\n" for name, content in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]], base: str = "") -> str:
    """An HTML table; the row that begins with `base` is marked."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(str(c))}</td>" for c in row)
        lines.append(f"<tr{' class=base' if row[0] == base else ''}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def texts(variants: Sequence[Variant], prompt: str) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(v['name'])}</td><td class=text>{html.escape(v['text'])}</td></tr>"
        for v in variants
    )
    return (
        f"<table><caption>going on from “{html.escape(prompt)}”, greedily</caption>{rows}</table>"
    )


def quality_over_bytes(variants: Sequence[Variant], baseline: str) -> str:
    """Perplexity over true megabytes, as SVG."""
    base = next(v for v in variants if v["name"] == baseline)["perplexity"]
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.axhline(base, color="#888", lw=1, ls="--")
    axes.annotate(baseline, (0.01, base), xycoords=("axes fraction", "data"), va="bottom")
    others = sorted((v for v in variants if v["name"] != baseline), key=lambda v: v["weight_bytes"])
    for i, v in enumerate(others):
        x, y = v["weight_bytes"] / 1e6, v["perplexity"]
        axes.scatter(x, y, s=45, color=f"C{i % 10}", zorder=3)
        side = 1 if i % 2 == 0 else -1  # labels in turn right above and left below
        options = {"xytext": (6 * side, 9 * side), "ha": "left" if side > 0 else "right"}
        axes.annotate(v["name"], (x, y), textcoords="offset points", va="center", **options)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set(xlabel="weights, MB (scales and embedding counted)", ylabel="perplexity (log scale)")
    axes.margins(x=0.12, y=0.08)
    axes.grid(alpha=0.3, which="both")
    return _svg(figure)


def bars(variants: Sequence[Variant], key: str, label: str, scale: float = 1.0) -> str:
    """A horizontal bar for each variant, as SVG."""
    names = [v["name"] for v in variants]
    values = [v[key] * scale for v in variants]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 1))
    drawn = axes.barh(names, values, color="C0")
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def kv_over_bytes(found: Sequence[Variant], baseline: str, key: str) -> str:
    """Perplexity or accuracy over bytes of cache a token, the full cache as a line, as SVG.

    Points whose names differ only in their budget (``snapkv:0.25``) are one curve.
    """
    base = next(v for v in found if v["name"] == baseline)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.axhline(base[key], color="#888", lw=1, ls="--")
    axes.annotate(f"{baseline} cache, {base['bytes_per_token']:,.0f} bytes/token", (0.01, base[key]),
                  xycoords=("axes fraction", "data"), va="bottom", fontsize=9)  # fmt: skip
    curves: dict[str, list[Variant]] = {}
    for v in found:
        if v["name"] != baseline:
            curves.setdefault(v["name"].split(":")[0], []).append(v)
    for i, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda v: v["bytes_per_token"])
        x, y = [v["bytes_per_token"] for v in points], [v[key] for v in points]
        axes.plot(x, y, marker="osD^v"[i // 10 % 5], ms=6, lw=1.2, color=f"C{i % 10}", label=name)
        if len(points) == 1:
            axes.annotate(name, (x[0], y[0]), textcoords="offset points", xytext=(7, 5), fontsize=8)
    if any(len(points) > 1 for points in curves.values()):
        axes.legend(fontsize=8, ncols=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="cache, bytes a token (all layers, scales and buffers counted)", ylabel=key)
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.3, which="both")
    return _svg(figure)


def times(rows: Sequence[Mapping[str, Any]], x: str, label: str, path: Path, title: str) -> None:
    """Microseconds over `x`, a line for each codec and shape, those of peers dashed, as a PNG."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in (r for r in rows if "us" in r):
        shape = f" {row['k']}x{row['n']}" if "k" in row else ""
        lines.setdefault(row["spec"] + shape, []).append((row[x], row["us"]))
    figure, axes = plt.subplots(figsize=(9, 5))
    for name, points in lines.items():
        style: dict[str, Any] = {"ls": "--"} if name.startswith(("xla", "torch")) else {}
        style |= {"ls": "--", "color": "#888"} if name.startswith("bf16") else {}
        axes.plot(*zip(*sorted(points)), marker="o", ms=4, label=name, **style)
    axes.set(xscale="log", xlabel=label, ylabel="kernel time, us", title=title)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(
        sorted({row[x] for row in rows}), [str(v) for v in sorted({row[x] for row in rows})]
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def front(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Milliseconds over peak bytes: our plans as a line, named rules as points, as a PNG."""
    figure, axes = plt.subplots(figsize=(9, 5))
    ours = sorted((r["xla"] / 2**30, r["ms"]) for r in rows if r["name"].startswith("ours"))
    if ours:
        axes.plot(*zip(*ours), marker="o", color="#1f6feb", label="ours, by budget")
    named: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for row in (r for r in rows if not r["name"].startswith("ours")):
        named.setdefault((round(row["xla"] / 2**30, 1), round(row["ms"])), []).append(row)
    for same in named.values():  # one label where points lie on each other
        at, names = (same[0]["xla"] / 2**30, same[0]["ms"]), ", ".join(r["name"] for r in same)
        axes.plot(*at, "s", color="#888")
        axes.annotate(names, at, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="peak, GiB (XLA)", ylabel="ms a step", title=title)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
