"""Low-bit weights and caches in plain JAX, as without any library: integers and scales, decoded in the same jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

DTYPES = {"xla-int8": jnp.int8, "xla-int4": jnp.int4}

Coded = tuple[jax.Array, jax.Array]  # integers, scales of groups


def weight(spec: str, group: int, n: int, k: int, seed: int) -> Coded:
    """A random weight ``[K, N]``, its scales ``[K // group, N]``."""
    keys = jax.random.split(jax.random.key(seed))
    codes = jax.random.randint(keys[0], (k, n), -8, 8, jnp.int8).astype(DTYPES[spec])
    return codes, jax.random.uniform(keys[1], (k // group, n), jnp.bfloat16, 0.01, 0.03)


def matmul(x: jax.Array, coded: Coded) -> jax.Array:
    codes, scale = coded
    groups = codes.astype(x.dtype).reshape(scale.shape[0], -1, scale.shape[1]) * scale[:, None]
    return x @ groups.reshape(codes.shape)


def rows(spec: str, group: int, b: int, k: int, s: int, h: int, seed: int) -> Coded:
    """Random keys or values ``[B, S, K, H]``, their scales ``[B, S, K, H // group]``."""
    keys = jax.random.split(jax.random.key(seed))
    codes = jax.random.randint(keys[0], (b, s, k, h), -8, 8, jnp.int8).astype(DTYPES[spec])
    return codes, jax.random.uniform(keys[1], (b, s, k, h // group), jnp.bfloat16, 0.1, 0.2)


def attention(q: jax.Array, kv: tuple[Coded, Coded]) -> jax.Array:
    """Of one token ``[B, N, H]``."""
    decode = lambda codes, scale: (
        codes.astype(q.dtype).reshape(*scale.shape, -1) * scale[..., None]
    ).reshape(codes.shape)
    keys, values = (decode(*coded) for coded in kv)
    return jax.nn.dot_product_attention(q[:, None], keys, values)
