"""Arguments that live in host memory: fetched where they are used, layer by layer in a scan.

A leaf that is only scanned over stays on the host as a stack; each run of the body fetches its own slice, so that the
device holds one layer or two. The copies of one layer overlap with the computation on what has come already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ..core import compat
from ..core.program import select
from .flat import HOST, evaluate, flatten


class Offloaded:
    """A function whose arguments may live on the host; see `offload`."""

    def __init__(self, fn: Callable[..., Any], params: int | str):
        self.fn, self.params = fn, params
        functools.update_wrapper(self, fn, updated=())

    def place(self, tree: Any) -> Any:
        """The argument `params`, all its arrays in host memory."""
        return jax.tree.map(lambda x: jax.device_put(x, HOST) if compat.is_array(x) else x, tree)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        select(self.fn, args, kwargs, (self.params,))
        leaves = [x for x in jax.tree.leaves((args, kwargs)) if compat.is_array(x)]
        flat = flatten(self.fn, args, kwargs)
        return jax.tree.unflatten(flat.out_tree, evaluate(flat.jaxpr, flat.consts, leaves))


def offload(fn: Callable[..., Any], *, weights: str = "host", params: int | str = 0) -> Offloaded:
    """`fn` with its weights in host memory, fetched layer by layer.

    Args:
      fn: any function; scanned layers gain most (an unrolled model fetches each weight where it is used).
      weights: "host".
      params: the argument, by position or name, that holds the weights; its leaves may also be packed codes.

    Returns:
      A function of the same arguments. Move the weights once with its `place`. Leaves that are on the device are used
      from there, so parts of the weights can stay.

    Raises:
      ValueError: `weights` is something else.

    Example:
      >>> streamed = offload(model.step, weights="host")
      >>> params = streamed.place(params)
      >>> logits, cache = jax.jit(streamed)(params, tokens, cache)
    """
    if weights != "host":
        raise ValueError(f"`weights` is {weights!r}; expected 'host'")
    return Offloaded(fn, params)
