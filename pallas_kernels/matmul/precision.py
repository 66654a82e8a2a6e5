"""What a precision asks for."""

from __future__ import annotations

from typing import Any

from jax import lax


def is_exact(precision: Any) -> bool:
    """Whether `x`, as `jax.lax.dot_general` has it, is to keep more digits than a kernel needs by default."""
    wanted = precision if isinstance(precision, tuple) else (precision,)
    return any(p not in (None, "default", lax.Precision.DEFAULT) for p in wanted)
