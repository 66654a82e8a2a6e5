"""Which implementation runs: by platform, shape and measured table."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import hopper, tpu
from ..codecs import Packed
from ..op import Op, one_by_one
from . import digits, many_rows, mosaic_gpu, mosaic_tpu, reference, tuned, w8a8, xla
from .precision import is_exact

WHOLE_BYTES = (
    2**30
)  # of a weight in float32 that is decoded at once for many rows (in 16 bits half of it is held)
IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "reference", "w8a8", "xla")
KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}


def run(x: jax.Array, w: Packed, precision: Any, preferred: Any, name: str | None) -> jax.Array:
    options = {"precision": precision, "preferred_element_type": preferred}
    if name == "xla":
        return xla.matmul(x, w, **options)
    if name == "reference":
        return reference.matmul(x, w, **options)
    if name == "w8a8" or (name is None and _rounds(w) and not w8a8.refusal(x, w)):
        return w8a8.matmul(x, w, preferred_element_type=preferred)
    if name is not None and (reason := _refused_here(name, x, w)):
        raise NotImplementedError(
            f"`implementation` {name!r} can't take this matmul: {reason}. Pass None to let another path take it."
        )
    if all(kernel.refusal(x, w) for kernel in KERNELS.values()):
        return xla.matmul(x, w, **options)
    return PACKED_MATMUL((x, w), choose=name is None, **options)


def _rounds(w: Packed) -> bool:
    """Whether activations are to be rounded to 8 bits."""
    return getattr(w.codec, "activations", None) is not None


def _refused_here(name: str, x: Any, w: Packed) -> str:
    """Why a kernel can't take these on this machine; "" where it can."""
    here = hopper.is_here() if name == "mosaic_gpu" else jax.default_backend() == "tpu"
    missing = (
        ""
        if here
        else {"mosaic_gpu": "this is no Hopper GPU", "mosaic_tpu": "this is no TPU"}[name]
    )
    return KERNELS[name].refusal(x, w) or missing


def describe(x: Any, w: Packed) -> str:
    """The path of a matmul here, and why no kernel takes it."""
    if _rounds(w):
        reason = w8a8.refusal(x, w)
        return f"xla: decode + dot, x as it is ({reason})" if reason else _describe_rounded(x, w)
    tiles = xla.tile_count(w)
    path = "xla: decode + dot" if tiles == 1 else f"xla: decode + dot, {tiles} tiles"
    name = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend())
    if name is None:
        return path
    if reason := _refused_here(name, x, w):
        return f"{path} ({reason})"
    if name == "mosaic_tpu":
        return f"{name}: fused"
    if _takes_many(x, w):
        return f"{name}: fused, many rows"
    if _decodes_first(x, w):
        why = [many_rows.refusal(w), f"M = {x.shape[-2]}: faster than fused"]
        return f"xla: decode, then dot ({', '.join(filter(None, why))})"
    return f"{name}: fused, x in digits" if _digits_of(x, w) else f"{name}: fused"


def _describe_rounded(x: Any, w: Packed) -> str:
    kernel = w8a8.kernel_of(x, w) if hopper.is_here() else ""
    return f"w{w8a8.bits_of(w)}a8: x in 8 bits too, {f'mosaic_gpu: {kernel}' if kernel else 'xla'}"


def _takes_many(x: Any, w: Packed) -> bool:
    plan = hopper.plan_of(w.codec)
    return tuned.takes_many(plan, mosaic_gpu.rows_of(x)) and not many_rows.refusal(w)


def _digits_of(x: Any, w: Packed) -> mosaic_gpu.Config | None:
    """How `digits` multiplies these; None where it does not."""
    if digits.refusal(w):
        return None
    n, k = w.shape[-2:]
    return tuned.digits_config(hopper.plan_of(w.codec), mosaic_gpu.rows_of(x), n, k)


def _decodes_first(x: Any, w: Packed) -> bool:
    return tuned.decodes_first(hopper.plan_of(w.codec), mosaic_gpu.rows_of(x))


def _by_xla(operands: Any, *, choose: bool, **options: Any) -> jax.Array:
    return xla.matmul(*operands, **options)


def _on_cuda(operands: Any, *, choose: bool, **options: Any) -> jax.Array:
    """Lowered on a machine without a GPU, for a Hopper one."""
    x, w = operands
    other = jax.default_backend() == "gpu" and not hopper.is_here()
    if choose and (other or mosaic_gpu.refusal(x, w)):
        return _by_xla(operands, choose=choose, **options)
    takes_many = _takes_many(x, w)
    if choose and not takes_many and _decodes_first(x, w):
        return xla.matmul(x, w, tile_bytes=WHOLE_BYTES, **options)
    lead, (m, k), n = x.shape[:-2], x.shape[-2:], w.shape[-2]
    dtype = _out_dtype(x, w, options)
    folded, one = x.reshape(math.prod(lead), m, k), w.folded(range(len(lead)))
    plan, rows = hopper.plan_of(w.codec), mosaic_gpu.rows_of(folded)
    if takes_many:
        config = tuned.many(plan, len(folded), rows, n, k)
        out = many_rows.matmul(folded, one, config, out_dtype=dtype)
    elif not is_exact(options["precision"]) and (config := _digits_of(folded, one)):
        out = digits.matmul(folded, one, config, out_dtype=dtype)
    else:
        out = mosaic_gpu.matmul(folded, one, tuned.config(plan, rows, n, k), out_dtype=dtype)
    return out.reshape(*lead, m, n)


def _on_tpu(operands: Any, *, choose: bool, **options: Any) -> jax.Array:
    """Elsewhere than on a TPU jax must be told which one it is for: `jax.sharding.use_abstract_mesh`."""
    if choose and (not tpu.is_named() or mosaic_tpu.refusal(*operands)):
        return _by_xla(operands, choose=choose, **options)
    x, w = operands
    options["preferred_element_type"] = _out_dtype(x, w, options)
    return mosaic_tpu.matmul(x, w, **options)


def _out_dtype(x: jax.Array, w: Packed, options: dict[str, Any]) -> Any:
    """That of `lax.dot_general`, which is not always the one that jnp promotes to."""
    return jax.eval_shape(functools.partial(xla.matmul, **options), x, w).dtype


def _batched(call: Any, size: int, operands: Any, is_batched: Any) -> jax.Array:
    """A batch of x alone is more rows."""
    x, w = operands
    if any(jax.tree.leaves(is_batched[1])):
        return one_by_one(call, size, operands, is_batched)
    rows = jnp.moveaxis(x, 0, -3)  # [*B, V, M, K]
    out = call((rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]), w))
    return jnp.moveaxis(out.reshape(*rows.shape[:-1], out.shape[-1]), -3, 0)


PACKED_MATMUL = Op("packed_matmul", _by_xla, {"cuda": _on_cuda, "tpu": _on_tpu}, _batched)
