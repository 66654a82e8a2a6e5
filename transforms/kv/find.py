"""What a program does with its caches: groups, attentions, and what was refused and why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from ..core.program import Program, is_packed, logical
from . import fused, prefill
from .expr import Cell, Node, is_rooted
from .masks import mask_name
from .match import Attention, stream_key
from .rewrite import CacheRun, Store, Unfit
from .source import Source, find_source
from .spec import Group, Refused, Site


@dataclasses.dataclass(frozen=True)
class Caches:
    """The caches of a program.

    Attributes:
      groups: what can be compressed.
      sites: every attention over a cache.
      refused: the other leaves of the caches, with reasons.
      outputs: for each leaf of a group, its place among the program's results.
      escapes: names of groups whose attention weights are used outside the attention.
      postponed: each `cond` of which only some branches attend, by identity.
      sources: by name of a group, what gives its `Source` or raises LayoutError; where it was asked for.
    """

    groups: tuple[Group, ...]
    sites: tuple[Site, ...]
    refused: tuple[Refused, ...]
    outputs: dict[str, int]
    escapes: frozenset[str]
    postponed: frozenset[int] = frozenset()
    sources: Mapping[str, Callable[[], Source]] = dataclasses.field(default_factory=dict)

    def group_of(self, leaf: str) -> Group | None:
        return next((g for g in self.groups for name, _, _ in g.leaves if name == leaf), None)


class Probe(CacheRun):
    """Records attentions, and the names of their `masks`; nothing is computed."""

    def __init__(self, masks: bool, sources: bool) -> None:
        super().__init__(strict=False, history=sources)
        self.masks = masks
        self.sources: dict[str, Callable[[], Source]] = {}
        self.groups: dict[frozenset[str], Group] = {}
        self.sites: list[Site] = []
        self.escapes: set[str] = set()
        self.behind: set[str] = (
            set()
        )  # caches that attention reads with the new rows behind the old

    def attention(self, found: Attention) -> jax.Array:
        group = _group(found)
        key = frozenset(name for name, _, _ in group.leaves)
        for other in self.groups:
            if other != key and other & key:
                raise Unfit(sorted(key), "attentions read it together with different caches")
        known = self.groups.setdefault(key, group)
        if known != group:
            raise Unfit(sorted(key), "attentions read it in different layouts")
        self.sources.setdefault(group.name, functools.partial(find_source, self, found))
        self.sites.append(self.site(group, found))
        for read in found.reads:
            read.cell.store.opened = found
        aval: Any = found.eqn.outvars[0].aval
        return jnp.zeros(aval.shape, aval.dtype)

    def site(self, group: Group, found: Attention) -> Site:
        site = Site(group.name, compat.where(found.eqn), found.rows, found.describe())
        if not self.masks:
            return site
        site = dataclasses.replace(site, mask=mask_name(self, found))
        try:
            return dataclasses.replace(site, **self.usual(found))
        except LayoutError as error:
            return dataclasses.replace(site, unusual=str(error))

    def usual(self, found: Attention) -> dict[str, Any]:
        """What a kernel or a library asks of an attention. Raises LayoutError where none can run it."""
        if found.rows < 2:
            size, dtype = fused.query_shape(fused.usual(self, found))
            return {"group_size": size, "dtype": dtype}
        many = prefill.form(self, found)
        size, dtype = prefill.query_shape(many)
        return {"group_size": size, "dtype": dtype, "structure": prefill.name(many)}

    def reduced(self, found: Attention, value: Node) -> jax.Array:
        return jnp.zeros(value.shape, value.dtype)

    def close(self, store: Store) -> None:
        found = store.opened
        if found is not None and self.written(store) is not found and found.start == "grow":
            self.behind.update(read.cell.name for read in found.reads)

    def view_array(self, node: Node, eqn: Any = None, reason: str = "") -> jax.Array:
        assert node.view is not None
        cell = node.view.cell
        if cell.pages is not None:
            reason = reason or "a paged pool is used otherwise than by attention"
            raise Unfit([cell.name], reason)
        if cell.store.opened is None or not reason:
            op = f"`{eqn.primitive.name}`: " if eqn is not None else ""
            raise Unfit([cell.name], op + (reason or "it is used as an array"), "")
        self.escapes.add(cell.name)
        return jnp.zeros(node.shape, node.dtype)


def find(
    program: Program, names: Sequence[str], *, masks: bool = False, sources: bool = False
) -> Caches:
    """Looks at the leaves `names` of a program (one for each traced leaf, "" for no cache); names `masks`
    and keeps what gives `sources` on demand."""
    refused: dict[str, str] = {}
    while True:
        probe = Probe(masks, sources)
        try:
            outputs = _probe(probe, program, names, refused)
        except Unfit as error:
            new = [leaf for leaf in error.leaves if leaf not in refused]
            if not new:
                raise RuntimeError(f"a leaf is refused twice: {error}") from error
            refused.update(dict.fromkeys(new, error.reason))
            continue
        lost = _check(probe, outputs, refused)
        if not lost:
            break
        refused.update(lost)
    for key, group in probe.groups.items():
        if key & probe.behind:
            probe.groups[key] = dataclasses.replace(group, grows=False)
    grouped = {name for group in probe.groups.values() for name, _, _ in group.leaves}
    for leaf, name in zip(program.leaves, names):
        if name and can_hold_rows(leaf) and name not in grouped and name not in refused:
            why = "no attention reads it" if name in outputs else "it is never updated and returned"
            refused[name] = why
    return Caches(
        tuple(probe.groups.values()),
        tuple(probe.sites),
        tuple(Refused(leaf, why) for leaf, why in refused.items()),
        {leaf: i for leaf, i in outputs.items() if leaf in grouped},
        frozenset(probe.escapes),
        frozenset(probe.postponed),
        probe.sources,
    )


def _check(probe: Probe, outputs: dict[str, int], refused: dict[str, str]) -> dict[str, str]:
    """Leaves of groups that are not returned whole."""
    lost = {}
    for group in probe.groups.values():
        for leaf, _, _ in group.leaves:
            if leaf not in outputs and leaf not in refused:
                why = "the updated cache is not a result of the program"
                lost.update({name: why for name, _, _ in group.leaves})
    return lost


def _probe(
    probe: Probe, program: Program, names: Sequence[str], refused: dict[str, str]
) -> dict[str, int]:
    cells: dict[str, Cell] = {}
    plain: list[int] = []
    for i, (leaf, name) in enumerate(zip(program.leaves, names)):
        if name and name not in refused and can_hold_rows(leaf):
            cells[name] = Cell(name, leaf.shape, leaf.dtype, (), Store())
        else:
            plain.append(i)
    outputs: dict[str, int] = {}

    def run(arrays: list[Any]) -> None:
        given = dict(zip(plain, arrays))
        probe.history.fix(x for i, x in given.items() if program.names[i])
        values = [given[i] if i in given else cells[name].node() for i, name in enumerate(names)]
        for j, value in enumerate(probe.run(program.jaxpr, values)):
            cell = probe.result(value, "the program")
            if cell is not None and (value.view.writes or cell.store.opened is not None):
                if cell.name in outputs:
                    raise Unfit([cell.name], "the program returns it twice")
                outputs[cell.name] = j
            elif is_rooted(value) and cell is None:
                probe.array(value, None, "it is a result of the program")
        for cell in cells.values():
            probe.close(cell.store)

    leaves = [program.leaves[i] for i in plain]
    jax.eval_shape(run, [leaf if is_packed(leaf) else logical(leaf) for leaf in leaves])
    return outputs


def can_hold_rows(leaf: Any) -> bool:
    return not is_packed(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2


def _group(found: Attention) -> Group:
    first = found.reads[0].cell
    stack = first.stack + ((found.index[0],) if found.index is not None else ())
    order = {"key": 0, "both": 1, "value": 2}
    reads = sorted(found.reads, key=lambda r: (order[r.role], r.cell.name, r.part))
    cells = {r.cell.name: r.cell for r in reads}
    leaves = tuple((c.name, c.stack + c.shape, c.dtype.name) for c in cells.values())
    read = reads[0]
    streams = dict.fromkeys(map(stream_key, reads))
    grows = found.start == "grow" if isinstance(found.start, str) else False
    length = found.length - (found.rows if grows else 0)
    paged = any(cell.pages is not None for cell in cells.values())
    return Group(leaves, tuple(streams), stack, read.batch, read.heads, length, grows, paged)
