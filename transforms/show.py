"""The program before and after."""

from __future__ import annotations

from typing import Any

from .transform import Transformed


def show(fast: Transformed, *args: Any, **kwargs: Any) -> None:
    """Prints the jaxpr of the original function and of the rewritten one, for the arguments of a call.

    Args:
      fast: what a transform gave.
      *args: of the call, as arrays or shapes.
      **kwargs: of the call.
    """
    before, after = fast.jaxprs(*args, **kwargs)
    print(
        f"before, {len(before.eqns)} equations:\n{before}\n\nafter, {len(after.eqns)} equations:\n{after}"
    )
