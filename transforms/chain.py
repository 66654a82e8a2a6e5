"""Composition: ``sx.chain(a, b, ...)`` is one transform, applied in one rewriting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .transform import Applicable, Claim, Leaf, Transform


@dataclasses.dataclass(frozen=True)
class Chain(Applicable):
    """See `chain`."""

    transforms: tuple[Transform, ...]

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"

    def claim(self, leaves: Sequence[Leaf], strict: bool) -> dict[str, Claim]:
        claims: dict[str, Claim] = {}
        for transform in self.transforms:
            left = [leaf for leaf in leaves if leaf.name not in claims]
            claims |= transform.claim(left, strict)
        return claims


def chain(*transforms: Transform) -> Chain:
    """Applies transforms to one function; a leaf goes to the first that claims it.

    Raises:
      ValueError: without a transform.
    """
    if not transforms:
        raise ValueError("`chain` needs at least one transform; got none")
    flat: list[Transform] = []
    for transform in transforms:
        flat += transform.transforms if isinstance(transform, Chain) else (transform,)
    return Chain(tuple(flat))
