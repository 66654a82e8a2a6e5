"""What a packing is, said so plainly that it is the judge of all the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .buffers import Buffer


def validate(
    buffers: Sequence[Buffer], offsets: Sequence[int], capacity: int, *, alignment: int = 1
) -> None:
    """Raises unless every buffer lies within the capacity and apart from all that live with it.

    Args:
      buffers: what is packed.
      offsets: the first byte of each buffer, in their order.
      capacity: bytes.
      alignment: bytes; every offset is a multiple of it.

    Raises:
      ValueError: the offsets are no packing; it names the buffers.
    """
    if len(offsets) != len(buffers):
        raise ValueError(f"`offsets` has {len(offsets)} entries, expected {len(buffers)}.")
    for b, offset in zip(buffers, offsets):
        if not 0 <= offset <= capacity - b.size:
            raise ValueError(f"`offsets`: {b} at {offset} isn't within [0, {capacity}).")
        if offset % alignment:
            raise ValueError(f"`offsets`: {b} at {offset} isn't at a multiple of {alignment}.")
    lower, upper = np.array([(b.lower, b.upper) for b in buffers], np.int64).reshape(-1, 2).T
    start = np.array(offsets, np.int64)
    end = start + np.array([b.size for b in buffers], np.int64)
    for i in range(len(buffers)):
        in_time = (lower[:i] < upper[i]) & (lower[i] < upper[:i])
        in_space = (start[:i] < end[i]) & (start[i] < end[:i])
        if (clash := np.flatnonzero(in_time & in_space)).size:
            raise ValueError(
                f"`offsets`: {buffers[clash[0]]} at {offsets[clash[0]]} and {buffers[i]} at "
                f"{offsets[i]} overlap."
            )
