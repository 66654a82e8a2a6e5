"""The definition of right: decode all of it, then multiply in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..codecs import Packed


def matmul(
    x: jax.Array, w: Packed, *, precision: Any = None, preferred_element_type: Any = None
) -> jax.Array:
    """``[*B, M, K] x [*B, N, K] -> [*B, M, N]``, every product and sum in float32."""
    del precision
    out = jnp.einsum(
        "...mk,...nk->...mn",
        x.astype(jnp.float32),
        w.decode().astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.astype(preferred_element_type or jnp.result_type(x.dtype, w.dtype))
