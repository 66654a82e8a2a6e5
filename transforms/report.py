"""Tables for people: aligned text, and HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

Cells = Sequence[Sequence[object]]


def text_table(header: Sequence[str], rows: Cells) -> str:
    """Columns aligned: numbers to the right, words to the left."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        fit = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)]
        return "  ".join(fit).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, cells)])


def html_table(header: Sequence[str], rows: Cells, caption: str = "") -> str:
    cell = lambda tag, c: f"<{tag} style='text-align:left'>{html.escape(str(c))}</{tag}>"
    lines = ["".join(cell("td", c) for c in row) for row in rows]
    head = "".join(cell("th", c) for c in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def _is_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-")[:1].isdigit()
