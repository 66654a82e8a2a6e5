"""Whether this machine's GPU is a Hopper one."""

from __future__ import annotations

import functools

import jax


@functools.cache
def is_here() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"
