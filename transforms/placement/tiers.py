"""Which arguments may live in host memory, and what that moves each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stowax.memory_planner import Option, Site

from ..core import compat
from .flat import Flat
from .residuals import nbytes, scanned_only

SMALLEST = 1000  # an argument of less than one part in so many of all bytes stays where it is


@dataclasses.dataclass(frozen=True)
class Tier:
    """An argument that may be on the host.

    Attributes:
      argument: its number.
      site: its options, "device" and "host".
    """

    argument: int
    site: Site


def tiers(flat: Flat) -> list[Tier]:
    """The arguments that scans run over, fetched slice by slice; and those that updates replace, part by part."""
    found: dict[int, Option] = {}
    number = {v: i for i, v in enumerate(flat.jaxpr.invars)}
    for i in scanned_only(flat):
        var = flat.jaxpr.invars[i]
        scans = [e for e in flat.jaxpr.eqns if var in compat.variables(e)]
        size, trips = nbytes(var), min(e.params["length"] for e in scans)
        found[i] = Option("host", 2 * size // trips, size, up=size * len(scans))
    for update in flat.updates:
        for var in update.seeds:
            size = nbytes(var)  # of its parts one is there at a time, after those of the others
            found[number[var]] = Option("host", 0, size, size, size)
    least = sum(map(nbytes, number)) / SMALLEST
    here = {i: nbytes(flat.jaxpr.invars[i]) for i in found}
    return [
        Tier(i, Site(flat.names[i], (Option("device", here[i]), found[i])))
        for i in sorted(found)
        if here[i] >= least
    ]


def on_host(found: Sequence[Tier], options: Sequence[int]) -> frozenset[int]:
    """The numbers of the arguments that a choice has on the host."""
    return frozenset(t.argument for t, o in zip(found, options) if t.site.options[o].name == "host")
