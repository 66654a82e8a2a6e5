"""Solving a tensor with leading axes: rows are flattened, batch entries are solved one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import Codec

from .base import Info, Solved, Solver


def solve_storage(
    solver: Solver,
    x: jax.Array,
    codec: Codec,
    *,
    batch_dims: int = 0,
    hessian: jax.Array | None = None,
) -> Solved:
    """Solves storage of any rank.

    Args:
      x: `f32[*batch, *row_axes, length]`.
      batch_dims: how many leading axes are batch axes (stacked layers, experts); each entry is
        solved alone, with its own hessian.
      hessian: `f32[*batch, length, length]`, or None for solvers that need none.

    Returns:
      Parts with the shapes and dtypes of `codec.encode(x, batch_dims=batch_dims)`. In `info`,
      numbers of several entries are their means (`damping` their maximum, `dead` their sum),
      `worst_<error>` is the largest of an error, and `fallback_entries` counts the entries that
      fell back.
    """
    if 0 in x.shape:
        raise ValueError(f"`x` has no elements: its shape is {x.shape}; there is nothing to solve.")
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(
            f"`batch_dims` must lie in [0, {x.ndim}) for `x` {x.shape}; got {batch_dims}."
        )
    batch, length = x.shape[:batch_dims], x.shape[-1]
    if hessian is not None and hessian.shape != (*batch, length, length):
        raise ValueError(
            f"`hessian` must be [*batch, length, length] = {(*batch, length, length)} for `x` "
            f"{x.shape} with batch_dims={batch_dims}; got {hessian.shape}."
        )
    entries = x.reshape(math.prod(batch), -1, length)
    hessians = None if hessian is None else hessian.reshape(len(entries), length, length)
    solved = [
        solver.solve(entries[i], codec, hessian=None if hessians is None else hessians[i])
        for i in range(len(entries))
    ]
    shapes = codec.part_shapes(x.shape, batch_dims=batch_dims)
    parts = {
        name: jnp.stack([s.parts[name] for s in solved]).reshape(shape.shape)
        for name, shape in shapes.items()
    }
    return Solved(parts, merge_infos([s.info for s in solved]))


def merge_infos(infos: Sequence[Info]) -> Info:
    """One report of several entries' (see `solve_storage`)."""
    if len(infos) == 1:
        return dict(infos[0])
    merged: Info = {}
    for name in dict.fromkeys(name for info in infos for name in info):
        found = [info[name] for info in infos if name in info]
        if isinstance(found[0], str):
            merged[name] = "; ".join(dict.fromkeys(map(str, found)))
            continue
        numbers = [float(value) for value in found]
        if name == "damping":
            merged[name] = max(numbers)
        elif name == "dead":
            merged[name] = sum(numbers)
        else:
            merged[name] = sum(numbers) / len(numbers)
        if name in ("weight_error", "output_error"):
            merged[f"worst_{name}"] = max(numbers)
    if "fallback" in merged:
        merged["fallback_entries"] = float(sum("fallback" in info for info in infos))
    return merged
