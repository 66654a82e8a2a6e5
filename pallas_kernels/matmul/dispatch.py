"""Which implementation runs: by platform, shape and measured table."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..codecs import Packed
from ..hopper import plan_of
from ..op import Op, one_by_one
from . import mosaic_gpu, reference, tuned, xla

IMPLEMENTATIONS = ("mosaic_gpu", "reference", "xla")


def run(x: jax.Array, w: Packed, precision: Any, preferred: Any, name: str | None) -> jax.Array:
    options = {"precision": precision, "preferred_element_type": preferred}
    if name == "xla":
        return xla.matmul(x, w, **options)
    if name == "reference":
        return reference.matmul(x, w, **options)
    if name is not None and (reason := _refused_by_name(x, w)):
        raise NotImplementedError(
            f"`implementation` {name!r} can't take this matmul: {reason}. Pass None to let another path take it."
        )
    if name is None and mosaic_gpu.refusal(x, w):
        return xla.matmul(x, w, **options)
    return PACKED_MATMUL((x, w), choose=name is None, **options)


def _refused_by_name(x: Any, w: Packed) -> str:
    here = "" if _is_hopper() else "this is no Hopper GPU"
    return mosaic_gpu.refusal(x, w) or here


def describe(x: Any, w: Packed) -> str:
    """The path of a matmul here, and why no kernel takes it."""
    tiles = xla.tile_count(w)
    path = "xla: decode + dot" if tiles == 1 else f"xla: decode + dot, {tiles} tiles"
    if jax.default_backend() != "gpu":
        return path
    reason = _refused_by_name(x, w)
    if not reason and tuned.decodes_first(x.shape[-2]):
        reason = f"M = {x.shape[-2]}: decoding first is faster"
    return f"{path} ({reason})" if reason else "mosaic_gpu: fused"


@functools.cache
def _is_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"


def _by_xla(operands: Any, *, choose: bool, **options: Any) -> jax.Array:
    return xla.matmul(*operands, **options)


def _on_cuda(operands: Any, *, choose: bool, **options: Any) -> jax.Array:
    """Lowered on a machine without a GPU, for a Hopper one."""
    x, w = operands
    other = jax.default_backend() == "gpu" and not _is_hopper()
    if choose and (other or tuned.decodes_first(x.shape[-2])):
        return _by_xla(operands, choose=choose, **options)
    lead, (m, k), n = x.shape[:-2], x.shape[-2:], w.shape[-2]
    dtype = options["preferred_element_type"] or jnp.result_type(x.dtype, w.dtype)
    folded = x.reshape(math.prod(lead), m, k)
    config = tuned.config(plan_of(w.codec), m, n, k)
    out = mosaic_gpu.matmul(folded, w.folded(range(len(lead))), config, out_dtype=dtype)
    return out.reshape(*lead, m, n)


def _batched(call: Any, size: int, operands: Any, is_batched: Any) -> jax.Array:
    """A batch of x alone is more rows."""
    x, w = operands
    if any(jax.tree.leaves(is_batched[1])):
        return one_by_one(call, size, operands, is_batched)
    rows = jnp.moveaxis(x, 0, -3)  # [*B, V, M, K]
    out = call((rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]), w))
    return jnp.moveaxis(out.reshape(*rows.shape[:-1], out.shape[-1]), -3, 0)


PACKED_MATMUL = Op("packed_matmul", _by_xla, {"cuda": _on_cuda}, _batched)
