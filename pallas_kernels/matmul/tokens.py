"""Activations in 8 bits, a scale for each token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import triton
from ..op import Op

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # |x| of a token maps to this
WARPS = 8  # of a program, which takes one token


def quantize_tokens(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Codes of `dtype` (int8 or float8_e4m3fn) ``[..., K]`` and float32 scales ``[..., 1]``.

    Symmetric: the largest |x| of a token becomes `LARGEST`; a token of zeros has the scale 0. On a GPU one kernel reads
    each token once.
    """
    return QUANTIZE(x, dtype=jnp.dtype(dtype).name)


def plain(x: jax.Array, *, dtype: str) -> tuple[jax.Array, jax.Array]:
    """What `quantize_tokens` is."""
    limit = LARGEST[dtype]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / limit
    x = x / jnp.where(scale == 0, 1.0, scale)
    x = jnp.clip(jnp.round(x) if dtype == "int8" else x, -limit, limit)
    return x.astype(dtype), scale


def kernel(x: jax.Array, *, dtype: str, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The same, a program for each token."""
    *lead, k = x.shape
    rows = x.reshape(-1, k)
    width = pl.next_power_of_2(k)
    traced = _traced(width, dtype)
    codes, scale = triton.call(
        functools.partial(_body, k, width, traced),
        grid=(len(rows),),
        out=[
            jax.ShapeDtypeStruct(rows.shape, dtype),
            jax.ShapeDtypeStruct((len(rows),), jnp.float32),
        ],
        aliases={},
        warps=WARPS,
        interpret=interpret,
    )(rows)
    return codes.reshape(x.shape), scale.reshape(*lead, 1)


@functools.cache
def _traced(width: int, dtype: str) -> triton.Traced:
    row = jax.ShapeDtypeStruct((1, width), jnp.float32)
    return triton.Traced(functools.partial(plain, dtype=dtype), row)


def _body(k: int, width: int, traced: triton.Traced, x: Any, codes: Any, scale: Any) -> None:
    own = pl.program_id(0), pl.ds(0, width)
    inside = jax.lax.broadcasted_iota(jnp.int32, (width,), 0) < k
    row = triton.load(x.at[own], inside)
    found, factor = traced([], row.astype(jnp.float32).reshape(1, width))
    triton.store(codes.at[own], found.reshape(width), inside)
    scale[pl.program_id(0)] = factor.reshape(())


def refusal(k: int, dtype: str) -> str:
    """Why the kernel can't take tokens of K elements; "" where it can."""
    return triton.refusal() or _traced(pl.next_power_of_2(k), dtype).refusal


def _on_cuda(x: jax.Array, *, dtype: str) -> tuple[jax.Array, jax.Array]:
    if not x.size or refusal(x.shape[-1], dtype):
        return plain(x, dtype=dtype)
    return kernel(x, dtype=dtype)


def _batched(call: Any, size: int, x: Any, is_batched: Any) -> Any:
    return call(x)  # more tokens


QUANTIZE = Op(
    "quantize_tokens", plain, {"cuda": _on_cuda}, _batched, stable=False, context=triton.lowering
)
