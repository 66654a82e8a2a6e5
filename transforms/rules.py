"""Rules that a user writes: patterns searched in paths."""

from __future__ import annotations

import re
from collections.abc import Iterable


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises ValueError for the first pattern that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`rules` has {pattern!r}, which is no regular expression: {error}"
            ) from None
