"""Which implementation runs: by platform, and by what cuDNN can take."""

from __future__ import annotations

from typing import Any

import jax

from ..op import Op, one_by_one
from . import cudnn, reference, xla

IMPLEMENTATIONS = ("cudnn", "reference", "xla")


def run(operands: tuple[Any, ...], options: dict[str, Any], name: str | None) -> jax.Array:
    q, soft_cap = operands[0], options["soft_cap"]
    if name == "reference":
        return reference.prefill_attention(*operands, **options)
    if name == "cudnn" and (reason := prefill_refusal(q, soft_cap)):
        raise NotImplementedError(
            f"`implementation` 'cudnn' can't take this attention: {reason}. Pass None to let another path take it."
        )
    if name == "xla" or cudnn.refusal(q, soft_cap):
        return xla.prefill_attention(*operands, **options)
    return PREFILL_ATTENTION(operands, **options)


def prefill_kernel(q: Any, soft_cap: float | None = None) -> str:
    """The path that `prefill_attention` takes here, in words, and why cuDNN does not."""
    reason = prefill_refusal(q, soft_cap)
    return f"xla: blocks of queries ({reason})" if reason else "cudnn: flash attention"


def prefill_refusal(q: Any, soft_cap: float | None = None) -> str:
    """Why cuDNN can't take an attention on this machine; "" where it can."""
    if reason := cudnn.refusal(q, soft_cap):
        return reason
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # of an NVIDIA GPU "9.0"
    major = capability.split(".")[0]
    return "" if major.isdigit() and int(major) >= 8 else "this is no NVIDIA GPU from Ampere on"


def _by_xla(operands: Any, **options: Any) -> jax.Array:
    return xla.prefill_attention(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> jax.Array:
    """Lowered on a machine without a GPU it is XLA's: what jax lowers depends on the version of cuDNN."""
    if prefill_refusal(operands[0], options["soft_cap"]):
        return _by_xla(operands, **options)
    return cudnn.prefill_attention(*operands, **options)


# `jax.export` keeps no call of cuDNN, since its form is not stable.
PREFILL_ATTENTION = Op(
    "prefill_attention", _by_xla, {"cuda": _on_cuda}, one_by_one, stable=False, partitioned=False
)
