"""A tensor stored by a codec, as a pytree that stands for the tensor.

Invariants: every part is ``[*lead, n]`` with ``lead`` that of the view (or 1 where it is shared along an
axis), and ``decode()`` has the view's shape and dtype. Transposes, reshapes, casts and slices of the tensor
give a `Packed` over the same buffers; the codes are never touched.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .base import Codec, Parts
from .static import Static
from .view import View, storage_view


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A stored tensor.

    Attributes:
      parts: the arrays of the codec, by name.
      codec: how they are to be read.
      view: how the logical tensor lies on them.
      guessed: the encoded axes were chosen by convention, not from a program.
      name: the tensor's path, set only while a program is analysed.
    """

    parts: Parts
    codec: Codec
    view: View
    guessed: bool = False
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def ndim(self) -> int:
        return len(self.view.dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.view.dtype)

    @property
    def nbytes(self) -> int:
        """True bytes of the buffers: codes, scales and zero points."""
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.view.storage_shape)

    def decode(self) -> jax.Array:
        """The tensor itself, ``[*shape]`` of ``dtype``."""
        view = self.view
        x = self.codec.decode(self.parts, view.length)
        return _unfold(x, view)

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"Packed({self.codec.name}, {self.dtype.name}[{shape}], {self.nbytes:,} bytes)"

    def reshape(self, shape: Sequence[int]) -> Packed:
        view = self.view.reshape(shape)
        if view.lead == self.view.lead:
            return dataclasses.replace(self, view=view)
        parts = {k: _split_lead(p, self.view.lead, view.lead) for k, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, view=view)

    def transpose(self, permutation: Sequence[int]) -> Packed:
        return dataclasses.replace(self, view=self.view.transpose(permutation))

    def squeeze(self, dimensions: Sequence[int]) -> Packed:
        return dataclasses.replace(self, view=self.view.squeeze(dimensions))

    def expand(self, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> Packed:
        return dataclasses.replace(self, view=self.view.expand(shape, broadcast_dimensions))

    def cast(self, dtype: jnp.dtype) -> Packed:
        return dataclasses.replace(self, view=self.view.cast(jnp.dtype(dtype).name))

    def slice(self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Packed:
        """`lax.slice` along dimensions that are lead axes."""
        out = self
        for dim, (start, limit, stride) in enumerate(zip(starts, limits, strides)):
            if (start, limit, stride) != (0, self.shape[dim], 1):
                take = lambda p, axis, s=(start, limit, stride): lax.slice_in_dim(p, *s, axis=axis)
                out = out._take(dim, len(range(start, limit, stride)), take)
        return out

    def dynamic_slice(self, starts: Sequence[jax.Array], sizes: Sequence[int]) -> Packed:
        """`lax.dynamic_slice` along dimensions that are lead axes."""
        out = self
        for dim, (start, size) in enumerate(zip(starts, sizes)):
            if size != self.shape[dim]:
                take = lambda p, axis, s=(start, size): lax.dynamic_slice_in_dim(p, *s, axis=axis)
                out = out._take(dim, size, take)
        return out

    def rows(self, dim: int, indices: jax.Array, at: int) -> Packed:
        """Entries `indices` of `dim`, which leaves; the index's axes become dimensions from `at` on.

        Indices are clipped to the dimension.
        """
        view, axis = self.view.drop(dim)

        def gather(part: jax.Array) -> jax.Array:
            if part.shape[axis] == 1 != self.view.lead[axis]:
                taken = jnp.squeeze(part, axis)
                return jnp.broadcast_to(taken, (1,) * indices.ndim + taken.shape)
            taken = jnp.take(part, indices, axis=axis, mode="clip")
            source = range(axis, axis + indices.ndim)
            return jnp.moveaxis(taken, tuple(source), tuple(range(indices.ndim)))

        parts = {k: gather(p) for k, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, view=view.push(indices.shape, at))

    def unstack(self, dim: int = 0) -> tuple[Packed, int]:
        """For a scan over `dim`: the entry's `Packed` with the stacked parts, stacked axis in front.

        The parts have one axis more than the view says until the scan has taken it.
        """
        view, axis = self.view.drop(dim)
        size = self.view.lead[axis]

        def front(part: jax.Array) -> jax.Array:
            part = jnp.moveaxis(part, axis, 0)
            return (
                part if part.shape[0] == size else jnp.broadcast_to(part, (size, *part.shape[1:]))
            )

        parts = {k: front(p) for k, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, view=view), size

    def folded(self, batch: Sequence[int] = ()) -> Packed:
        """As ``[B, N, K]``: dimensions `batch`, the other leading axes, and the encoded axis."""
        lead = self.view.lead
        front = [a for dim in batch for a in self.view.dims[dim] if a < len(lead)]
        rows = [a for a in range(len(lead)) if a not in front]
        sizes = [math.prod(lead[a] for a in axes) for axes in (front, rows)]
        view = storage_view((*sizes, self.view.length), self.view.dtypes[0], (0, 1), (2,))
        view = dataclasses.replace(view, dtypes=self.view.dtypes)
        parts = {k: _merge_lead(p, lead, (front, rows)) for k, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, view=view)

    def _take(self, dim: int, size: int, take: Callable[[jax.Array, int], jax.Array]) -> Packed:
        view, axis = self.view.take(dim, size)
        shared = lambda p: p.shape[axis] == 1 != self.view.lead[axis]
        parts = {k: p if shared(p) else take(p, axis) for k, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, view=view)

    @functools.cached_property
    def _static(self) -> Static:
        names = tuple(sorted(self.parts))
        return Static((names, self.codec, self.view, self.guessed, self.name))

    def tree_flatten(self):
        return [self.parts[name] for name in self._static.value[0]], self._static

    def tree_flatten_with_keys(self):
        names = self._static.value[0]
        return [(jax.tree_util.GetAttrKey(name), self.parts[name]) for name in names], self._static

    @classmethod
    def tree_unflatten(cls, aux, children) -> Packed:
        names, *static = aux.value
        packed = cls(dict(zip(names, children)), *static)
        packed.__dict__["_static"] = aux
        return packed


def pack(x: jax.Array, codec: Codec, *, lead: Sequence[int], inner: Sequence[int]) -> Packed:
    """Encodes `x` with its axes `inner` (in this order) along the encoded axis.

    Args:
      x: the tensor, float.
      codec: how to store it.
      lead: axes of `x` that become leading axes of storage, batch axes first.
      inner: the other axes.
    """
    view = storage_view(x.shape, x.dtype.name, lead, inner)
    return Packed(codec.encode(fold(x, lead, inner)), codec, view)


def fold(x: jax.Array, lead: Sequence[int], inner: Sequence[int]) -> jax.Array:
    """`x` as storage: ``[*lead, prod(inner)]``."""
    x = jnp.transpose(x, (*lead, *inner))
    return x.reshape(*x.shape[: len(lead)], -1)


def _unfold(x: jax.Array, view: View) -> jax.Array:
    """Storage values ``f32[*lead, length]`` as the logical tensor."""
    order = [a for dim in view.dims for a in dim]
    rest = [a for a in range(len(view.sizes)) if a not in order]  # all of size 1
    x = x.reshape(view.sizes).transpose(*order, *rest).reshape(view.shape)
    for dtype in view.dtypes:
        x = x.astype(dtype)
    return x


def _split_lead(part: jax.Array, old: tuple[int, ...], new: tuple[int, ...]) -> jax.Array:
    """Reshapes the leading axes of a part from `old` to the finer `new`; shared axes stay size 1."""
    shape, i = [], 0
    for size, have in zip(old, part.shape):
        pieces, left = [], size
        while i < len(new) and (left > 1 or (not pieces)):
            pieces.append(new[i])
            left //= max(new[i], 1)
            i += 1
        shape += pieces if have == size else [1] * len(pieces)
    return part.reshape(*shape, part.shape[-1])


def _merge_lead(
    part: jax.Array, lead: tuple[int, ...], groups: Sequence[Sequence[int]]
) -> jax.Array:
    """A part with each group of leading axes merged into one; all-shared groups stay size 1."""
    part = part.transpose(*(a for group in groups for a in group), part.ndim - 1)
    shape, sizes, at = [], [], 0
    for group in groups:
        want = [lead[a] for a in group]
        have = list(part.shape[at : at + len(group)])
        shared = all(size == 1 for size in have)
        shape += have if shared else want
        sizes.append(1 if shared else math.prod(want))
        at += len(group)
    return jnp.broadcast_to(part, (*shape, part.shape[-1])).reshape(*sizes, part.shape[-1])
