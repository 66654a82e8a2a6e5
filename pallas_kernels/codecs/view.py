"""How a logical tensor is read off storage: labels on axes, and the layout ops that move them.

Storage is ``[*lead, length]`` and ``length`` is the product of ``inner``. Every axis of ``lead`` and every
factor in ``inner`` is an *atom*, numbered from 0 through both. A dimension of the logical tensor is a
tuple of atoms, outermost first; ``()`` is a dimension of size 1. Layout ops on the logical tensor only
relabel, split atoms, or take a part of a lead axis; whatever else they would need is a `LayoutError`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Dims = tuple[tuple[int, ...], ...]


class LayoutError(Exception):
    """The op is no relabelling of this storage: its reason, for a report."""


@dataclasses.dataclass(frozen=True)
class View:
    """A logical tensor over storage.

    Attributes:
      lead: sizes of the leading axes of storage.
      inner: factors of the encoded axis, outermost first.
      dims: the atoms of each logical dimension. Atoms of size 1 may be in no dimension.
      dtypes: the dtype of the stored tensor, then of every cast on the way.
      axes: the axis of the stored tensor that each atom is a part of; -1 for a gather's index.
    """

    lead: tuple[int, ...]
    inner: tuple[int, ...]
    dims: Dims
    dtypes: tuple[str, ...]
    axes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each atom."""
        return self.lead + self.inner

    @property
    def length(self) -> int:
        return math.prod(self.inner)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        return (*self.lead, self.length)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[a] for a in dim) for dim in self.dims)

    @property
    def dtype(self) -> str:
        return self.dtypes[-1]

    def is_inner(self, atom: int) -> bool:
        return atom >= len(self.lead)

    def sized(self, dim: int) -> tuple[int, ...]:
        """The atoms of logical dimension `dim` whose size is not 1."""
        return tuple(a for a in self.dims[dim] if self.sizes[a] != 1)

    def lead_axis(self, dim: int) -> int:
        """The lead axis that is the whole of dimension `dim`."""
        atoms = self.sized(dim) or self.dims[dim][:1]
        if len(atoms) != 1:
            raise LayoutError(f"dimension {dim} is made of {len(atoms)} stored axes")
        if self.is_inner(atoms[0]):
            raise LayoutError(f"dimension {dim} lies along the encoded axis")
        return atoms[0]

    def cast(self, dtype: str) -> View:
        return dataclasses.replace(self, dtypes=(*self.dtypes, dtype))

    def transpose(self, permutation: Sequence[int]) -> View:
        return dataclasses.replace(self, dims=tuple(self.dims[i] for i in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> View:
        kept = [dim for i, dim in enumerate(self.dims) if i not in set(dimensions)]
        return dataclasses.replace(self, dims=tuple(kept))

    def expand(self, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> View:
        """`lax.broadcast_in_dim` that only adds dimensions of size 1."""
        dims: list[tuple[int, ...]] = [()] * len(shape)
        for source, target in enumerate(broadcast_dimensions):
            dims[target] = self.dims[source]
        view = dataclasses.replace(self, dims=tuple(dims))
        if view.shape != tuple(shape):
            raise LayoutError("it is broadcast to a larger shape")
        return view

    def reshape(self, shape: Sequence[int]) -> View:
        """Splits atoms where `shape` cuts through them. The new view may have a finer ``lead``."""
        factors = [[size] for size in self.sizes]  # what each atom is split into, outermost first
        todo = [(a, self.sizes[a]) for dim in self.dims for a in dim if self.sizes[a] != 1]
        todo.reverse()
        pieces: list[list[tuple[int, int]]] = []  # per new dimension: (atom, index of its factor)
        for size in shape:
            dim: list[tuple[int, int]] = []
            while size != 1:
                atom, left = todo.pop() if todo else (0, 0)
                if left > size > 0 and left % size == 0:
                    factors[atom][-1:] = [size, left // size]
                    todo.append((atom, left // size))
                    dim.append((atom, len(factors[atom]) - 2))
                    break
                if left == 0 or size % left:
                    raise LayoutError(f"the reshape to {tuple(shape)} cuts across stored axes")
                dim.append((atom, len(factors[atom]) - 1))
                size //= left
            pieces.append(dim)
        first = [0]
        for f in factors:
            first.append(first[-1] + len(f))
        n = len(self.lead)
        return View(
            lead=tuple(s for f in factors[:n] for s in f),
            inner=tuple(s for f in factors[n:] for s in f),
            dims=tuple(tuple(first[a] + i for a, i in dim) for dim in pieces),
            dtypes=self.dtypes,
            axes=tuple(axis for axis, f in zip(self.axes, factors) for _ in f),
        )

    def take(self, dim: int, size: int) -> tuple[View, int]:
        """Keeps `size` entries of `dim`: the new view and the lead axis to take them from."""
        axis = self.lead_axis(dim)
        lead = (*self.lead[:axis], size, *self.lead[axis + 1 :])
        return dataclasses.replace(self, lead=lead), axis

    def drop(self, dim: int) -> tuple[View, int]:
        """Removes a dimension that is a lead axis: the new view and that axis (a scan takes it)."""
        axis = self.lead_axis(dim)
        dims = tuple(
            tuple(a - (a > axis) for a in atoms if a != axis)
            for i, atoms in enumerate(self.dims)
            if i != dim
        )
        lead = self.lead[:axis] + self.lead[axis + 1 :]
        axes = self.axes[:axis] + self.axes[axis + 1 :]
        return dataclasses.replace(self, lead=lead, dims=dims, axes=axes), axis

    def push(self, sizes: Sequence[int], at: int) -> View:
        """Adds lead axes of `sizes` in front, as logical dimensions from `at` on (a gather's batch)."""
        n = len(sizes)
        dims = [tuple(a + n for a in dim) for dim in self.dims]
        dims[at:at] = [(i,) for i in range(n)]
        axes = (-1,) * n + self.axes
        return dataclasses.replace(self, lead=(*sizes, *self.lead), dims=tuple(dims), axes=axes)


def storage_view(
    shape: Sequence[int], dtype: str, lead: Sequence[int], inner: Sequence[int]
) -> View:
    """The view of a tensor of `shape` whose axes `lead`, then `inner`, are stored in this order."""
    order = (*lead, *inner)
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"`lead` {lead} and `inner` {inner} are not the axes of shape {shape}")
    return View(
        lead=tuple(shape[a] for a in lead),
        inner=tuple(shape[a] for a in inner),
        dims=tuple((order.index(axis),) for axis in range(len(shape))),
        dtypes=(dtype,),
        axes=order,
    )
