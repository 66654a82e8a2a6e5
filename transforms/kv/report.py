"""What became of each KV cache: a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from stowax.memory_planner import format_bytes

from ..report import html_table, text_table
from . import store
from .method import Method
from .spec import Group, Site


@dataclasses.dataclass(frozen=True)
class CacheRow:
    """The caches of one attention.

    Attributes:
      name: common path of the leaves.
      layout: sizes: stacked layers, batch B, heads K, tokens S, elements of a row D.
      method: how it is kept; "" for as it was.
      nbytes_before, nbytes: bytes of the buffers.
      tokens: tokens that the program's cache has room for, all layers and rows of the batch together.
      sites: the attentions that read it.
      reason: why it was kept.
    """

    name: str
    layout: str
    method: str
    nbytes_before: int
    nbytes: int
    tokens: int
    sites: tuple[Site, ...]
    reason: str = ""

    @classmethod
    def of(cls, group: Group, method: Method | None, sites: Sequence[Site]) -> CacheRow:
        widths = sorted({s.width for s in group.streams})
        layout = f"{'x'.join(map(str, group.stack)) + ' x ' if group.stack else ''}B={group.batch} K={group.heads} "
        layout += f"S={group.length} D={'/'.join(map(str, widths))}"
        after = group.nbytes if method is None else store.nbytes(method, group)
        reason = "kept by a rule" if method is None else ""
        name = "" if method is None else method.name
        tokens = group.length * group.batch
        return cls(group.name, layout, name, group.nbytes, after, tokens, tuple(sites), reason)

    @classmethod
    def kept(cls, name: str, leaf: Any, reason: str) -> CacheRow:
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        layout = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        return cls(name, layout, "", nbytes, nbytes, 0, (), reason)

    @property
    def how(self) -> str:
        forms = [f"{s.rows} new: {s.form} ({s.mask} mask)" for s in self.sites]
        counts = {f: forms.count(f) for f in forms}
        words = [f if n == 1 else f"{n}x {f}" for f, n in counts.items()]
        return "; ".join([*([self.reason] if self.reason else []), *words])


@dataclasses.dataclass(frozen=True)
class CacheTable:
    """What was done to every cache. Prints as a table."""

    rows: list[CacheRow]

    HEADER = ("cache", "layout", "method", "before", "after", "bytes/token", "attention")

    @property
    def nbytes_before(self) -> int:
        return sum(row.nbytes_before for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def __getitem__(self, name: str) -> CacheRow:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
        }

    def __str__(self) -> str:
        return f"{text_table(self.HEADER, self.cells())}\n{self.total()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self.cells(), self.total())

    def cells(self) -> list[tuple[object, ...]]:
        return [
            (
                row.name,
                row.layout,
                row.method or "-",
                format_bytes(row.nbytes_before),
                format_bytes(row.nbytes),
                f"{row.nbytes / row.tokens:,.0f}" if row.tokens else "",
                row.how,
            )
            for row in self.rows
        ]

    def total(self) -> str:
        packed = sum(bool(row.method) for row in self.rows)
        ratio = self.nbytes_before / max(1, self.nbytes)
        return (
            f"{packed} of {len(self.rows)} caches compressed: {format_bytes(self.nbytes_before)} -> "
            f"{format_bytes(self.nbytes)} ({ratio:.2f}x)"
        )
