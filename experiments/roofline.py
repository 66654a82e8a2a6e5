"""What a kernel can take at least on this device, as measured in the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from . import kernel_timing


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The two bounds of a device.

    Attributes:
      tb_per_s: bytes read and written by a copy of 1 GiB.
      tflops: of the product of two bf16 matrices of 8,192 x 8,192.
    """

    tb_per_s: float
    tflops: float

    def share(self, us: float, nbytes: float, flops: float) -> dict[str, Any]:
        """The share of `us` that moving `nbytes` or doing `flops` takes, whichever is more, and which: `bound`."""
        memory, arithmetic = nbytes / self.tb_per_s / 1e6, flops / self.tflops / 1e6
        bound = "memory" if memory >= arithmetic else "arithmetic"
        return {"roofline": max(memory, arithmetic) / us, "bound": bound}


def measured() -> Roofline:
    """Of the first GPU, by the profiler."""
    one = jnp.ones((), jnp.float32)
    large = [jnp.full((1 << 28,), i, jnp.float32) for i in range(2)]
    copy = kernel_timing.kernel_us(lambda x, y: x + y, one, large)
    square = [
        jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) / 64 for i in range(3)
    ]
    product = kernel_timing.kernel_us(lambda x, w: x @ w, square[0], square[1:])
    return Roofline(2 * large[0].nbytes / copy / 1e6, 2 * 8192**3 / product / 1e6)
