"""Matmul of 8-bit weights with activations that are rounded to 8 bits on the way, a scale for each token.

The weight has a scale for each row and no zero point, so both scales come on the finished sum: int8 x int8 adds up
in int32 without an error, E4M3 x E4M3 in float32. Plain `lax.dot_general`, which XLA maps to the 8-bit units of
TPUs and GPUs and fuses with the rounding and the scales. It is what weights of ``int8-a8`` and ``fp8_e4m3-a8`` run.

Weight-only kernels keep `x` as it is and save bytes; this one also multiplies at the 8-bit rate, which pays where
the matmul is bound by arithmetic (prefill, large batches), at the price of the rounding of `x`.

Letters as in `matmul`: ``M`` tokens, ``K`` the contracted axis, ``N`` rows of the weight, ``B`` batch axes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..codecs import Fp8, Int, Packed
from . import xla
from .layout import is_stored_as_shown

LARGEST = {jnp.int8: 127.0, jnp.float8_e4m3fn: 448.0}  # |x| of a token maps to this
INT8_LENGTH = 2**31 // (128 * 127)  # of K: a longer sum could leave int32


def matmul(x: jax.Array, w: Packed, *, preferred_element_type: Any = None) -> jax.Array:
    """``[*B, M, K] x [*B, N, K] -> [*B, M, N]``, multiplied in 8 bits.

    Args:
      x: float; rounded to the weight's 8-bit type as `rounded` says.
      w: stored as ``int8`` or ``fp8_e4m3``, a scale for each channel, encoded along K.
      preferred_element_type: of the result; by default what `x` and `w` promote to.

    Returns:
      The product. Gradients pass the rounding straight through: they are those of the weight-only product.

    Raises:
      ValueError: for shapes that do not fit.
      NotImplementedError: with what `refusal` says.
    """
    if x.ndim != w.ndim or x.shape[-1] != w.shape[-1] or x.shape[:-2] != w.shape[:-2]:
        raise ValueError(
            f"`x` {x.shape} and `w` {w.shape} do not fit: expected [*B, M, K] and [*B, N, K]"
        )
    if reason := refusal(x, w):
        raise NotImplementedError(f"`w`: {reason}; use the weight-only `matmul`")
    return _product(x, w, preferred_element_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: Packed, preferred_element_type: Any) -> jax.Array:
    dtype = _element(w)
    codes, scale = quantize_tokens(x, dtype)
    batch, last = tuple(range(x.ndim - 2)), ((x.ndim - 1,), (x.ndim - 1,))
    total = jnp.int32 if dtype == jnp.int8 else jnp.float32
    sums = lax.dot_general(codes, _levels(w), (last, (batch, batch)), preferred_element_type=total)
    rows = jnp.swapaxes(w.parts["scale"].astype(jnp.float32), -1, -2)
    y = sums.astype(jnp.float32) * scale * rows
    return y.astype(preferred_element_type or jnp.result_type(x.dtype, w.dtype))


def _forward(x: jax.Array, w: Packed, preferred: Any) -> tuple[jax.Array, Any]:
    return _product(x, w, preferred), (x, w)


def _backward(preferred: Any, operands: Any, cotangent: jax.Array) -> Any:
    weight_only = functools.partial(xla.matmul, preferred_element_type=preferred)
    return jax.vjp(weight_only, *operands)[1](cotangent)


_product.defvjp(_forward, _backward)


def refusal(x: jax.Array, w: Packed) -> str:
    """Why `x` and `w` cannot be multiplied in 8 bits; empty if they can."""
    codec, view = w.codec, w.view
    is_int8 = isinstance(codec, Int) and codec.bits == 8 and bool(codec.symmetric)
    if not is_int8 and not (isinstance(codec, Fp8) and codec.element == "e4m3"):
        return f"the codec {codec.name} is neither int8 without a zero point nor fp8_e4m3"
    if codec.group_size(view.length) < view.length:  # pyright: ignore[reportAttributeAccessIssue]
        return f"the codec {codec.name} has a scale for each group, not one for each channel"
    if not is_stored_as_shown(w):
        return "its axes are not stored in the order [*B, N, K]"
    if is_int8 and view.length > INT8_LENGTH:
        return f"K = {view.length} products of int8 can leave int32; at most {INT8_LENGTH}"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"`x` is {x.dtype.name}, not a float"
    return ""


def quantize_tokens(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Codes of `dtype` (int8 or float8_e4m3fn) ``[..., K]`` and float32 scales ``[..., 1]``.

    Symmetric: the largest |x| of a token becomes `LARGEST`; a token of zeros has the scale 0.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST[dtype]
    x = x / jnp.where(scale == 0, 1.0, scale)
    limit = LARGEST[dtype]
    x = jnp.clip(jnp.round(x) if dtype == jnp.int8 else x, -limit, limit)
    return x.astype(dtype), scale


def rounded(x: jax.Array, w: Packed) -> jax.Array:
    """What `matmul` makes of `x`, as float32: the definition of right is the product of that with the decoded `w`."""
    codes, scale = quantize_tokens(x, _element(w))
    return codes.astype(jnp.float32) * scale


def _element(w: Packed) -> Any:
    return jnp.int8 if isinstance(w.codec, Int) else jnp.float8_e4m3fn


def _levels(w: Packed) -> jax.Array:
    """The stored bytes as ``[*B, N, K]`` of the 8-bit type; code 128 is the integer 0."""
    codes = w.parts["codes"]
    if isinstance(w.codec, Int):
        codes = codes ^ 0x80
    return lax.bitcast_convert_type(codes, _element(w))
