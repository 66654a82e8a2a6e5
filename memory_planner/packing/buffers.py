"""What is packed: buffers, and the same buffers as arrays in units."""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
from collections.abc import Hashable, Sequence

import numpy as np

LARGEST = 2**62  # sums and differences of what is smaller stay within int64


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A block of memory, live on the half-open interval [lower, upper).

    Attributes:
      id: what names it in errors; unique among the buffers that are packed together.
      lower: the first time at which it is live, an integer in any unit.
      upper: the first time at which it is live no more, above `lower`.
      size: bytes (or another unit, the capacity's), at least 1.

    Raises:
      ValueError: a field that isn't an integer, or out of its range.
    """

    id: Hashable
    lower: int
    upper: int
    size: int

    def __post_init__(self) -> None:
        for name in ("lower", "upper", "size"):
            object.__setattr__(self, name, self._integer(name))
        if self.upper <= self.lower:
            raise ValueError(
                f"`upper` of buffer {self.id!r} is {self.upper}, expected above `lower`={self.lower}: "
                "a buffer is live on [lower, upper)."
            )
        if self.size < 1:
            raise ValueError(
                f"`size` of buffer {self.id!r} is {self.size}, expected at least 1: "
                "leave empty buffers out."
            )

    def _integer(self, name: str) -> int:
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            raise ValueError(
                f"`{name}` of buffer {self.id!r} is {value!r}, expected an integer."
            ) from None
        if abs(number) >= LARGEST:
            raise ValueError(f"`{name}` of buffer {self.id!r} is {number}, expected below 2**62.")
        return number

    def __str__(self) -> str:
        return f"{self.id} ({self.size} on [{self.lower}, {self.upper}))"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Buffers as int64 arrays.

    Sizes are in units of `unit` bytes, the greatest that all of them (rounded up to the alignment)
    are multiples of. Nothing is lost: pushed down as far as it goes, every buffer of a packing lies
    at a sum of sizes.
    """

    lower: np.ndarray
    upper: np.ndarray
    size: np.ndarray
    unit: int

    def __len__(self) -> int:
        return len(self.size)

    def live(self) -> tuple[np.ndarray, np.ndarray]:
        """The times at which a buffer starts, and the units live at each of them."""
        times = np.unique(self.lower)
        return times, self._total(self.lower, times) - self._total(self.upper, times)

    def max_live(self) -> int:
        """Units live at once: no packing needs less."""
        return int(self.live()[1].max(initial=0))

    def take(self, indices: np.ndarray) -> Problem:
        return Problem(self.lower[indices], self.upper[indices], self.size[indices], self.unit)

    def _total(self, when: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Units of the buffers with `when` <= each of `times`."""
        order = np.argsort(when)
        sums = np.concatenate([[0], np.cumsum(self.size[order])])
        return sums[np.searchsorted(when[order], times, side="right")]


def problem_of(buffers: Sequence[Buffer], alignment: int) -> Problem:
    """Checks the arguments that all callers share.

    Raises:
      ValueError: `alignment` below 1, an id that occurs twice, sizes that sum up to 2**62 or more.
    """
    if alignment < 1:
        raise ValueError(f"`alignment` is {alignment}, expected at least 1.")
    counts = collections.Counter(b.id for b in buffers)
    if twice := [id for id, count in counts.items() if count > 1]:
        raise ValueError(f"`buffers` has ids that occur more than once: {twice[:5]}.")
    sizes = [-(-b.size // alignment) * alignment for b in buffers]
    if sum(sizes) >= LARGEST:
        raise ValueError(f"`buffers` have {sum(sizes)} bytes in total, expected below 2**62.")
    unit = math.gcd(*sizes) or 1
    lower, upper = [b.lower for b in buffers], [b.upper for b in buffers]
    columns = (np.array(column, np.int64) for column in (lower, upper, [s // unit for s in sizes]))
    return Problem(*columns, unit=unit)
