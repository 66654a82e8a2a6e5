"""Which implementation runs: by platform, and by what a kernel can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper, tpu, triton
from ..op import Op, one_by_one
from . import join, mosaic_gpu, mosaic_tpu, reference, xla
from .rows import Rows, heads_of

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "reference", "xla")
KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
Result = tuple[Any, ...]


def run(operands: tuple[Any, ...], options: dict[str, Any], name: str | None) -> Result:
    if name == "reference":
        return reference.decode_attention(*operands, **options)
    if name in KERNELS and (reason := _refused_here(name, *_shapes(operands))):
        raise NotImplementedError(
            f"`implementation` {name!r} can't take this attention: {reason}. Pass None to let another path take it."
        )
    if name == "xla" or all(kernel.refusal(*_shapes(operands)) for kernel in KERNELS.values()):
        return xla.decode_attention(*operands, **options)
    return PACKED_ATTENTION(operands, **options)


def _shapes(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a kernel is asked about."""
    q, keys, values, lengths, seen, _, full = operands
    return q, keys, values, heads_of(keys, lengths, seen, full)


def _refused_here(name: str, q: Any, keys: Rows, values: Rows, heads: int) -> str:
    """Why a kernel can't take these on this machine; "" where it can."""
    if reason := KERNELS[name].refusal(q, keys, values, heads):
        return reason
    if name == "mosaic_gpu":
        return "" if hopper.is_here() else "this is no Hopper GPU"
    return "" if jax.default_backend() == "tpu" else "this is no TPU"


def attention_kernel(q: Any, keys: Rows, values: Rows, heads: int | None = None) -> str:
    """The path that `decode_attention` takes here, in words, and why no kernel takes it.

    Args:
      heads: K, where the rows are one pool for so many; None for those of `keys`.
    """
    path = "xla: decode + attend, block by block"
    name = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend())
    if name is None:
        return path
    if reason := _refused_here(name, q, keys, values, heads or keys.heads):
        return f"{path} ({reason})"
    if name == "mosaic_tpu":
        return f"{name}: fused"
    joined = join.refusal(q) or triton.refusal()
    notes = ["q in float16"] * (q.dtype == jnp.float32)
    notes += [f"joined by xla ({joined})"] * bool(joined)
    return ", ".join([f"{name}: fused", *notes])


def _by_xla(operands: Any, **options: Any) -> Result:
    return xla.decode_attention(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> Result:
    """Lowered on a machine without a GPU, for a Hopper one."""
    other = jax.default_backend() == "gpu" and not hopper.is_here()
    if other or mosaic_gpu.refusal(*_shapes(operands)):
        return _by_xla(operands, **options)
    return mosaic_gpu.decode_attention(*operands, **options)


def _on_tpu(operands: Any, **options: Any) -> Result:
    """Elsewhere than on a TPU jax must be told which one it is for: `jax.sharding.use_abstract_mesh`."""
    if not tpu.is_named() or mosaic_tpu.refusal(*_shapes(operands)):
        return _by_xla(operands, **options)
    return mosaic_tpu.decode_attention(*operands, **options)


ON = {"cuda": _on_cuda, "tpu": _on_tpu}
PACKED_ATTENTION = Op("packed_decode_attention", _by_xla, ON, one_by_one)
