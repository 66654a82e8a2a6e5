"""Formats of weights and caches as options: which of those that a user accepts each weight and each cache gets.

The table is made by the transforms themselves: `quantize` says what a codec makes of each weight, `compress_kv` what a
recipe makes of each cache. Bytes are theirs; seconds are those of reading them once, by the bandwidth of the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stowax.memory_planner import Device, Option, Problem, Site

from ..compress_kv import compress_kv
from ..quantize import quantize
from .formats import ON_HOST, PLAIN, Format, Roles, method
from .search import Search


@dataclasses.dataclass(frozen=True)
class Row:
    """A weight or a cache: its options, and for each what it stands for."""

    site: Site
    formats: tuple[Format, ...]


def table(
    fn: Callable[..., Any],
    args: Sequence[Any],
    roles: Roles,
    weights: Sequence[str],
    caches: Sequence[str],
    search: Search,
) -> list[Row]:
    """For each weight and cache its options. One step down in the order of preference loses its share of all bytes.

    What a format does not make smaller is no option.
    """
    rows: dict[tuple[str, str], list[Format]] = {}
    found = [
        *_weights(fn, args, roles, weights),
        *_caches(fn, args, roles, caches, search.host > 0),
    ]
    for f in found:
        plain = dataclasses.replace(f, how=PLAIN, nbytes=f.before, host=0)
        own = rows.setdefault((f.kind, f.name), [plain])
        if f.nbytes < own[0].nbytes:
            own.append(f)
    order = {"weights": [PLAIN, *weights], "cache": [PLAIN, *caches]}
    totals = {
        kind: sum(own[0].before for (k, _), own in rows.items() if k == kind) for kind in order
    }
    stacks = {tier.site.name: tier.site.options[1] for tier in search.tiers}
    made = []
    for (kind, name), own in rows.items():
        share = own[0].before / totals[kind]
        options = [(f, share * order[kind].index(f.how.removeprefix(ON_HOST))) for f in own]
        pairs = [(_option(f, loss, search.device), f) for f, loss in options]
        if (stack := stacks.get(f"0/{roles.params}/{name}")) is not None and kind == "weights":
            pairs += [(_streamed(option, stack), f) for option, f in pairs]
        sites, formats = zip(*pairs)
        made.append(Row(Site(f"{kind} {name}", sites), formats))
    return made


def problem(search: Search, rows: Sequence[Row]) -> Problem:
    """What a search chooses, with these sites first, in the place of its own of the same arguments."""
    own = search.numbers(0).problem
    names = {row.site.name.partition(" ")[2] for row in rows}
    rest = [s for s in own.sites if s.name.split("/", 2)[2] not in names]
    return dataclasses.replace(own, sites=(*(row.site for row in rows), *rest))


def _option(f: Format, loss: float, device: Device) -> Option:
    return Option(
        f.how, f.nbytes, f.host, up=f.host, seconds=f.nbytes / device.bandwidth, loss=loss
    )


def _streamed(option: Option, stack: Option) -> Option:
    """A weight on the host, packed or not: so much of it is staged and moved as of the plain one, `stack`."""
    size = option.nbytes
    staged, reads = size * stack.nbytes // stack.host, stack.up // stack.host
    seconds = option.seconds
    return Option(
        f"{ON_HOST}{option.name}", staged, size, up=size * reads, seconds=seconds, loss=option.loss
    )


def _weights(fn: Any, args: Any, roles: Roles, codecs: Sequence[str]) -> Iterator[Format]:
    for codec in codecs:
        table = quantize(codec)(fn, params=roles.params).explain(*args)
        for row in table.rows:
            if row.codec:
                yield Format("weights", row.name, codec, row.nbytes_before, row.nbytes, 0)


def _caches(fn: Any, args: Any, roles: Roles, names: Sequence[str], host: bool) -> Iterator[Format]:
    if names and roles.cache is None:
        raise ValueError("`caches` is given and `cache` is not: say which argument holds the cache")
    for name in [n for own in names for n in ((own, f"host:{own}") if host else (own,))]:
        step = compress_kv(method(name))(fn, params=roles.params, cache=roles.cache or 0)
        caches: Any = step.explain(*args).caches
        for row in caches.rows:
            if not row.reason:
                here = row.nbytes - row.nbytes_host
                yield Format("cache", row.name, name, row.nbytes_before, here, row.nbytes_host)
