"""Matmul of weights in 8 or 4 bits with activations that are rounded to 8 bits on the way, a scale for each token.

The weight has a scale for each row and no zero point, so both scales come on the finished sum: int8 x int8 adds up
in int32 without an error, E4M3 x E4M3 in float32. Weights of 4 bits become int8 on the way: ``int4-sym`` as they are,
``qoq4`` times the integers of its groups. It is what weights of ``int8-a8``, ``fp8_e4m3-a8``, ``int4-sym-a8`` and
``qoq4`` run: on a Hopper GPU kernels of their own for many tokens, and the weight-only one, which x in 8 bits also
fits, for few; elsewhere `lax.dot_general`, which XLA maps to the 8-bit units of a TPU and fuses with the rounding and
the scales.

Weight-only kernels keep `x` as it is and save bytes; this one also multiplies at the 8-bit rate, which pays where
the matmul is bound by arithmetic (prefill, large batches), at the price of the rounding of `x`.

Letters as in `matmul`: ``M`` tokens, ``K`` the contracted axis, ``N`` rows of the weight, ``B`` batch axes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import hopper
from ..codecs import Fp8, GroupCodec, Int, Packed, Qoq4, unpack_bits
from ..op import Op, one_by_one
from . import mosaic_gpu, tuned, w4a8_mosaic_gpu, w8a8_mosaic_gpu, xla
from .layout import is_stored_as_shown
from .tokens import quantize_tokens

INT8_LENGTH = 2**31 // (128 * 127)  # of K: a longer sum could leave int32


def matmul(x: jax.Array, w: Packed, *, preferred_element_type: Any = None) -> jax.Array:
    """``[*B, M, K] x [*B, N, K] -> [*B, M, N]``, multiplied in 8 bits.

    Args:
      x: float; rounded to the weight's 8-bit type as `rounded` says.
      w: stored as ``int8``, ``int4-sym`` or ``fp8_e4m3``, a scale for each channel, or as ``qoq4``; encoded along K.
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
    codes, scale = quantize_tokens(x, _element(w))
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(x.dtype, w.dtype))
    return ROUNDED_MATMUL((codes, scale, w), out_dtype=dtype)


def _by_xla(operands: Any, *, out_dtype: Any) -> jax.Array:
    codes, scale, w = operands
    sums = _sums(codes, w) if bits_of(w) == 8 else xla.tiled(_sums, None, codes, w)
    rows = jnp.swapaxes(_scale_of_rows(w).astype(jnp.float32), -1, -2)
    return (sums.astype(jnp.float32) * scale * rows).astype(out_dtype)


def _sums(codes: jax.Array, w: Packed) -> jax.Array:
    batch, last = tuple(range(w.ndim - 2)), ((w.ndim - 1,), (w.ndim - 1,))
    total = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(codes, _levels(w), (last, (batch, batch)), preferred_element_type=total)


def _on_cuda(operands: Any, *, out_dtype: Any) -> jax.Array:
    """Lowered on a machine without a GPU, for a Hopper one."""
    codes, scale, w = operands
    other = jax.default_backend() == "gpu" and not hopper.is_here()
    path = kernel_of(codes, w)
    if other or not path:
        return _by_xla(operands, out_dtype=out_dtype)
    lead, (m, k), n = w.shape[:-2], codes.shape[-2:], w.shape[-2]
    one, batch = w.folded(range(len(lead))), math.prod(lead)
    codes, scale = codes.reshape(batch, m, k), scale.reshape(batch, m, 1)
    if path == "8-bit units":
        config = tuned.rounded(bits_of(w), batch, m, n, k)
        out = _kernel(w).matmul(codes, scale, one, config, out_dtype=out_dtype)
    else:  # bfloat16 holds every code
        one, x = _weight_only(one), codes.astype(jnp.bfloat16)
        config = tuned.config(hopper.plan_of(one.codec), m, n, k)
        out = mosaic_gpu.matmul(x, one, config, out_dtype=jnp.float32)
        out = (out * scale).astype(out_dtype)
    return out.reshape(*lead, m, n)


def kernel_of(x: Any, w: Packed) -> str:
    """What a Hopper GPU runs for `x`, or its codes: "8-bit units", "weight-only", or "" where no kernel can."""
    if tuned.takes_rounded(bits_of(w), x.shape[-2]) and not _kernel(w).refusal(w):
        return "8-bit units"
    like: Any = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    refused = mosaic_gpu.refusal(like, jax.eval_shape(_weight_only, w))
    return "" if refused else "weight-only"


