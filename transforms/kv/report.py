"""What became of each KV cache: a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from stowax.memory_planner import format_bytes

from ..report import ByteTable, counted
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
      nbytes_host: those of `nbytes` that are in host memory.
      tokens: tokens that the program's cache has room for, all layers and rows of the batch together.
      sites: the attentions that read it.
      layers: bytes of each layer, by head and shared; () for as it was.
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
    layers: tuple[store.Bytes, ...] = ()
    nbytes_host: int = 0

    @classmethod
    def of(cls, group: Group, method: Method | None, sites: Sequence[Site]) -> CacheRow:
        widths = sorted({s.width for s in group.streams})
        layout = f"{'x'.join(map(str, group.stack)) + ' x ' if group.stack else ''}B={group.batch} K={group.heads} "
        layout += f"S={group.length} D={'/'.join(map(str, widths))}"
        after = group.nbytes if method is None else store.nbytes(method, group)
        reason = "kept by a rule" if method is None else ""
        name = "" if method is None else method.name
        tokens = group.length * group.batch
        if method is None:
            layers, host = (), 0
        else:
            layers, host = store.layer_nbytes(method, group), store.nbytes_host(method, group)
        sites = tuple(sites)
        return cls(
            group.name, layout, name, group.nbytes, after, tokens, sites, reason, layers, host
        )

    @classmethod
    def kept(cls, name: str, leaf: Any, reason: str) -> CacheRow:
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        layout = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        return cls(name, layout, "", nbytes, nbytes, 0, (), reason)

    @property
    def after(self) -> str:
        """Bytes on the device and on the host."""
        if not self.nbytes_host:
            return format_bytes(self.nbytes)
        device = format_bytes(self.nbytes - self.nbytes_host)
        return f"{device} + {format_bytes(self.nbytes_host)} on host"

    @property
    def each(self) -> str:
        """Bytes of a layer: of each head, and of what heads share; of the first and the last where layers differ."""
        layers = self.layers
        if not layers:
            return ""
        parts = [_span([x.head for x in layers]) + " a head", _span([x.shared for x in layers])]
        return f"{_span([x.total for x in layers])}: {' + '.join(parts)}"

    @property
    def how(self) -> str:
        forms = [
            f"{s.rows} new: {s.form} ({s.mask} mask){s.path and ', '}{s.path}{s.keeps and ', kept by '}{s.keeps}"
            for s in self.sites
        ]
        return "; ".join(filter(None, (self.reason, counted(forms, "; "))))


@dataclasses.dataclass(frozen=True, repr=False)
class CacheTable(ByteTable):
    """What was done to every cache. Prints as a table."""

    rows: list[CacheRow]

    HEADER = ("cache", "layout", "method", "before", "after", "bytes/token", "a layer", "attention")

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "nbytes_host": self.nbytes_host,
        }

    @property
    def nbytes_host(self) -> int:
        return sum(row.nbytes_host for row in self.rows)

    def cells(self) -> list[tuple[object, ...]]:
        return [
            (
                row.name,
                row.layout,
                row.method or "-",
                format_bytes(row.nbytes_before),
                row.after,
                f"{row.nbytes / row.tokens:,.0f}" if row.tokens else "",
                row.each,
                row.how,
            )
            for row in self.rows
        ]

    def total(self) -> str:
        line = self.saved("caches compressed", sum(bool(row.method) for row in self.rows))
        return line + (
            f", {format_bytes(self.nbytes_host)} of it on host" if self.nbytes_host else ""
        )


def _span(counts: Sequence[int]) -> str:
    ends = dict.fromkeys((counts[0], counts[-1]))
    return " to ".join(map(format_bytes, ends))
