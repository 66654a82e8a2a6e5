"""Tables for people: aligned text, and HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, ClassVar

from stowax.memory_planner import format_bytes

Cells = Sequence[Sequence[object]]


class Table:
    """A report that prints as a table, in notebooks as HTML; subclasses are dataclasses with `rows`."""

    HEADER: ClassVar[tuple[str, ...]]
    CAPTION: ClassVar[str] = ""

    rows: list[Any]

    def cells(self) -> Cells:
        """The table's rows."""
        raise NotImplementedError

    def total(self) -> str:
        """The line below the table."""
        return ""

    def __str__(self) -> str:
        return "\n".join(filter(None, (text_table(self.HEADER, self.cells()), self.total())))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self.cells(), self.total() or self.CAPTION)


class ByteTable(Table):
    """A `Table` whose rows have `name`, `nbytes_before` and `nbytes`."""

    @property
    def nbytes_before(self) -> int:
        return sum(row.nbytes_before for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def __getitem__(self, name: str) -> Any:
        return next(row for row in self.rows if row.name == name)

    def saved(self, what: str, changed: int) -> str:
        """`changed` of the rows, and bytes before and after."""
        ratio = self.nbytes_before / max(1, self.nbytes)
        return (
            f"{changed} of {len(self.rows)} {what}: {format_bytes(self.nbytes_before)} -> "
            f"{format_bytes(self.nbytes)} ({ratio:.2f}x)"
        )


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


def counted(words: Sequence[str], separator: str = ", ") -> str:
    """Words, each once, with how often it stands there."""
    counts = {word: words.count(word) for word in words}
    return separator.join(word if n == 1 else f"{n}x {word}" for word, n in counts.items())


def _is_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-")[:1].isdigit()
