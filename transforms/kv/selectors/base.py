"""Which tokens a cache keeps: a score for each, and how many.

A selector is a score and a few numbers. The store (`slots.py`) does the rest: the first `sinks` and the newest
`recent` tokens are always kept, in the cache's own dtype; of the others the best by score, as many as the budget has
room for. Scores are made after each call from what the attention of that call saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What a score may look at, for one layer and one row of the batch; W slots, the newest last.

    Attributes:
      score: ``f32[K, W]``, what the selector said before; 0 for new tokens.
      stats: ``f32[K, W]``, its `statistic` of this call's attention weights; None if it needs none.
      keys, values: ``f32[K, W, D]``, as the cache has them.
      queries: ``f32[K, Q, D]`` of this call; None if it needs none.
      at: ``int32[K, W]``, positions.
      live: ``bool[K, W]``; scores of other slots do not matter.
      new: how many of the last slots came in this call.
    """

    score: jax.Array
    stats: Any
    keys: jax.Array
    values: jax.Array
    queries: Any
    at: jax.Array
    live: jax.Array
    new: int


@dataclasses.dataclass(frozen=True)
class Selector:
    """Keeps `budget` tokens for each head.

    Attributes:
      name: of the method.
      budget: tokens kept for each head, sinks and recent ones counted; a float is a fraction of the cache's length.
      recent: newest tokens that are always kept; a float is a fraction of those kept.
      sinks: first tokens that are always kept.
      score: ``Seen -> f32[K, W]``, higher is kept.
      statistic: ``(weights f32[B, K, T, G, C], places int32[T], T) -> f32[B, K, C]``, summed over blocks of queries.
      queries: the score looks at queries.
      together: heads keep the same tokens (scores are averaged over heads).
      pooled: the heads of a layer share one budget, ``K * budget`` slots (AdaKV); `guarantee` of each head's
        own share is its own.
      chunk: tokens are scored in chunks of this many positions.
      layers: the share of each layer, ``(layer, layers) -> float`` with mean 1; None for equal shares.
    """

    name: str
    budget: int | float
    score: Callable[[Seen], jax.Array]
    recent: int | float = 0
    sinks: int = 0
    statistic: Callable[..., jax.Array] | None = None
    queries: bool = False
    together: bool = False
    pooled: bool = False
    guarantee: float = 0.2
    chunk: int = 1
    layers: Callable[[int, int], float] | None = None

    def __post_init__(self) -> None:
        fraction = isinstance(self.budget, float)
        if isinstance(self.budget, bool) or not self.budget > 0 or (fraction and self.budget > 1):
            raise ValueError(
                f"`budget` is {self.budget!r}; expected a number of tokens, or a fraction in (0, 1]"
            )
        for field in ("recent", "sinks"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` is {getattr(self, field)}; expected 0 or more")
        if isinstance(self.recent, float) and not self.recent < 1:
            raise ValueError(f"`recent` is {self.recent}; a fraction must be below 1")
        if not fraction:
            self.check(int(self.budget))

    def check(self, tokens: int) -> None:
        """Raises where `tokens` have no room for what is always kept."""
        always = self.window(tokens) + self.sinks
        if tokens < always:
            raise ValueError(
                f"`budget` is {tokens} tokens, but {self.name} always keeps {self.sinks} sinks and "
                f"{self.window(tokens)} recent tokens: give it at least {always}, or lower `recent`"
            )

    def window(self, tokens: int) -> int:
        """Recent tokens that are always kept, of a budget of `tokens`."""
        return int(self.recent * tokens) if isinstance(self.recent, float) else self.recent

    @property
    def needs_attention(self) -> bool:
        return self.statistic is not None

    def tokens(self, length: int, layer: int = 0, layers: int = 1) -> int:
        """Tokens kept for each head, of a cache with room for `length`."""
        n = self.budget * length if isinstance(self.budget, float) else self.budget
        fixed = self.window(round(n)) + self.sinks
        if self.layers is not None:
            n = fixed + (n - fixed) * self.layers(layer, layers)
        return min(length, max(round(n), fixed))


def received(weights: jax.Array, places: jax.Array, total: int) -> jax.Array:
    """The attention that each slot gets from all queries of a call."""
    return weights.sum((2, 3))


def from_window(window: int) -> Callable[..., jax.Array]:
    """The attention that each slot gets from the last `window` queries of a call."""

    def statistic(weights: jax.Array, places: jax.Array, total: int) -> jax.Array:
        chosen = (places >= total - window).astype(weights.dtype)
        return jnp.einsum("bktgc,t->bkc", weights, chosen)

    return statistic


def latest(seen: Seen, fresh: jax.Array) -> jax.Array:
    """`fresh` scores after a call of more than one token (a prompt); in decoding, the old ones stay.

    Tokens that come one by one get the best score that there is, so that those of the prompt go first.
    """
    if seen.new > 1:
        return fresh
    best = jnp.max(jnp.where(seen.live, seen.score, -jnp.inf), axis=-1, keepdims=True)
    new = jnp.arange(seen.score.shape[-1]) >= seen.score.shape[-1] - seen.new
    return jnp.where(new, best, seen.score)


def pooled(x: jax.Array, kernel: int) -> jax.Array:
    """The mean over `kernel` neighbouring slots, zeros outside."""
    window = (1,) * (x.ndim - 1) + (kernel,)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, "SAME")
    return total / kernel
