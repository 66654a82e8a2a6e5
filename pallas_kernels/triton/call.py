"""Calls of Triton kernels, and where they can be made."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

try:
    from jax.experimental.pallas import triton as backend
except ImportError:  # it is to be removed
    backend = None


def refusal() -> str:
    """Why there is no Triton kernel on this machine; "" where there may be, or where there is no GPU at all."""
    if backend is None:
        return f"jax {jax.__version__} has no Triton backend"
    if jax.default_backend() != "gpu":
        return ""
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
    return "" if int(capability.split(".")[0] or 0) >= 8 else "the GPU is older than Ampere"


def call(
    body: Callable[..., None],
    *,
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    warps: int,
    interpret: bool,
) -> Callable[..., Any]:
    """A kernel on whole arrays: `body` indexes them by its place in the grid.

    Args:
      out: shapes of the results.
      aliases: operands that are written in place, and the results that they become.
      warps: of a program, 32 threads each.
    """
    params: Any = None if interpret else backend.CompilerParams(num_warps=warps, num_stages=1)  # pyright: ignore
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=list(out),
        input_output_aliases=aliases,
        compiler_params=params,
        interpret=interpret,
    )


def barrier(interpret: bool) -> None:
    """What the program's threads have read, they have read before any of them writes."""
    if not interpret:
        backend.debug_barrier()  # pyright: ignore


def load(ref: Any, inside: jax.Array) -> jax.Array:
    """What `ref` holds where `inside`, 0 elsewhere."""
    return backend.load(ref, mask=inside, other=0)  # pyright: ignore


def store(ref: Any, x: jax.Array, inside: jax.Array) -> None:
    """Writes `x` to `ref` where `inside`."""
    backend.store(ref, x, mask=inside)  # pyright: ignore


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """What lowering a kernel needs: a device, on a machine without a GPU; and no warning."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        if jax.default_backend() != "gpu":
            stack.enter_context(use_abstract_mesh(_hopper()))
        yield


@functools.cache
def _hopper() -> AbstractMesh:
    device = AbstractDevice("NVIDIA H100", num_cores=None, platform="gpu")
    return AbstractMesh((), (), abstract_device=device)
