"""Greedy and sampled generation with any step function.

`step` is ``(params, tokens[B, T], cache) -> (logits f32[B, T, V], cache)``: a model's own, or one
that a transform has rewritten, with the parameters and the cache that go with it. The prompt is
read in chunks (prefill), then one compiled loop makes the tokens (decode).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only the `top_k` most likely tokens; 0 for all.
      top_p: only the most likely tokens that together have this probability, in (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 or more, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 (all tokens) or more, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What was generated.

    Attributes:
      tokens: for each row of the batch the new tokens, without the end token.
      cache: the cache afterwards.
      prefill_ms: time to read the prompt, compilation excluded; None without ``timing``.
      decode_tokens_per_s: tokens of all rows per second of the decode loop, compilation excluded;
        None without ``timing`` or when there was nothing to decode.
    """

    tokens: list[list[int]]
    cache: Any
    prefill_ms: float | None = None
    decode_tokens_per_s: float | None = None


def generate(
    step: Callable,
    params: Any,
    cache: Any,
    prompt: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    prefill_chunk: int = 256,
    timing: bool = False,
) -> Generated:
    """Continues a prompt.

    Args:
      step: the model's step function; the same object again needs no new compilation.
      params: its parameters.
      cache: an empty cache with room for ``len(prompt) + max_tokens`` tokens. That is the caller's
        to see to: the layout of a cache is not known here.
      prompt: token ids ``[T]``, or ``[B, T]`` for a batch of prompts of one length.
      max_tokens: how many tokens to make at most.
      sampling: how the next token is chosen; None for the most likely one.
      eos_ids: tokens that end a row; the loop stops when all rows have ended.
      seed: of the random choices.
      prefill_chunk: the prompt is read this many tokens at a time, so that no more logits than that
        exist at once.
      timing: measure. Runs the prefill twice and one decode step more, to leave out compilation.

    Raises:
      ValueError: an empty prompt, or options out of range.
    """
    prompt = _check_prompt(prompt)
    if max_tokens < 1 or prefill_chunk < 1:
        raise ValueError(
            f"`max_tokens` and `prefill_chunk` must be at least 1, got {max_tokens} and"
            f" {prefill_chunk}."
        )
    sampling = sampling or Sampling()
    prefill = functools.partial(_prefill, step, params, cache, prompt, prefill_chunk)
    (logits, cache), prefill_s = _timed(prefill, prefill if timing else None)

    key = jax.random.key(seed)
    decode = functools.partial(_decode, step, sampling, tuple(eos_ids), max_tokens)
    run = functools.partial(decode, params, logits, cache, key)
    warm_up = functools.partial(run, 1) if timing else None
    (tokens, made, cache), decode_s = _timed(functools.partial(run, max_tokens), warm_up)

    steps = int(made) - 1  # the first token comes from the prefill's logits
    rate = len(prompt) * steps / decode_s if timing and steps else None
    return Generated(
        _cut(np.asarray(tokens)[:, : int(made)], eos_ids),
        cache,
        1e3 * prefill_s if timing else None,
        rate,
    )


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Chooses a token for each row of ``logits f32[B, V]``; ``int32[B]``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = _keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Drops every token before which the more likely ones already hold `top_p`."""
    order = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    smallest = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(step, params, tokens, cache):
    logits, cache = step(params, tokens, cache)
    return logits[:, -1], cache


def _prefill(step, params, cache, prompt: np.ndarray, chunk: int):
    logits = None
    for start in range(0, prompt.shape[1], chunk):
        tokens = jnp.asarray(prompt[:, start : start + chunk])
        logits, cache = _last_logits(step, params, tokens, cache)
    return logits, cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(step, sampling, eos_ids, max_tokens, params, logits, cache, key, limit):
    """Makes up to `limit` tokens: ``(int32[B, max_tokens], how many, cache)``.

    The token made last is not fed back: nothing needs what would follow it.
    """
    batch = logits.shape[0]
    ends = jnp.asarray(eos_ids, jnp.int32)

    def choose(made, logits, tokens, done):
        token = sample(logits, sampling, jax.random.fold_in(key, made))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, made))
        return tokens, token, done | jnp.isin(token, ends)

    def body(state):
        made, tokens, token, done, cache = state
        logits, cache = step(params, token[:, None], cache)
        tokens, token, done = choose(made, logits[:, -1], tokens, done)
        return made + 1, tokens, token, done, cache

    def goes_on(state):
        made, _, _, done, _ = state
        return (made < limit) & ~jnp.all(done)

    empty = jnp.zeros((batch, max_tokens), jnp.int32)
    first = choose(jnp.int32(0), logits, empty, jnp.zeros(batch, bool))
    made, tokens, _, _, cache = jax.lax.while_loop(goes_on, body, (jnp.int32(1), *first, cache))
    return tokens, made, cache


def _timed(run: Callable, warm_up: Callable | None):
    """The result of `run` and its seconds, after running `warm_up` where one is given."""
    if warm_up is not None:
        jax.block_until_ready(warm_up())
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - start


def _check_prompt(prompt) -> np.ndarray:
    prompt = np.asarray(prompt)
    if prompt.size == 0 or prompt.ndim not in (1, 2) or prompt.dtype.kind not in "iu":
        raise ValueError(
            "`prompt` must be token ids, [length] or [batch, length], not empty; got"
            f" {prompt.dtype}{list(prompt.shape)}."
        )
    return np.atleast_2d(prompt).astype(np.int32)


def _cut(tokens: np.ndarray, eos_ids: Sequence[int]) -> list[list[int]]:
    """Each row up to its first end token."""
    rows = []
    for row in tokens.tolist():
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        rows.append(row[: ends[0]] if ends else row)
    return rows
