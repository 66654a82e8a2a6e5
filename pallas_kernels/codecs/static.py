"""What a pytree node has beside its arrays, hashed once: `jax.jit` looks programs up by it at each call."""

from __future__ import annotations

from typing import Any


class Static:
    """A hashable value that remembers its hash, and is quickly equal to itself."""

    __slots__ = ("hash", "value")

    def __init__(self, value: Any):
        self.value, self.hash = value, hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self.value == other.value)

    def __hash__(self) -> int:
        return self.hash

    def __repr__(self) -> str:
        return repr(self.value)
