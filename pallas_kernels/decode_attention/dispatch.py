"""Which implementation runs: by platform, and by what a kernel can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper, triton
from ..op import Op, one_by_one
from . import join, mosaic_gpu, reference, xla
from .rows import Rows

IMPLEMENTATIONS = ("mosaic_gpu", "reference", "xla")
Result = tuple[jax.Array, jax.Array]


def run(operands: tuple[Any, ...], options: dict[str, Any], name: str | None) -> Result:
    q, keys, values, *_ = operands
    if name == "reference":
        return reference.decode_attention(*operands, **options)
    reason = mosaic_gpu.refusal(q, keys, values)
    if name == "mosaic_gpu":
        reason = reason or ("" if hopper.is_here() else "this is no Hopper GPU")
        if reason:
            raise NotImplementedError(
                f"`implementation` {name!r} can't take this attention: {reason}. Pass None to let another path take it."
            )
    if name == "xla" or reason:
        return xla.decode_attention(*operands, **options)
    return PACKED_ATTENTION(operands, **options)


def attention_kernel(q: Any, keys: Rows, values: Rows) -> str:
    """The path that `decode_attention` takes here, in words, and why no kernel takes it."""
    if jax.default_backend() != "gpu":
        return "xla: decode + attend, block by block"
    reason = mosaic_gpu.refusal(q, keys, values) or (
        "" if hopper.is_here() else "this is no Hopper GPU"
    )
    if reason:
        return f"xla: decode + attend, block by block ({reason})"
    joined = join.refusal(q) or triton.refusal()
    notes = ["q in float16"] * (q.dtype == jnp.float32) + [f"joined by xla ({joined})"] * bool(
        joined
    )
    return ", ".join(["mosaic_gpu: fused", *notes])


def _by_xla(operands: Any, **options: Any) -> Result:
    return xla.decode_attention(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> Result:
    """Lowered on a machine without a GPU, for a Hopper one."""
    if jax.default_backend() == "gpu" and not hopper.is_here():
        return _by_xla(operands, **options)
    return mosaic_gpu.decode_attention(*operands, **options)


PACKED_ATTENTION = Op("packed_decode_attention", _by_xla, {"cuda": _on_cuda}, one_by_one)
