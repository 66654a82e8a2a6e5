"""Which implementation runs: by platform, and by what the kernel can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import triton
from ..op import Op
from . import kernel, xla
from .kept import Kept

IMPLEMENTATIONS = ("triton", "xla")
Result = tuple[tuple[Kept, ...], jax.Array, jax.Array]


def run(
    streams: tuple[Kept, ...],
    new: tuple[jax.Array, ...],
    at: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    length: int,
    how: str,
    name: str | None,
) -> Result:
    operands, options = (streams, new, at, labels, count), {"length": length, "how": how}
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
    """A batching rule: more entries of the batch."""
    leaves, tree = jax.tree.flatten(operands)
    flags = jax.tree.leaves(is_batched)
    whole = [
        x if flag else jnp.broadcast_to(x[None], (size, *x.shape)) for x, flag in zip(leaves, flags)
    ]
    flat = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in whole]
    out = call(jax.tree.unflatten(tree, flat))
    return jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)


APPEND = Op("append", _by_xla, {"cuda": _on_cuda}, _merged, stable=False, context=triton.lowering)
