"""Perplexity of a text under any next-token loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def perplexity(
    nll: Callable,
    params: Any,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """``exp`` of the mean negative log-likelihood of a text's tokens.

    The text is cut into windows of `window` tokens. Each starts with the last token of the one
    before, so that every token but the first is scored once, with the tokens of its window before
    it.

    Args:
      nll: ``(params, tokens int32[1, T]) -> f32[1, T-1]`` in nats; a model's own or a rewritten
        one. Compiled here, once, for one shape.
      params: its parameters.
      tokens: token ids of the text, at least 2.
      window: tokens in a window, at least 2.
      progress: called with (windows done, windows in all) after each window.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 1 or tokens.size < 2 or window < 2:
        raise ValueError(
            f"`tokens` must be [length] with at least 2 ids and `window` at least 2, got shape"
            f" {tokens.shape} and {window}."
        )
    window = min(window, tokens.size)
    starts = range(0, tokens.size - 1, window - 1)
    run, total = jax.jit(nll), 0.0
    for done, start in enumerate(starts, 1):
        part = tokens[start : start + window]
        # Padding comes after every scored token, where a causal model can't see it.
        padded = np.pad(part, (0, window - part.size))
        losses = np.asarray(run(params, jnp.asarray(padded[None])))[0, : part.size - 1]
        total += float(losses.astype(np.float64).sum())
        if progress is not None:
            progress(done, len(starts))
    return math.exp(total / (tokens.size - 1))
