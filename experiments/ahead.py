"""XLA's compilers for a TPU or a GPU, on a machine that has neither.

The TPU's comes with ``pip install stowax[tpu]``. The GPU's is in jax's CUDA plugin, in the version of jax, and needs
nothing else of CUDA::

  pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2

It can't try kernels out, so it takes the ones that it prefers without; peaks of an H100 differ by less than 1 % from
what is compiled there.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stowax.transforms.placement.memory import on_host

from . import tpu_estimates

DEVICES = ("h100", *tpu_estimates.CHIPS)


def prepare() -> None:
    """Sets what jax and the compilers read when they are loaded: nothing is to run on a device."""
    jax.config.update("jax_platforms", "cpu")
    tpu_estimates.prepare()


def compiler(device: str) -> dict[str, str]:
    """The package that a device's compiler is in, and its version."""
    package = "libtpu" if device in tpu_estimates.CHIPS else "jax-cuda13-pjrt"
    return {package: importlib.metadata.version(package)}


@functools.cache
def sharding(device: str) -> NamedSharding:
    """One device of `DEVICES`, which need not be here.

    Raises:
      ValueError: another name.
    """
    if device in tpu_estimates.CHIPS:
        return tpu_estimates.sharding(device)
    if device not in DEVICES:
        raise ValueError(f"`device` is {device!r}; there are compilers for {', '.join(DEVICES)}.")
    config = resources.files(__package__).joinpath("data", f"{device}.txtpb").read_text()
    found = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return NamedSharding(Mesh(found.devices, "x"), PartitionSpec())


class _InHost(NamedSharding):
    """In host memory. A device that isn't here doesn't know its memories, so jax would forget the kind."""

    memory_kind = property(lambda self: "pinned_host")


def placed(device: str, tree: Any) -> Any:
    """The shapes of a pytree of arrays and types, on `device`, each in the memory of its type."""
    on = sharding(device)
    host = _InHost(
        Mesh(list(on.device_set), "host"), on.spec
    )  # another mesh, or the two would be equal

    def place(leaf: Any) -> Any:
        where = host if on_host(leaf) else on
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(lambda leaf: place(leaf) if hasattr(leaf, "shape") else leaf, tree)


def compile_for(
    device: str, fn: Callable[..., Any], *args: Any, donate: int | Sequence[int] = ()
) -> jax.stages.Compiled:
    """`fn` on arguments like `args` (arrays, shapes), compiled for `device`."""
    return jax.jit(fn, donate_argnums=donate).lower(*placed(device, args)).compile()
