"""MiniMalloc's files: CSV with a row for each buffer."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .buffers import Buffer

COLUMNS = ("id", "lower", "upper", "size")


def read_buffers(path: str | os.PathLike[str]) -> list[Buffer]:
    """Reads buffers from a CSV file with the columns `id,lower,upper,size`, in any order.

    Raises:
      ValueError: a column is missing or not known, or a row is no buffer; it names the file.
    """
    with Path(path).open(newline="") as file:
        rows = csv.DictReader(file)
        if sorted(rows.fieldnames or ()) != sorted(COLUMNS):
            raise ValueError(
                f"`path`: {path} has the columns {rows.fieldnames}, expected {list(COLUMNS)}."
            )
        return [_buffer(path, rows.line_num, row) for row in rows]


def _buffer(path: object, line: int, row: dict[str, str]) -> Buffer:
    try:
        return Buffer(row["id"], int(row["lower"]), int(row["upper"]), int(row["size"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`path`: {path}, line {line}: {error}") from None
