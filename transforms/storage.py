"""Which axes of a weight are encoded: read from its uses, or guessed from its name.

The encoded axes are those that the weight's first matmul contracts, so that a scale can be applied after the sum
and calibrated solvers see the layer's inputs. Without a program there are only conventions; a guess can cost
speed, never correctness, and what is packed by a guess says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .core import Use

# best evidence first; a table that is also multiplied by (a tied embedding) is laid out for the matmul
_KINDS = ("matmul", "conv", "gather")

# (last words of the path, number of axes or None for any, encoded axes); first match wins.
# An empty tuple says that a leaf of this name is no weight.
CONVENTIONS: tuple[tuple[str, int | None, tuple[int, ...]], ...] = (
    (r"(bias|scale|gamma|beta|norm\w*|mean|var)(/weight)?$", None, ()),
    (r"(query|key|value)/kernel$", 3, (0,)),  # flax DenseGeneral: [embed, heads, head_dim]
    (r"out/kernel$", 3, (0, 1)),  # flax DenseGeneral: [heads, head_dim, embed]
    (r"embed\w*$", None, (-1,)),  # tables: [vocab, embed]
    (r"weight$", 4, (1, 2, 3)),  # [out, in, height, width]
    (r"weight$", None, (-1,)),  # [out, in], stacked or not
    (r"", 4, (0, 1, 2)),  # convolution: [height, width, in, out]
    (r"", None, (-2,)),  # [in, out], stacked or not
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a leaf lies in storage: axes `batch`, then `rows`, then the encoded axes `inner`."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    inner: tuple[int, ...]
    guessed: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        return self.batch + self.rows


def from_uses(ndim: int, uses: Sequence[Use]) -> Storage | None:
    """The storage that suits the best use of a leaf with `ndim` axes; None if it is no weight."""
    for kind in _KINDS:
        for use in uses:
            if use.kind == kind and use.inner and use.rows and not set(use.inner) & set(use.rows):
                batch = tuple(a for a in range(ndim) if a not in use.inner + use.rows)
                return Storage(batch, use.rows, use.inner)
    return None


def from_name(name: str, ndim: int) -> Storage | None:
    """A guess by convention; None for names that are no weights and for vectors."""
    if ndim < 2:
        return None
    for pattern, axes, inner in CONVENTIONS:
        if re.search(pattern, name.lower()) and axes in (None, ndim):
            inner = tuple(sorted(a % ndim for a in inner))
            lead = tuple(a for a in range(ndim) if a not in inner)
            return Storage(lead[:-1], lead[-1:], inner, guessed=True) if inner else None
    return None
