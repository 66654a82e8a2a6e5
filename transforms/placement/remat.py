"""`remat`: a loss whose gradient keeps to a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stowax.memory_planner import Device

from .plan import Plan
from .planning import plan


def remat(
    loss: Callable[..., jax.Array],
    *,
    budget: int | str,
    device: str | Device = "h100",
    host: int | str = 0,
    **options: Any,
) -> Callable[..., jax.Array]:
    """A loss whose value and gradient together need no more than `budget` bytes of device memory.

    `jax.grad` and `jax.value_and_grad` of it run the planned program; its own value is `loss`'s. The plan is made when
    the gradient is traced, once for each set of shapes.

    Args:
      loss: gives a scalar; differentiated by all its float arguments.
      budget: bytes, or "6GiB": arguments, gradients and temporaries, as `plan` predicts them.
      device, host, **options: of `plan`.

    Raises:
      ValueError: the budget can't be met (by how much, and what pins it), or the loss is no scalar.

    Example:
      >>> step = jax.jit(jax.value_and_grad(remat(loss, budget="6GiB")))
    """
    made: dict[Any, Plan] = {}

    def gradient(leaves: list[Any], tree: Any) -> Any:
        """Value and gradients by the float leaves."""
        floats = [i for i, x in enumerate(leaves) if _is_float(x)]

        def of(own: list[Any], rest: list[Any]) -> jax.Array:
            given, others = dict(zip(floats, own)), iter(rest)
            full = [given[i] if i in given else next(others) for i in range(len(leaves))]
            return loss(*jax.tree.unflatten(tree, full))

        own = [leaves[i] for i in floats]
        rest = [x for i, x in enumerate(leaves) if i not in floats]
        fn = jax.value_and_grad(of)
        shapes = tuple((x.shape, jnp.dtype(x.dtype).name) for x in leaves)
        if (tree, shapes) not in made:
            made[tree, shapes] = plan(
                fn, own, rest, hbm=budget, host=host, device=device, **options
            )
        value, grads = made[tree, shapes].apply(fn)(own, rest)
        found = dict(zip(floats, grads))
        zero = lambda x: np.zeros(x.shape, jax.dtypes.float0)
        return value, [found[i] if i in found else zero(x) for i, x in enumerate(leaves)]

    @functools.wraps(loss)
    def planned(*args: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(args)

        @jax.custom_vjp
        def call(leaves: list[Any]) -> jax.Array:
            return loss(*jax.tree.unflatten(tree, leaves))

        def forward(leaves: list[Any]) -> Any:
            return gradient(leaves, tree)

        def backward(grads: list[Any], cotangent: jax.Array) -> Any:
            scaled = lambda g: g if g.dtype == jax.dtypes.float0 else g * cotangent.astype(g.dtype)
            return ([scaled(g) for g in grads],)

        call.defvjp(forward, backward)
        out = jax.eval_shape(call, leaves)
        if out.shape != ():
            raise ValueError(f"`loss` gives {out.dtype}{list(out.shape)}; expected a scalar")
        return call([jnp.asarray(x) for x in leaves])

    return planned


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
