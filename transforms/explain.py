"""What a transform did: a row for every leaf, as a table and as data."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from stowax.memory_planner import format_bytes

from .core import Use
from .report import ByteTable, Table, counted

if TYPE_CHECKING:
    from stowax.pallas_kernels.codecs import Packed

    from .kv.report import CacheTable
    from .transform import Leaf


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the weights.

    Attributes:
      name: its path.
      shape, dtype: of the tensor.
      codec: how it is stored; "" for as it was.
      nbytes_before, nbytes: true bytes, before and after.
      reason: why it was kept, or a remark.
      uses: every use of it in the program.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    nbytes_before: int
    nbytes: int
    reason: str
    uses: tuple[Use, ...]

    @classmethod
    def of(cls, leaf: Leaf, codec: str, nbytes: int | None, reason: str, uses: list[Use]) -> Row:
        shape, dtype = tuple(leaf.value.shape), leaf.value.dtype
        before = math.prod(shape) * dtype.itemsize
        after = before if nbytes is None else nbytes
        return cls(leaf.name, shape, dtype.name, codec, before, after, reason, tuple(uses))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(ByteTable):
    """What was done at every leaf. Prints as a table; `to_dict` is the same as data.

    Attributes:
      rows: the weights.
      caches: the KV caches, where the transform compresses them.
    """

    rows: list[Row]
    caches: CacheTable | None = None

    HEADER = ("weight", "shape", "codec", "bits", "before", "after", "used by", "how")

    def to_dict(self) -> dict[str, Any]:
        rows = [
            dataclasses.asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.rows
        ]
        found = {"rows": rows, "nbytes_before": self.nbytes_before, "nbytes": self.nbytes}
        return found | ({"caches": self.caches.to_dict()} if self.caches is not None else {})

    def __str__(self) -> str:
        weights = super().__str__()
        return weights if self.caches is None else f"{weights}\n\n{self.caches}"

    def _repr_html_(self) -> str:
        weights = super()._repr_html_()
        return weights if self.caches is None else weights + self.caches._repr_html_()

    def cells(self) -> list[tuple[object, ...]]:
        return [
            (
                row.name,
                f"{row.dtype}[{','.join(map(str, row.shape))}]",
                row.codec or "-",
                f"{row.bits_per_weight:.2f}",
                format_bytes(row.nbytes_before),
                format_bytes(row.nbytes),
                counted([use.op for use in row.uses]),
                _how(row),
            )
            for row in self.rows
        ]

    def total(self) -> str:
        return self.saved("leaves packed", sum(bool(row.codec) for row in self.rows))


@dataclasses.dataclass(frozen=True)
class EncodeRow:
    """How one leaf was packed.

    Attributes:
      info: what the solver says: relative errors, damping, and any fallback with its reason.
    """

    name: str
    codec: str
    solver: str
    nbytes: int
    bits_per_weight: float
    info: dict[str, Any]

    @classmethod
    def of(cls, leaf: Leaf, packed: Packed, solver: str, info: dict[str, Any]) -> EncodeRow:
        bits = packed.bits_per_weight
        return cls(leaf.name, packed.codec.name, solver, packed.nbytes, bits, dict(info))


@dataclasses.dataclass(frozen=True, repr=False)
class EncodeReport(Table):
    """The errors of an encoding, a row for each packed leaf."""

    rows: list[EncodeRow]

    HEADER = (
        "weight",
        "codec",
        "solver",
        "bits",
        "bytes",
        "weight error",
        "output error",
        "remarks",
    )
    CAPTION = "encoding"

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def cells(self) -> list[tuple[object, ...]]:
        shown = ("weight_error", "output_error")
        error = lambda row, key: f"{row.info[key]:.5f}" if key in row.info else ""
        rest = lambda row: [
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in row.info.items()
            if k not in shown
        ]
        return [
            (
                row.name,
                row.codec,
                row.solver,
                f"{row.bits_per_weight:.2f}",
                format_bytes(row.nbytes),
                *(error(row, key) for key in shown),
                ", ".join(rest(row)),
            )
            for row in self.rows
        ]


def _how(row: Row) -> str:
    lines = [use.how + (f" ({use.reason})" if use.reason else "") for use in row.uses]
    if not row.codec or row.reason:
        return row.reason
    return counted(lines) or "not used"
