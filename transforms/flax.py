"""Flax modules as functions of their weights, which is all that a transform takes.

Nothing is patched and no module is intercepted: a transform sees the program that the module makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx
import jax


def linen(
    module: flax.linen.Module, method: str | Callable[..., Any] | None = None, **apply_options: Any
) -> Callable[..., Any]:
    """``module.apply`` with its options fixed.

    Args:
      module: an unbound Linen module.
      method: the method to call; None for ``__call__``.
      **apply_options: further options of `flax.linen.Module.apply`, such as ``mutable``. Random keys
        (``rngs``) belong in the call if they change: pass them to the function by that name.

    Returns:
      ``fn(variables, *args, **kwargs)``. All of `variables` may hold weights, so give rules paths that
      begin with ``params/`` where other collections are to be kept.

    Example:
      >>> fast = sx.quantize("int8")(sx.flax.linen(module))
      >>> encoded = fast.encode(variables, x)
    """

    def fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply(variables, *args, method=method, **apply_options, **kwargs)

    return _named(fn, type(module).__name__)


def nnx(module: flax.nnx.Module, method: str = "__call__") -> tuple[Callable[..., Any], Any]:
    """An NNX module as a function of its parameters.

    Only `nnx.Param` values are weights. All other state (batch statistics, caches, random keys) stays in the
    function with the values that it has now; what a call changes in it is lost. Put a module in evaluation mode
    first (``module.eval()``), and use `flax.nnx.split` by hand where that state has to be carried along.

    Args:
      module: the module; it is not changed.
      method: the method to call.

    Returns:
      ``fn(params, *args, **kwargs)``, and `params`: a dict of arrays, by the names of the module's attributes.

    Example:
      >>> fn, params = sx.flax.nnx(module)
      >>> fast = sx.quantize("int8")(fn)
      >>> encoded = fast.encode(params, x)
    """
    graph, params, rest = flax.nnx.split(module, flax.nnx.Param, ...)

    def fn(params_: Any, *args: Any, **kwargs: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, params)
        flax.nnx.replace_by_pure_dict(state, params_)
        return getattr(flax.nnx.merge(graph, state, rest), method)(*args, **kwargs)

    return _named(fn, type(module).__name__), flax.nnx.to_pure_dict(params)


def _named(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    fn.__name__ = fn.__qualname__ = name
    return fn
