"""Accuracy of any step function on the recall tasks, read the way a server reads a prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import tasks
from .tasks import Example


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracies of one task, from 0 to 1.

    Attributes:
      exact: share of answers that are right in every token.
      token: share of answer tokens that are right, each with the right ones before it.
    """

    exact: float
    token: float


def score(
    step: Callable,
    params: Any,
    init: Callable[[int, int], Any],
    examples: Example,
    *,
    prefill_chunk: int | None = None,
    compress: Callable[[Any], Any] | None = None,
    compress_after: str = "context",
) -> Score:
    """Reads context and question through `step`, then the answer token by token.

    The context is read first, in one call or in chunks; then the question but for its last token;
    then one token at a time, from the last of the question on. The answer is teacher-forced. A
    greedy decode follows it as long as all is right, so that `Score.exact` is that of greedy
    decoding.

    Args:
      step: ``(params, tokens int32[B, T], cache) -> (logits f32[B, T, V], cache)``: a model's own or
        a rewritten one. It is compiled here; the same object again needs no new compilation.
      params: its parameters.
      init: ``(batch, length) -> cache``, empty, with room for `length` tokens.
      examples: from `tasks.batch`.
      prefill_chunk: the context is read this many tokens at a time; None for all at once.
      compress: ``cache -> cache``, called once; None for nothing. A cache that `step` itself keeps
        small needs none.
      compress_after: "context" (before the question is seen) or "question" (the tokens that tell
        what is asked are in the cache, the answer is still to come).

    Raises:
      ValueError: `examples` is not a batch, or an option is none of those above.
    """
    _check(examples, prefill_chunk, compress_after)
    compress = compress or (lambda cache: cache)
    prompt, end = examples.prompt, examples.context_end
    count, asked = prompt.shape[0], prompt.shape[1] - 1
    cache = init(count, prompt.shape[1] + examples.answer.shape[1])
    chunk = prefill_chunk or end
    for start in range(0, end, chunk):
        _, cache = _read(step, params, prompt[:, start : min(start + chunk, end)], cache)
    if compress_after == "context":
        cache = compress(cache)
    _, cache = _read(step, params, prompt[:, end:asked], cache)
    if compress_after == "question":
        cache = compress(cache)
    given = np.concatenate([prompt[:, asked:], examples.answer[:, :-1]], axis=1)
    guesses = []
    for i in range(given.shape[1]):
        guess, cache = _read(step, params, given[:, i : i + 1], cache)
        guesses.append(guess)
    right = np.stack([np.asarray(g) for g in guesses], axis=1) == examples.answer
    return Score(float(right.all(axis=1).mean()), float(right.mean()))


def score_all(
    step: Callable,
    params: Any,
    init: Callable[[int, int], Any],
    *,
    names: Sequence[str] | None = None,
    length: int = 256,
    count: int = 64,
    seed: int = 0,
    **options: Any,
) -> dict[str, Score]:
    """`score` of each task: `count` examples with contexts of `length` tokens.

    Args:
      step, params, init: as `score` takes them.
      names: tasks; None for all of `tasks.TASKS`.
      length, count, seed: as `tasks.batch` takes them.
      options: of `score`.
    """
    names = tuple(tasks.TASKS) if names is None else names
    batches = {name: tasks.batch(name, seed, count, length) for name in names}
    return {name: score(step, params, init, b, **options) for name, b in batches.items()}


@functools.partial(jax.jit, static_argnums=0)
def _read(step, params, tokens, cache):
    """The most likely token after `tokens`, ``int32[B]``, and the cache."""
    logits, cache = step(params, jnp.asarray(tokens), cache)
    return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache


def _check(examples: Example, prefill_chunk: int | None, compress_after: str) -> None:
    if examples.prompt.ndim != 2 or examples.answer.ndim != 2:
        raise ValueError(
            "`examples` must be a batch, prompt [B, T] and answer [B, A], from tasks.batch; got"
            f" shapes {examples.prompt.shape} and {examples.answer.shape}."
        )
    if not 0 < examples.context_end < examples.prompt.shape[1] - 1:
        raise ValueError(
            "`examples` must have a context and a question of at least 2 tokens; context_end is"
            f" {examples.context_end} of {examples.prompt.shape[1]}."
        )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"`prefill_chunk` must be at least 1 or None, got {prefill_chunk}.")
    if compress_after not in ("context", "question"):
        raise ValueError(
            f'`compress_after` must be "context" or "question", got {compress_after!r}.'
        )
