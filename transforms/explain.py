"""What a transform did: a row for every leaf, as a table and as data."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from stowax.memory_planner import format_bytes

from .core import Use
from .report import html_table, text_table

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


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was done at every leaf. Prints as a table; `to_dict` is the same as data.

    Attributes:
      rows: the weights.
      caches: the KV caches, where the transform compresses them.
    """

    rows: list[Row]
    caches: CacheTable | None = None

    HEADER = ("weight", "shape", "codec", "bits", "before", "after", "used by", "how")

    @property
    def nbytes_before(self) -> int:
        return sum(row.nbytes_before for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            dataclasses.asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.rows
        ]
        found = {"rows": rows, "nbytes_before": self.nbytes_before, "nbytes": self.nbytes}
        return found | ({"caches": self.caches.to_dict()} if self.caches is not None else {})

    def __str__(self) -> str:
        weights = f"{text_table(self.HEADER, self._cells())}\n{self._total()}"
        return weights if self.caches is None else f"{weights}\n\n{self.caches}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        weights = html_table(self.HEADER, self._cells(), self._total())
        return weights if self.caches is None else weights + self.caches._repr_html_()

    def _cells(self) -> list[tuple[object, ...]]:
        return [
            (
                row.name,
                f"{row.dtype}[{','.join(map(str, row.shape))}]",
                row.codec or "-",
                f"{row.bits_per_weight:.2f}",
                format_bytes(row.nbytes_before),
                format_bytes(row.nbytes),
                _counted([use.op for use in row.uses]),
                _how(row),
            )
            for row in self.rows
        ]

    def _total(self) -> str:
        packed = sum(bool(row.codec) for row in self.rows)
        ratio = self.nbytes_before / max(1, self.nbytes)
        return (
            f"{packed} of {len(self.rows)} leaves packed: {format_bytes(self.nbytes_before)} -> "
            f"{format_bytes(self.nbytes)} ({ratio:.2f}x)"
        )


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


@dataclasses.dataclass(frozen=True)
class EncodeReport:
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

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return text_table(self.HEADER, self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self._cells(), "encoding")

    def _cells(self) -> list[tuple[object, ...]]:
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
    return _counted(lines) or "not used"


def _counted(words: list[str]) -> str:
    counts = {word: words.count(word) for word in words}
    return ", ".join(word if n == 1 else f"{n}x {word}" for word, n in counts.items())
