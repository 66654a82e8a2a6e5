"""Attention of many new tokens to rows that are not packed.

Letters: ``B`` batch, ``N`` query heads, ``K`` heads of the cache, ``T`` queries, ``S`` tokens, ``H`` elements of a row.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..checks import check_implementation, check_soft_cap
from . import dispatch
from .dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from .dispatch import prefill_kernel as prefill_kernel
from .dispatch import prefill_refusal as prefill_refusal


def prefill_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    lengths: jax.Array | None = None,
    seen: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """``softmax(scale * q @ keys.T) @ values``, each query over the tokens that all of the masks let it see.

    On an NVIDIA GPU it is cuDNN's flash attention, which does not look at what `causal`, `window` and `lengths` hide,
    and reads `seen` as a bias of 2 bytes for each query and token.

    Args:
      q: ``[B, N, T, H]``, float; N a multiple of K. cuDNN takes bfloat16 and float16.
      keys, values: ``[B, K, S, H]`` of q's dtype.
      lengths: ``int32[B]``: only the first so many tokens are there; None for all.
      seen: ``bool[B or 1, T, S]``: the tokens that each query sees; None for all.
      causal: query t sees tokens 0 to t.
      window: with `causal`: only the last `window` of these.
      scale: of the scores; None is ``H ** -0.5``.
      soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has for these operands.

    Returns:
      ``[B, N, T, H]`` of q's dtype. For a query that sees no token it has no meaning.

    Raises:
      ValueError: for shapes, dtypes or masks that do not fit, or an unknown `implementation`.
      NotImplementedError: where the named implementation can't take these operands, with the reason.
    """
    _check_rows(q, keys, values)
    b, _, t, h = q.shape
    s = keys.shape[2]
    if lengths is not None and (lengths.shape != (b,) or lengths.dtype != jnp.int32):
        raise ValueError(f"`lengths` is {lengths.dtype}{list(lengths.shape)}; expected int32[{b}]")
    shapes = ((b, t, s), (1, t, s))
    if seen is not None and (seen.dtype != jnp.bool_ or seen.shape not in shapes):
        raise ValueError(
            f"`seen` is {seen.dtype}{list(seen.shape)}; expected bool[{b} or 1, {t}, {s}]"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"`window` is {window} with causal={causal}; expected at least 1 token and `causal`, or None"
        )
    check_soft_cap(soft_cap)
    check_implementation(implementation, IMPLEMENTATIONS)
    scale = 1 / math.sqrt(h) if scale is None else scale
    options: dict[str, Any] = {
        "causal": causal, "window": window, "scale": scale, "soft_cap": soft_cap,
    }  # fmt: skip
    return dispatch.run((q, keys, values, lengths, seen), options, implementation)


def _check_rows(q: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    fit = q.ndim == keys.ndim == 4 and keys.shape == values.shape
    fit = fit and q.shape[::3] == keys.shape[::3] and q.shape[1] % keys.shape[1] == 0
    if not fit:
        raise ValueError(
            f"`q` {q.shape}, `keys` {keys.shape} and `values` {values.shape} do not fit: expected [B, N, T, H] and "
            "twice [B, K, S, H], N a multiple of K"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"`q` is {q.dtype}, `keys` {keys.dtype}, `values` {values.dtype}; expected one dtype: cast them"
        )
