"""What a program's caches are: groups of leaves that one attention reads, and their geometry."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that a cache stores: one for keys, one for values.

    Attributes:
      leaf: path of the cache's leaf.
      part: which part of the leaf's axes, where it holds more than one stream: ``((axis, start, size), ...)``.
      role: "key", "value", "both" (latent attention), or "input" (what keys and values are made of).
      width: elements of a row, D.
      dtype: of the leaf.
    """

    leaf: str
    part: tuple[tuple[int, int, int], ...]
    role: str
    width: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The caches of one attention (or of all layers of a scan).

    Attributes:
      leaves: paths, shapes and dtypes of the leaves.
      streams: what they hold.
      stack: sizes of the stacked axes, outermost first (layers under a scan).
      batch, heads: B and K.
      length: tokens that the program's cache has room for, S.
      grows: each call makes the program's cache longer (a concatenated cache).
      paged: it is a pool of pages, found by a block table.
      source: the rows that keys and values are made of, where those are stored instead.
    """

    leaves: tuple[tuple[str, tuple[int, ...], str], ...]
    streams: tuple[Stream, ...]
    stack: tuple[int, ...]
    batch: int
    heads: int
    length: int
    grows: bool = False
    paged: bool = False
    source: Stream | None = None

    @property
    def name(self) -> str:
        """The common part of the leaves' paths."""
        names = [leaf[0] for leaf in self.leaves]
        if len(names) == 1:
            return names[0]
        words = [n.split("/") for n in names]
        same = [w[0] for w in zip(*words) if len(set(w)) == 1]
        last = "+".join(w[-1] for w in words)
        return "/".join([*same, last]) if len(set(map(len, words))) == 1 else "+".join(names)

    @property
    def layers(self) -> int:
        return math.prod(self.stack)

    @property
    def nbytes(self) -> int:
        """Bytes of the program's own leaves."""
        return sum(math.prod(s) * jnp.dtype(d).itemsize for _, s, d in self.leaves)


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention in a program.

    Attributes:
      group: the name of its caches.
      where: name scopes.
      rows: new tokens in this call.
      form: the equations between the two matmuls.
      mask: its name, see `masks.mask_name`; "" where it was not asked for.
      unusual: why no kernel can run it, see `fused.usual`, `prefill.form`; "" where one can.
      group_size, dtype: of the queries: how many share a head of the cache, and their type; where a kernel can run it.
      structure: of the masks of many new tokens where the cache is empty, see `prefill.name`; "" where none is proved.
      path: what runs it, see `fused.describe`, `prefill.describe`; "" where it was not asked for.
      keeps: what stores its new rows, see `fused.keeper`; "" where it was not asked for.
    """

    group: str
    where: str
    rows: int = 0
    form: str = ""
    mask: str = ""
    unusual: str = ""
    group_size: int = 1
    dtype: str = "float32"
    structure: str = ""
    path: str = ""
    keeps: str = ""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A leaf of the caches that stays as it is, and why."""

    leaf: str
    reason: str
