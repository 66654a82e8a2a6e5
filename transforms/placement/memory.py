"""Memory spaces: where an array lies, by its type."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..core import compat

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host


def on_host(x: Any) -> bool:
    """Whether an array, or the type of one, is in host memory."""
    return getattr(jax.typeof(x) if isinstance(x, jax.Array) else x, "memory_space", None) == HOST


def fetched(x: Any, atom: Any = None) -> Any:
    """`x` on the device; where it is if the program itself has it, `atom`, on the host."""
    if atom is not None and on_host(atom.aval):
        return x
    return jax.device_put(x, DEVICE) if isinstance(x, jax.Array) and on_host(x) else x


def to_host(tree: Any) -> Any:
    """The arrays of a pytree in host memory; those of less than a thousandth of its bytes stay."""
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if compat.is_array(x)]
    least = sum(sizes) / 1000
    large = lambda x: compat.is_array(x) and x.size * x.dtype.itemsize >= least
    return jax.tree.map(lambda x: jax.device_put(x, HOST) if large(x) else x, tree)


def placement(leaf: Any) -> Any:
    """What `in_shardings` says of an argument in host memory, where compilers look for it; None for others."""
    if not on_host(leaf):
        return None
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def host_type(leaf: Any) -> Any:
    """The type of a leaf in host memory, which traces as it does."""
    return jax.typeof(jnp.empty((), leaf.dtype)).update(shape=leaf.shape, memory_space=HOST)
