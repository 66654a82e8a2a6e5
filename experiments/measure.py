"""What is measured of a variant: quality on text, true bytes, speed, and a few words."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from stowax import memory_planner
from stowax.models import Model, generate, perplexity

from .variants import Variant, linear_bits

PROMPT = "Explain in two sentences what a compiler does."


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
      text: a greedy answer to `PROMPT`.
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
    text, speed = speak(model, variant, words)
    memory = decode_memory(model, variant)
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


def speak(
    model: Model, variant: Variant, words: int, prompt: str = PROMPT, **options: Any
) -> tuple[str, float]:
    """The model's answer to a prompt, and its tokens per second."""
    assert model.tokenizer is not None
    chat = model.tokenizer.apply_chat([{"role": "user", "content": prompt}])
    ids = model.tokenizer.encode(chat)
    cache = model.init_cache(1, len(ids) + words)
    out = generate(
        variant.transform(model.step),
        variant.params,
        cache,
        ids,
        max_tokens=words,
        eos_ids=model.tokenizer.eos_ids,
        timing=True,
        **options,
    )
    return model.tokenizer.decode(out.tokens[0]), out.decode_tokens_per_s or 0.0


def decode_memory(model: Model, variant: Variant, length: int = 256) -> memory_planner.MemoryReport:
    """XLA's bytes of one decode step with a cache of `length` tokens, the cache donated."""
    step = jax.jit(variant.transform(model.step), donate_argnums=2)
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    compiled = step.lower(variant.params, jnp.zeros((1, 1), jnp.int32), cache).compile()
    return memory_planner.memory_report(compiled)
