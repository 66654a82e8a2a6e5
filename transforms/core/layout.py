"""Layout ops and casts on a packed tensor: the same buffers, seen otherwise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stowax.pallas_kernels.codecs import LayoutError, Packed

from . import compat
from .interpret import Interpreter, rule
from .program import is_packed


def _layout_rule(move: Any) -> Any:
    """A rule for a primitive with one packed operand; where `move` can't, the tensor is decoded."""

    def handle(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        packed, *rest = values
        if not is_packed(packed):
            return run.decode(eqn, values, "it is an index or an update")
        try:
            out = move(packed, rest, eqn.params)
        except LayoutError as error:
            return run.decode(eqn, values, str(error))
        return out if isinstance(out, list) else [out]

    return handle


def _transpose(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return w.transpose(params["permutation"])


def _reshape(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    if params.get("dimensions") is not None:
        w = w.transpose(params["dimensions"])
    return w.reshape(params["new_sizes"])


def _squeeze(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return w.squeeze(params["dimensions"])


def _expand(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return w.expand(params["shape"], params["broadcast_dimensions"])


def _cast(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise LayoutError(f"it is cast to {jnp.dtype(params['new_dtype']).name}")
    return w.cast(params["new_dtype"])


def _slice(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    strides = params["strides"] or (1,) * w.ndim
    return w.slice(params["start_indices"], params["limit_indices"], strides)


def _split(w: Packed, rest: list[Any], params: dict[str, Any]) -> list[Packed]:
    axis, start, out = params["axis"], 0, []
    for size in params["sizes"]:
        starts, limits = [0] * w.ndim, list(w.shape)
        starts[axis], limits[axis] = start, start + size
        out.append(w.slice(starts, limits, (1,) * w.ndim))
        start += size
    return out


def _unstack(w: Packed, rest: list[Any], params: dict[str, Any]) -> list[Packed]:
    axis = params["axis"]
    one_each = _split(w, rest, {"axis": axis, "sizes": (1,) * w.shape[axis]})
    return [entry.squeeze((axis,)) for entry in one_each]


def _dynamic_slice(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return w.dynamic_slice(rest, params["slice_sizes"])


def _same(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return w


def _stop_gradient(w: Packed, rest: list[Any], params: dict[str, Any]) -> Packed:
    return jax.tree.map(lax.stop_gradient, w)


MOVES = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "convert_element_type": _cast,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "stop_gradient": _stop_gradient,
}
for _name, _move in MOVES.items():
    rule(_name)(_layout_rule(_move))


@rule("optimization_barrier", "pvary", "pcast")
def _each_part(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Primitives that give back their operands: they act on the parts."""
    flat, tree = jax.tree_util.tree_flatten(values)
    return jax.tree_util.tree_unflatten(tree, compat.bind(eqn, flat))
