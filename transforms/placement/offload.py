"""Arguments that live in host memory: fetched where they are used, part by part.

1. Read only (weights): a leaf that is scanned over stays on the host as a stack; each run of the body fetches its own
   slice, so that the device holds one layer or two. Other leaves are fetched whole, where they are used.
2. Replaced (an optimizer's state): see `updates`. What is not updated element by element is fetched whole, and its new
   value put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ..core import compat
from ..core.program import select
from . import rewrite
from .flat import Flat, flatten
from .memory import HOST, on_host, to_host


class Offloaded:
    """A function whose arguments may live on the host; see `offload`."""

    def __init__(self, fn: Callable[..., Any], params: int | str | None, state: int | str | None):
        self.fn = fn
        self.params, self.state = params, state
        functools.update_wrapper(self, fn, updated=())

    def place(self, tree: Any) -> Any:
        """An argument with its arrays in host memory; those of less than a thousandth of its bytes stay.

        Arrays of numpy go there directly, so state that does not fit the device can be made from its shapes.
        """
        return to_host(tree)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        roles = [role for role in (self.params, self.state) if role is not None]
        chosen = select(self.fn, args, kwargs, roles, "state" if self.params is None else "params")
        leaves = [x for x in jax.tree.leaves((args, kwargs)) if compat.is_array(x)]
        flat = flatten(self.fn, args, kwargs)
        out = rewrite.run(flat, [], None, leaves)
        if self.state is not None:
            out = self.back(flat, chosen[-1], out, leaves)
        return jax.tree.unflatten(flat.out_tree, out)

    def back(self, flat: Flat, state: int | str, out: list[Any], leaves: list[Any]) -> list[Any]:
        """The results, those that replace arrays of the state where these are."""
        begin = f"{int(isinstance(state, str))}/{state}"
        own = {i for i, name in enumerate(flat.names) if f"{name}/".startswith(f"{begin}/")}
        lost = [
            flat.names[i][2:]
            for i in sorted(own - set(flat.replaced.values()))
            if on_host(leaves[i])
        ]
        if lost:
            raise ValueError(
                f"`state` is argument {self.state!r}, and of what it has in host memory {', '.join(lost[:5])} "
                f"{'is no result' if len(lost) == 1 else 'are no results'} of the function; expected one of equal "
                "path, shape and dtype: return the new state, or `place` the others only"
            )
        to = {j for j, i in flat.replaced.items() if i in own and on_host(leaves[i])}
        return [
            jax.device_put(x, HOST) if j in to and not on_host(x) else x for j, x in enumerate(out)
        ]


def offload(
    fn: Callable[..., Any],
    *,
    weights: str = "device",
    optimizer: str = "device",
    params: int | str = 0,
    state: int | str = 1,
) -> Offloaded:
    """`fn` with its weights, its optimizer's state, or both in host memory, fetched part by part.

    Args:
      fn: any function; scanned layers gain most from `weights` (an unrolled model fetches each where it is used).
      weights: "host" or "device".
      optimizer: "host" or "device". The state is updated part by part, each fetched and written back, where its update
        is elementwise (Adam, momentum, averages); what is not is fetched whole.
      params: the argument, by position or name, that holds the weights; its leaves may also be packed codes.
      state: the argument that holds the optimizer's state; the function returns its new value.

    Returns:
      A function of the same arguments. Move each argument once with its `place`. Leaves that are on the device are used
      from there, so parts can stay. Donate the state, so that the new one takes its memory.

    Raises:
      ValueError: neither is "host", or one is something else.

    Example:
      >>> streamed = offload(model.step, weights="host")
      >>> params = streamed.place(params)
      >>> logits, cache = jax.jit(streamed)(params, tokens, cache)

      >>> step = offload(train_step, optimizer="host")    # (params, opt_state, batch) -> (params, opt_state, loss)
      >>> opt_state = step.place(opt_state)
      >>> params, opt_state, loss = jax.jit(step, donate_argnums=(0, 1))(params, opt_state, batch)
    """
    places = {"weights": weights, "optimizer": optimizer}
    for name, place in places.items():
        if place not in ("host", "device"):
            raise ValueError(f"`{name}` is {place!r}; expected 'host' or 'device'")
    if "host" not in places.values():
        raise ValueError("nothing is offloaded: give `weights='host'` or `optimizer='host'`")
    return Offloaded(
        fn, params if weights == "host" else None, state if optimizer == "host" else None
    )
