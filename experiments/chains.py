"""Products there and back in a chain, launches included, whose numbers keep their size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import kernel_timing


def link(product: Any, x: jax.Array, weights: Any) -> jax.Array:
    """There and back: of two weights, of which the second has the transposed shape."""
    for w in weights:
        x = product(x, w)
    return x


def gain(product: Any, x: jax.Array, weights: Any) -> float:
    """What `link` makes of the size of x, in the long run."""
    run = jax.jit(functools.partial(link, product))
    size = lambda x: jnp.linalg.norm(x.astype(float))
    y, start = x, size(x)
    end = start
    for _ in range(4):
        y = run((y.astype(float) * (start / end)).astype(x.dtype), weights)
        end = size(y)
    return float(end / start)


def scaled(w: Any, by: float) -> Any:
    """A weight times a number."""

    def of(path: Any, x: jax.Array) -> jax.Array:
        if "zero" in jax.tree_util.keystr(path) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (x * by).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(of, w)


def measure(product: Any, x: jax.Array, pairs: list[Any]) -> dict[str, float]:
    """Microseconds of products there and back: kernels of one, and one of a chain, whose numbers keep their size."""
    by = gain(product, x, pairs[0]) ** -0.5
    pairs = [tuple(scaled(w, by) for w in pair) for pair in pairs]
    run = functools.partial(link, product)
    return {
        "pair_us": kernel_timing.kernel_us(run, x, pairs),
        "chained_us": kernel_timing.chained_us(run, x, pairs),
    }
