"""Which implementation runs: by platform, and by what a kernel can take."""

from __future__ import annotations

from typing import Any

import jax

from .. import hopper
from ..op import Op, one_by_one
from . import mosaic_gpu, reference, xla
from .rows import Rows

IMPLEMENTATIONS = ("mosaic_gpu", "reference", "xla")
Result = tuple[jax.Array, jax.Array]


def run(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    options: dict[str, Any],
    name: str | None,
) -> Result:
    if name == "reference":
        return reference.decode_attention(q, keys, values, lengths, **options)
    reason = mosaic_gpu.refusal(q, keys, values)
    if name == "mosaic_gpu":
        reason = reason or ("" if hopper.is_here() else "this is no Hopper GPU")
        if reason:
            raise NotImplementedError(
                f"`implementation` {name!r} can't take this attention: {reason}. Pass None to let another path take it."
            )
    if name == "xla" or reason:
        return xla.decode_attention(q, keys, values, lengths, **options)
    return PACKED_ATTENTION((q, keys, values, lengths), **options)


def describe(q: Any, keys: Rows, values: Rows) -> str:
    """The path of an attention here, and why no kernel takes it."""
    if jax.default_backend() != "gpu":
        return "xla: decode + attend, block by block"
    reason = mosaic_gpu.refusal(q, keys, values) or (
        "" if hopper.is_here() else "this is no Hopper GPU"
    )
    return f"xla: decode + attend, block by block ({reason})" if reason else "mosaic_gpu: fused"


def _by_xla(operands: Any, **options: Any) -> Result:
    return xla.decode_attention(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> Result:
    """Lowered on a machine without a GPU, for a Hopper one."""
    if jax.default_backend() == "gpu" and not hopper.is_here():
        return _by_xla(operands, **options)
    return mosaic_gpu.decode_attention(*operands, **options)


PACKED_ATTENTION = Op("packed_decode_attention", _by_xla, {"cuda": _on_cuda}, one_by_one)
