"""The path that works everywhere: decode a tile of rows, multiply, go on.

A weight whose decoded matrix fits in `TILE_BYTES` is one tile. The decode is recomputed in the backward pass,
so nothing of the decoded weight is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..codecs import Packed

TILE_BYTES = 16 * 2**20  # of decoded float32 weights


def tile_count(w: Packed, tile_bytes: int | None = None) -> int:
    """How many tiles of rows `w` is decoded in: if possible a number that divides the rows."""
    rows, most = w.shape[-2], tile_bytes or TILE_BYTES
    wanted = min(rows, max(1, math.ceil(4 * math.prod(w.shape[-2:]) / most)))
    return next((n for n in range(wanted, min(4 * wanted, rows) + 1) if rows % n == 0), wanted)


def matmul(
    x: jax.Array,
    w: Packed,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    tile_bytes: int | None = None,
) -> jax.Array:
    """``[*B, M, K] x [*B, N, K] -> [*B, M, N]``, at most a tile of `w` decoded at a time.

    Args:
      tile_bytes: of a tile in float32; None is `TILE_BYTES`.
    """
    dot = functools.partial(
        _dot, precision=precision, preferred_element_type=preferred_element_type
    )
    return jax.checkpoint(functools.partial(tiled, dot, tile_bytes))(x, w)


def tiled(dot: Any, tile_bytes: int | None, x: jax.Array, w: Packed) -> jax.Array:
    """``dot(x, w)`` a tile of rows of `w` after another; `tile_bytes` as in `matmul`."""
    if x.ndim > 2 and x.shape[0] == 1:  # a batch axis of 1 would cost a copy of the codes
        entry = jax.tree.map(lambda part: part[0], w.unstack(0)[0])
        return tiled(dot, tile_bytes, x[0], entry)[None]
    tiles = tile_count(w, tile_bytes)
    if tiles == 1:
        return dot(x, w)
    *batch, rows, length = w.shape
    height = rows // tiles
    body, rest = tiles * height, rows - tiles * height
    stacked, _ = _rows(w, 0, body).reshape((*batch, tiles, height, length)).unstack(len(batch))
    _, out = lax.scan(lambda _, tile: (None, dot(x, tile)), None, stacked)
    out = jnp.moveaxis(out, 0, -2)  # [*B, M, tiles, height]
    out = out.reshape(*out.shape[:-2], body)
    if rest:
        out = jnp.concatenate([out, dot(x, _rows(w, body, rows))], axis=-1)
    return out


def _rows(w: Packed, start: int, stop: int) -> Packed:
    starts, limits = [0] * w.ndim, list(w.shape)
    starts[-2], limits[-2] = start, stop
    return w.slice(starts, limits, (1,) * w.ndim)


def _dot(x: jax.Array, w: Packed, **options: Any) -> jax.Array:
    batch = tuple(range(x.ndim - 2))
    last = ((x.ndim - 1,), (x.ndim - 1,))
    return lax.dot_general(x, w.decode(), (last, (batch, batch)), **options)
