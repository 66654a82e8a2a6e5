"""Which layers of a model are merged in pairs, and how; `depth` does it."""

from __future__ import annotations

import dataclasses
import math

from .spec import Group


@dataclasses.dataclass(frozen=True)
class Merge:
    """Pairs of layers with one direction a token.

    Attributes:
      t: where the direction lies between those of the two layers; 0 is the first one's.
      apart: share of the cache's tokens that are kept unmerged.
      start: the share of the layers, from the first, that are not merged.
      layer: which layer of how many, where each has caches of its own; None where they are stacked.
    """

    t: float = 0.6
    apart: float = 0.05
    start: float = 0.5
    layer: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for field in ("t", "apart", "start"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"`{field}` is {getattr(self, field)}; expected a share in [0, 1]")

    def side(self, layer: int, layers: int) -> int | None:
        """0 for the first of a pair, 1 for the second, None for a layer by itself."""
        place = layer - math.floor(self.start * layers)
        alone = place < 0 or (place % 2 == 0 and layer + 1 == layers)
        return None if alone else place % 2

    def sides(self, group: Group) -> list[int | None]:
        """Of the layers that a group holds."""
        if self.layer is not None:
            return [self.side(*self.layer)]
        return [self.side(i, group.layers) for i in range(group.layers)]
