"""What is measured of a variant: quality on text, true bytes, speed, and a few words."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from stowax import memory_planner
from stowax.models import Model, perplexity

from .variants import Variant, linear_bits

CACHE = 128  # tokens that fit in the cache of the measured decode step
PROMPT = "The main purpose of a compiler is to"


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of a variant.

    Attributes:
      name: codec and solver.
      weight_bytes: true bytes of all weights, embedding and scales included.
      bits_per_weight: of all weights.
      linear_bits: of the linear layers alone, which are what the codec stores.
      perplexity: on the scored text.
      tokens_per_s: of greedy decoding, batch 1, compilation left out.
      decode_temp_bytes: XLA's temporaries of one decode step: what is decoded at a time, and activations.
      decode_peak_bytes: arguments, outputs and temporaries of that step.
      text: how the model goes on from `PROMPT`.
      seconds: what making and measuring the variant took.
    """

    name: str
    weight_bytes: int
    bits_per_weight: float
    linear_bits: float
    perplexity: float
    tokens_per_s: float
    decode_temp_bytes: int
    decode_peak_bytes: int
    text: str
    seconds: float = 0.0


def measure(
    model: Model, variant: Variant, tokens: list[int], *, window: int, words: int
) -> Figures:
    """Scores `tokens` in windows, and generates `words` tokens."""
    start = time.perf_counter()
    score = perplexity(variant.transform(model.nll), variant.params, tokens, window=window)
    step = compile_step(model, variant)
    text, speed = speak(model, variant, step, words)
    memory = memory_planner.memory_report(step)
    nbytes = memory_planner.tree_nbytes(variant.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return Figures(
        name=variant.name,
        weight_bytes=nbytes,
        bits_per_weight=8 * nbytes / count,
        linear_bits=linear_bits(variant.params),
        perplexity=score,
        tokens_per_s=speed,
        decode_temp_bytes=memory.temporaries,
        decode_peak_bytes=memory.peak,
        text=text,
        seconds=time.perf_counter() - start,
    )


def compile_step(model: Model, variant: Variant) -> jax.stages.Compiled:
    """One decode step, batch 1, with a cache of `CACHE` tokens that is donated."""
    step = jax.jit(variant.transform(model.step), donate_argnums=2)
    cache = jax.eval_shape(lambda: model.init_cache(1, CACHE))
    return step.lower(variant.params, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).compile()


def speak(
    model: Model, variant: Variant, step: jax.stages.Compiled, words: int
) -> tuple[str, float]:
    """How the model goes on from `PROMPT`, greedily, and tokens per second, everything a token at a time."""
    assert model.tokenizer is not None
    prompt = model.tokenizer.encode(PROMPT)
    cache = model.init_cache(1, CACHE)
    for token in prompt:
        logits, cache = step(variant.params, jnp.full((1, 1), token, jnp.int32), cache)
    answer = [int(logits[0, -1].argmax())]
    start = time.perf_counter()
    while len(answer) < words and answer[-1] not in model.tokenizer.eos_ids:
        logits, cache = step(variant.params, jnp.full((1, 1), answer[-1], jnp.int32), cache)
        answer.append(int(logits[0, -1].argmax()))
    seconds = time.perf_counter() - start
    return model.tokenizer.decode(answer), (len(answer) - 1) / seconds
