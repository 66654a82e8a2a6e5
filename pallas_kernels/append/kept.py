"""What a cache keeps of its rows."""

from __future__ import annotations

from typing import NamedTuple

import jax

from ..decode_attention.rows import Rows


class Kept(NamedTuple):
    """One stream of a cache: its keys, or its values.

    Attributes:
      rows: all of them, packed, ``[B, K, S, H]``.
      sinks: the first ones in full, ``[B, K, n, H]``; n may be 0.
      recent: the newest ones in full, ``[B, K, R, H]``, a ring; R may be 0.
    """

    rows: Rows
    sinks: jax.Array
    recent: jax.Array
