"""cuDNN's flash attention, by way of `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LARGEST = (
    128  # elements of a row; Hopper takes twice as many, which is known on the GPU itself only
)


def refusal(q: Any, soft_cap: float | None) -> str:
    """Why cuDNN can't take this attention; "" where it can."""
    if soft_cap is not None:
        return "cuDNN has no soft cap"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > LARGEST:
        return f"cuDNN takes rows of a multiple of 8 elements up to {LARGEST}, not {q.shape[-1]}"
    return ""


def prefill_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array | None,
    seen: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    soft_cap: None,
) -> jax.Array:
    tokens_first = (jnp.swapaxes(x, 1, 2) for x in (q, keys, values))
    out = jax.nn.dot_product_attention(
        *tokens_first,
        mask=None if seen is None else seen[:, None],
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2)