def _kernel(w: Packed) -> Any:
    return w8a8_mosaic_gpu if bits_of(w) == 8 else w4a8_mosaic_gpu


def _weight_only(w: Packed) -> Packed:
    """What the weight-only kernel takes of `w`."""
    if not isinstance(w.codec, Qoq4):
        return w
    scale = w.parts["scale"].astype(jnp.float32) * w.parts["channel_scale"].astype(jnp.float32)
    return w4a8_mosaic_gpu.over_channels(w, scale)


def _batched(call: Any, size: int, operands: Any, is_batched: Any) -> jax.Array:
    """A batch of x alone is more rows."""
    codes, scale, w = operands
    if any(jax.tree.leaves(is_batched[2])):
        return one_by_one(call, size, operands, is_batched)
    more = lambda x: jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], -1, x.shape[-1])
    out = call((more(codes), more(scale), w))
    return jnp.moveaxis(out.reshape(*out.shape[:-2], size, -1, out.shape[-1]), -3, 0)


ROUNDED_MATMUL = Op("rounded_matmul", _by_xla, {"cuda": _on_cuda}, _batched)


def _forward(x: jax.Array, w: Packed, preferred: Any) -> tuple[jax.Array, Any]:
    return _product(x, w, preferred), (x, w)


def _backward(preferred: Any, operands: Any, cotangent: jax.Array) -> Any:
    weight_only = functools.partial(xla.matmul, preferred_element_type=preferred)
    return jax.vjp(weight_only, *operands)[1](cotangent)


_product.defvjp(_forward, _backward)


def refusal(x: jax.Array, w: Packed) -> str:
    """Why `x` and `w` cannot be multiplied in 8 bits; empty if they can."""
    codec, view = w.codec, w.view
    is_int = isinstance(codec, Int) and codec.bits in (4, 8) and bool(codec.symmetric)
    is_float = isinstance(codec, Fp8) and codec.element == "e4m3"
    is_grouped = isinstance(codec, Qoq4)
    if not (is_int or is_float or is_grouped):
        return f"the codec {codec.name} is neither int8 or int4 without a zero point nor fp8_e4m3 or qoq4"
    if not is_grouped and codec.group_size(view.length) < view.length:  # pyright: ignore[reportAttributeAccessIssue]
        return f"the codec {codec.name} has a scale for each group, not one for each channel"
    if not is_stored_as_shown(w):
        return "its axes are not stored in the order [*B, N, K]"
    if not is_float and view.length > INT8_LENGTH:
        return f"K = {view.length} products of int8 can leave int32; at most {INT8_LENGTH}"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"`x` is {x.dtype.name}, not a float"
    return ""


def rounded(x: jax.Array, w: Packed) -> jax.Array:
    """What `matmul` makes of `x`, as float32: the definition of right is the product of that with the decoded `w`."""
    codes, scale = quantize_tokens(x, _element(w))
    return codes.astype(jnp.float32) * scale


def bits_of(w: Packed) -> int:
    """Bits of a code of a weight that is multiplied in 8 bits."""
    assert isinstance(w.codec, GroupCodec)
    return w.codec.bits


def _element(w: Packed) -> Any:
    return jnp.float8_e4m3fn if isinstance(w.codec, Fp8) else jnp.int8


def _scale_of_rows(w: Packed) -> jax.Array:
    return w.parts["channel_scale" if isinstance(w.codec, Qoq4) else "scale"]


def _levels(w: Packed) -> jax.Array:
    """``[*B, N, K]`` of the 8-bit type: what both scales make of it is `w`."""
    codes, codec = w.parts["codes"], w.codec
    if isinstance(codec, Qoq4):
        levels = codec.split(unpack_bits(codes, 4, w.shape[-1]).astype(jnp.int8) - 8)
        return codec.join(levels * w.parts["scale"][..., None], w.shape[-1])
    if isinstance(codec, Int) and codec.bits == 4:
        return unpack_bits(codes, 4, w.shape[-1]).astype(jnp.int8) - 8
    if isinstance(codec, Int):
        codes = codes ^ 0x80  # code 128 is the integer 0
    return lax.bitcast_convert_type(codes, _element(w))
