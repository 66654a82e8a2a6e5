"""Attention of one new token to a packed cache.

Letters: ``B`` batch, ``N`` query heads, ``K`` heads of the cache, ``S`` tokens of the cache, ``H`` elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..checks import check_implementation, check_soft_cap
from . import dispatch
from .dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from .dispatch import attention_kernel as attention_kernel
from .rows import FullRows as FullRows
from .rows import Rows as Rows
from .rows import heads_of
from .rows import pack_rows as pack_rows


def decode_attention(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    *,
    seen: jax.Array | None = None,
    hidden: jax.Array | None = None,
    full: FullRows | Sequence[FullRows] = (),
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    weights: bool = False,
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """``softmax(scale * q @ keys.T) @ values`` over the first `lengths` tokens of each row of the batch.

    Args:
      q: ``[B, N, H]``, float; N a multiple of the cache's K heads. The GPU kernel rounds it to float16.
      keys, values: packed ``[B, K, S, H]``; see `pack_rows`. Or ``[B, 1, S, H]``, a pool of rows for K heads; then K is
        that of `lengths`, `seen` or `full`, and `seen` tells whose a row is.
      lengths: ``int32[B]``, or ``int32[B, K]`` for heads that hold different numbers: tokens that are there, 0 to S.
      seen: ``bool[B, S]``, or ``bool[B, K, S]``: which of those tokens are attended to; None for all. Any mask that the
        query heads of a cache's head have in common.
      hidden: ``int32[B, E]``: tokens of the packed rows that are not attended to, because `full` has them; -1 or S and
        more for none.
      full: more rows, in full precision, under the same softmax; see `FullRows`. Several are not put together first.
      scale: of the scores; None is ``H ** -0.5``.
      soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
      window: only the last `window` tokens of the packed rows are seen.
      weights: the weights of the softmax are a result too.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has for these shapes.

    Returns:
      The output ``[B, N, H]`` of q's dtype, and the logarithm of the softmax's denominator ``f32[B, N]`` (natural;
      -inf where no token is seen, and there the output is 0): what is needed to join it with attention to other rows.
      With `weights` a third: a tuple of those of the packed rows ``f32[B, N, S]``, 0 where not seen, and for each of
      `full` ``f32[B, N, E]``.

    Raises:
      ValueError: for shapes that do not fit, or an unknown `implementation`.
      NotImplementedError: where the named implementation can't take these operands, with the reason.
    """
    b, n, h = q.shape
    full = (full,) if isinstance(full, FullRows) else tuple(full)
    heads = heads_of(keys, lengths, seen, full)
    stored, want = ((b, k, keys.tokens, h) for k in (keys.heads, heads))
    if keys.shape != stored or values.shape != stored or n % heads:
        raise ValueError(
            f"`q` {q.shape}, `keys` {keys.shape} and `values` {values.shape} do not fit: expected [B, N, H] and twice "
            f"[B, K, S, H], N a multiple of K (here {heads})"
        )
    if lengths.shape not in ((b,), want[:2]) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"`lengths` is {lengths.dtype}{list(lengths.shape)}; expected int32[{b}] or int32[{b}, {heads}]"
        )
    _check_seen("seen", seen, want[:3])
    if hidden is not None and (hidden.ndim != 2 or hidden.shape[0] != b):
        raise ValueError(f"`hidden` is {hidden.dtype}{list(hidden.shape)}; expected int32[{b}, E]")
    for part in full:
        rows = (*want[:2], part.keys.shape[2], h)
        if part.keys.shape != rows or part.values.shape != rows:
            raise ValueError(
                f"`full` has keys {part.keys.shape} and values {part.values.shape}; expected twice {rows}"
            )
        _check_seen("full.seen", part.seen, rows[:3])
    if window is not None and window < 1:
        raise ValueError(f"`window` is {window}; expected at least 1 token, or None")
    check_soft_cap(soft_cap)
    check_implementation(implementation, IMPLEMENTATIONS)
    scale = 1 / math.sqrt(h) if scale is None else scale
    options: dict[str, Any] = {
        "scale": scale,
        "soft_cap": soft_cap,
        "window": window,
        "weights": weights,
    }
    return dispatch.run((q, keys, values, lengths, seen, hidden, full), options, implementation)


def _check_seen(name: str, seen: jax.Array | None, shape: tuple[int, ...]) -> None:
    b, k, s = shape
    if seen is not None and (seen.dtype != jnp.bool_ or seen.shape not in ((b, s), (b, k, s))):
        raise ValueError(
            f"`{name}` is {seen.dtype}{list(seen.shape)}; expected bool[{b}, {s}] or bool[{b}, {k}, {s}]"
        )
