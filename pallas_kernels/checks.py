"""Errors that several operations have in common."""

from __future__ import annotations

from collections.abc import Sequence


def check_implementation(name: str | None, known: Sequence[str]) -> None:
    """Raises ValueError where there is no implementation of that name."""
    if name not in (None, *known):
        raise ValueError(f"`implementation` is {name!r}; expected one of {sorted(known)} or None")


def check_soft_cap(soft_cap: float | None) -> None:
    """Raises ValueError where scores can't be capped so."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"`soft_cap` is {soft_cap}; expected a positive number, or None")
