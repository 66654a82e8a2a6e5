"""Axes as labels: what becomes of an array's axes on the way through a program.

Every dimension is a tuple of *atoms*, outermost first; ``()`` is a dimension of size 1. A reshape that cuts
through an atom splits it, everywhere: labels are read through `Axes.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stowax.pallas_kernels.codecs import LayoutError


class Atom:
    """One axis, compared by identity.

    Attributes:
      size: its length.
      parent, start: the atom that it is a slice of, and where that begins.
      extra: entries before and after the axis proper (columns concatenated to scores).
      base: the axis proper, where there are extra entries.
    """

    __slots__ = ("base", "extra", "parent", "size", "start")

    def __init__(
        self,
        size: int,
        parent: Atom | None = None,
        start: int = 0,
        base: Atom | None = None,
        extra: tuple[int, int] = (0, 0),
    ):
        self.size, self.parent, self.start = size, parent, start
        self.base, self.extra = base, extra

    def __repr__(self) -> str:
        return f"{'abcdefghijklmnopqrstuvwxyz'[id(self) // 64 % 26]}{self.size}"


Dim = tuple[Atom, ...]
Labels = tuple[Dim, ...]


def fresh(shape: Sequence[int]) -> Labels:
    """New atoms for an array of `shape`."""
    return tuple((Atom(size),) if size != 1 else () for size in shape)


class Axes:
    """The atoms of one rewriting, and how they were split."""

    def __init__(self) -> None:
        self.parts: dict[Atom, Dim] = {}
        self.joined: dict[Dim, Atom] = {}

    def resolve(self, dim: Iterable[Atom]) -> Dim:
        """The atoms of a dimension, each as far split as it ever was; merged ones as one."""
        out: list[Atom] = []
        for atom in dim:
            parts = self.parts.get(atom)
            out += (atom,) if parts is None else self.resolve(parts)
        return tuple(out)

    def labels(self, labels: Labels) -> Labels:
        return tuple(map(self.resolve, labels))

    def reshape(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """Labels after a reshape to `shape`; splits atoms where it cuts through them."""
        todo = [atom for dim in self.labels(labels) for atom in dim]
        todo.reverse()
        out: list[Dim] = []
        for size in shape:
            dim: list[Atom] = []
            while size != 1:
                atom = todo.pop() if todo else Atom(0)
                if atom.size > size > 0 and atom.size % size == 0:
                    front, back = Atom(size), Atom(atom.size // size)
                    self.split(atom, (front, back))
                    todo.append(back)
                    dim.append(front)
                    break
                if atom.size == 0 or size % atom.size:
                    raise LayoutError(f"the reshape to {tuple(shape)} cuts across its axes")
                dim.append(atom)
                size //= atom.size
            out.append(self.joined_dim(tuple(dim)))
        return tuple(out)

    def join(self, parts: Dim, whole: Atom) -> None:
        """Says that two axes, where a reshape brings them together, are one."""
        self.joined[parts] = whole

    def joined_dim(self, dim: Dim) -> Dim:
        for i in range(len(dim) - 1):
            whole = self.joined.get(dim[i : i + 2])
            if whole is not None:
                return (*dim[:i], whole, *dim[i + 2 :])
        return dim

    def split(self, atom: Atom, parts: Dim) -> None:
        assert math.prod(p.size for p in parts) == atom.size
        self.parts[atom] = parts

    def merge(self, a: Dim, b: Dim) -> Dim:
        """Says that two dimensions are one axis: what is true of one is true of the other."""
        left, right = self.unify(a, b)
        for x, y in zip(left, right):
            if x is not y:
                self.parts[y] = (x,)
        return left

    def unify(self, a: Dim, b: Dim) -> tuple[Dim, Dim]:
        """Two dimensions of one size with their atoms split alike."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        i = 0
        while i < max(len(left), len(right)):
            x, y = left[i], right[i]
            if x.size == y.size:
                i += 1
                continue
            big, small, side = (x, y, left) if x.size > y.size else (y, x, right)
            if big.size % small.size:
                raise LayoutError("two axes of one size are made of different parts")
            parts = (Atom(small.size), Atom(big.size // small.size))
            self.split(big, parts)
            side[i : i + 1] = parts
        return tuple(left), tuple(right)
