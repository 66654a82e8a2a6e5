"""The models that launchers time, of random weights: their sizes and their loss. Shapes are enough for plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stowax import models

VOCABULARY = 32_000


def llama8b(layers: int, dim: int = 4096) -> models.LlamaConfig:
    """Layers of the shape of Llama 8B, bfloat16; of another width, all sizes but the vocabulary follow."""
    return models.LlamaConfig(
        vocab_size=VOCABULARY, dim=dim, layers=layers, heads=dim // 128, kv_heads=max(1, dim // 512), head_dim=128,
        ffn_dim=dim * 7 // 2, dtype=jnp.bfloat16,
    )  # fmt: skip


def transformer(layers: int, dim: int) -> models.LlamaConfig:
    """What is trained: heads of 64, a feed-forward 4 times as wide, bfloat16 over float32 parameters."""
    heads = max(1, dim // 64)
    return models.LlamaConfig(
        vocab_size=VOCABULARY, dim=dim, layers=layers, heads=heads, kv_heads=heads, head_dim=64, ffn_dim=4 * dim,
        dtype=jnp.bfloat16,
    )  # fmt: skip


def random_params(config: models.LlamaConfig, scan: bool = True) -> Any:
    """bfloat16 weights, made one after the other."""
    shapes = jax.eval_shape(lambda: models.init_params(config, scan=scan))
    draw = lambda s: 0.02 * jax.random.normal(jax.random.key(s.size % 97), s.shape, jnp.bfloat16)
    return jax.tree.map(draw, shapes)


def loss(config: models.LlamaConfig, scan: bool = True) -> Callable[[Any, jax.Array], jax.Array]:
    """Mean cross entropy of the next token, of parameters and tokens `[B, T + 1]`."""
    functions = models.functions(config, scan=scan)

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = functions.forward(params, tokens[:, :-1])
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits.astype(jnp.float32), -1) - picked).mean()

    return fn


def random_tokens(config: models.LlamaConfig, batch: int, length: int) -> jax.Array:
    """`[batch, length + 1]`."""
    draw = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1))
    return jnp.asarray(draw, jnp.int32)
