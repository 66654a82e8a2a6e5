"""What is measured of a KV method: perplexity in decode mode, bytes of cache a token, a needle."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stowax as sx
from stowax import memory_planner
from stowax.transforms import Method

from . import kv_methods

CACHE_DTYPE = jnp.float16


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of a method.

    Attributes:
      name: see `kv_methods`.
      cache_bytes: of the buffers, for one sequence of `length` tokens.
      bytes_per_token: those over the tokens.
      perplexity: every token scored through the compressed cache, one decode step at a time.
      step_ms: time of a decode step of the whole batch.
      seconds: what measuring took, compilation included.
    """

    name: str
    cache_bytes: int
    bytes_per_token: float
    perplexity: float
    step_ms: float
    seconds: float


def rewritten(model: Any, method: Method) -> Any:
    return sx.compress_kv(method)(model.step, params=0, cache=2)


def empty_cache(model: Any, fast: Any, batch: int, length: int) -> Any:
    """The method's own cache, laid out from the program; the model's is never allocated."""
    shapes = jax.eval_shape(lambda: model.init_cache(batch, length, CACHE_DTYPE))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return fast.init_cache(shapes, model.params, tokens)


def measure(model: Any, name: str, windows: np.ndarray, prompt: int = 0) -> Figures:
    """Scores ``int32[B, T]`` windows token by token, the first `prompt` tokens read in one call and not scored."""
    start = time.perf_counter()
    fast = rewritten(model, kv_methods.get(name))
    batch, length = windows.shape
    shapes = jax.eval_shape(lambda: empty_cache(model, fast, 1, length))
    nbytes = memory_planner.tree_nbytes(shapes)
    run = jax.jit(functools.partial(decode_nll, fast))
    cache = empty_cache(model, fast, batch, length)
    if prompt:
        cache = jax.jit(lambda p, t, c: fast(p, t, c)[1])(model.params, windows[:, :prompt], cache)
        windows = windows[:, prompt:]
    compiled = run.lower(model.params, jnp.asarray(windows), cache).compile()
    begin = time.perf_counter()
    losses = np.asarray(compiled(model.params, jnp.asarray(windows), cache), np.float64)
    decoding = time.perf_counter() - begin
    return Figures(
        name,
        nbytes,
        nbytes / length,
        math.exp(losses.mean()),
        1e3 * decoding / (windows.shape[1] - 1),
        time.perf_counter() - start,
    )


def decode_nll(step: Callable, params: Any, windows: jax.Array, cache: Any) -> jax.Array:
    """Negative log-likelihood ``f32[T-1, B]`` in nats of each token after the first, one decode step a token."""

    def one(cache: Any, pair: Any) -> Any:
        token, target = pair
        logits, cache = step(params, token[:, None], cache)
        chosen = jnp.take_along_axis(logits[:, -1], target[:, None], axis=-1)[:, 0]
        return cache, jax.nn.logsumexp(logits[:, -1], axis=-1) - chosen

    return jax.lax.scan(one, cache, (windows[:, :-1].T, windows[:, 1:].T))[1]


def cut(tokens: Sequence[int], count: int, length: int) -> np.ndarray:
    """`count` windows ``int32[count, length]`` from the start of a text, one after another."""
    if len(tokens) < count * length:
        raise ValueError(
            f"`windows` x `length` is {count * length}, but the text has {len(tokens)} tokens"
        )
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def needle(model: Any, name: str, text: Sequence[int], depths: Sequence[float]) -> float:
    """The share of depths at which a number hidden in a text is told when asked for.

    The text is read through the method in one call, then the question, then the answer is made token by token.
    """
    assert model.tokenizer is not None
    right = 0
    fast = rewritten(model, kv_methods.get(name))
    step = jax.jit(lambda p, t, c: _last(fast(p, t, c)))
    for i, depth in enumerate(depths):
        number = str(7919 * (i + 3) % 9000 + 1000)
        prompt = _prompt(model.tokenizer, text, depth, number)
        right += _answer(model, fast, step, prompt, len(number) + 4).find(number) >= 0
    return right / len(depths)


def _last(out: Any) -> Any:
    logits, cache = out
    return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache


def _prompt(
    tokenizer: Any, text: Sequence[int], depth: float, number: str
) -> tuple[list[int], list[int]]:
    at = int(depth * len(text))
    fact = tokenizer.encode(f"\nThe secret number is {number}.\n")
    question = tokenizer.encode(
        "\nQuestion: What is the secret number?\nAnswer: The secret number is"
    )
    return [*text[:at], *fact, *text[at:]], question


def _answer(model: Any, fast: Any, step: Any, prompt: Any, words: int) -> str:
    context, question = prompt
    cache = empty_cache(model, fast, 1, len(context) + len(question) + words)
    _, cache = step(model.params, jnp.asarray([context], jnp.int32), cache)
    token, cache = step(model.params, jnp.asarray([question], jnp.int32), cache)
    answer = []
    for _ in range(words):
        answer.append(int(token[0]))
        token, cache = step(model.params, token[:, None], cache)
    return model.tokenizer.decode(answer)
