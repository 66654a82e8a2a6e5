"""What a store holds, as `decode_attention` takes it: the packed rows that count, and beside them the rows in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .direct import padded
from .method import Method
from .spec import Group
from .store import Incoming, slots_of

# The tokens that the program's masks let through, ``bool[B, 1 or K, C]``: at positions ``int32[B, 1 or K, C]``, or all.
Mask = Callable[[jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """The rows of a cache and those of a call.

    Attributes:
      seen: which packed rows are attended to, ``bool[B, 1 or K, S]``.
      hidden: ``int32[B, E]``, positions of packed rows that the rows in full stand for; None for none.
      full: sinks, recent rows, new ones: for each stream ``[B, K, e, D]``, and which are attended to,
        ``bool[B, 1 or K, e]``.
    """

    seen: jax.Array
    hidden: jax.Array | None
    full: list[tuple[list[jax.Array], jax.Array]]

    def in_order(self, weights: tuple[jax.Array, ...]) -> jax.Array:
        """Of packed rows ``[B, N, S]`` and those in full ``[B, N, e]``, as `slots` has them: sinks come first."""
        packed, *others = weights
        beside, sinks = jnp.concatenate(others, axis=-1), self.full[0][1].shape[-1]
        return jnp.concatenate([beside[..., :sinks], packed, beside[..., sinks:]], axis=-1)


def held(method: Method, group: Group, arrays: Any, new: Incoming, mask: Mask) -> Held:
    """What an attention sees."""
    if method.selector is not None:
        return _by_slot(method, group, arrays, new, mask)
    return _by_position(method, group, arrays, new, mask)


def _by_slot(method: Method, group: Group, arrays: Any, new: Incoming, mask: Mask) -> Held:
    at, live = slots_of(method, group, arrays, new)
    seen = mask(at) & live
    sizes = [arrays[f"{name}_at"].shape[-1] for name in ("sinks", "main", "recent")]
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    sinks, packed, recent, last = jnp.split(seen, ends, axis=-1)
    rows = arrays["sinks"], arrays["recent"], new.rows
    return Held(packed, None, list(zip(rows, (sinks, recent, last))))


def _by_position(method: Method, group: Group, arrays: Any, new: Incoming, mask: Mask) -> Held:
    b, s = group.batch, group.length
    at = jnp.broadcast_to(new.at, (b, 1))
    recent = arrays["recent_at"]
    count = arrays["sinks"][0].shape[2]
    sinks = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (b, count))
    same = lambda x, y: (x[:, :, None] == y[:, None]).any(-1)
    newer = (recent >= 0) & (recent < s)
    if recent.size:
        newer &= recent != at
    # whether each is the one that counts for its position
    there = jnp.concatenate([~(same(sinks, recent) | (sinks == at)), newer, at < s], axis=1)
    every = jnp.concatenate([sinks, recent, at], axis=1)
    seen = jnp.pad(mask(None), ((0, 0), (0, 0), (0, padded(method, group) - s)))
    shown = mask(every[:, None]) & there[:, None]
    rows = arrays["sinks"], arrays["recent"], new.rows
    flags = jnp.split(shown, [count, count + recent.shape[1]], axis=-1)
    return Held(seen, every, list(zip(rows, flags)))
