"""Which implementation runs: by platform, and by what the kernel can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import triton
from ..op import Op, one_by_one
from . import kernel, xla
from .kept import Kept

IMPLEMENTATIONS = ("triton", "xla")
Result = tuple[tuple[Kept, ...], jax.Array, jax.Array]


def run(operands: Any, options: dict[str, Any], name: str | None) -> Result:
    streams, _, at, *_ = operands
    reason = kernel.refusal(streams, at.shape[1])
    if name == "triton":
        reason = reason or triton.refusal()
        reason = reason or ("" if jax.default_backend() == "gpu" else "this is no GPU")
        if reason:
            raise NotImplementedError(
                f"`implementation` {name!r} can't append these rows: {reason}. Pass None to let another path take it."
            )
    if name == "xla" or reason:
        return xla.append(*operands, **options)
    return APPEND(operands, **options)


def append_kernel(streams: Any, tokens: int) -> str:
    """The path that `append` takes here for so many new tokens, in words, and why the kernel does not take it."""
    if jax.default_backend() != "gpu":
        return "xla"
    reason = kernel.refusal(streams, tokens) or triton.refusal()
    return f"xla ({reason})" if reason else "triton: fused"


def _by_xla(operands: Any, **options: Any) -> Result:
    return xla.append(*operands, **options)


def _on_cuda(operands: Any, *, length: int, how: str) -> Result:
    if triton.refusal():
        return _by_xla(operands, length=length, how=how)
    return kernel.append(*operands, length=length)


def _merged(call: Any, size: int, operands: Any, is_batched: Any) -> Any:
    """A batching rule: more entries of the batch, which of a stack is the second axis."""
    *operands, entry = operands
    *is_batched, entries = is_batched
    if entries:
        return one_by_one(call, size, (*operands, entry), (*is_batched, entries))
    stacked = int(entry is not None)
    axes = [jax.tree.map(lambda _: stacked, operands[0]), *jax.tree.map(lambda _: 0, operands[1:])]

    def merge(x: jax.Array, flag: bool, axis: int) -> jax.Array:
        x = x if flag else jnp.broadcast_to(x[None], (size, *x.shape))
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], size * x.shape[axis + 1], *x.shape[axis + 2 :])

    def part(x: jax.Array, axis: int) -> jax.Array:
        x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    streams, labels, count = call((*jax.tree.map(merge, operands, is_batched, axes), entry))
    return jax.tree.map(lambda x: part(x, stacked), streams), part(labels, 0), part(count, 0)


APPEND = Op("append", _by_xla, {"cuda": _on_cuda}, _merged, stable=False, context=triton.lowering)
