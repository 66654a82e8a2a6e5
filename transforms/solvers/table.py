"""The solvers by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Callable

from .base import Solver
from .clip import clip_search
from .gptq import gptq
from .hqq import hqq
from .rounding import rounding

SOLVERS: dict[str, Callable[[], Solver]] = {
    "round": rounding,
    "clip": clip_search,
    "hqq": hqq,
    "gptq": gptq,
}


def get(solver: str | Solver) -> Solver:
    """The solver of that name with its defaults; a solver is given back as it is.

    Raises:
      ValueError: an unknown name, or `"gptq"`, which is nothing without calibration data.
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {sorted(SOLVERS)} or a Solver; got {solver!r}.")
    if solver == "gptq":
        raise ValueError(
            '`solver` "gptq" needs calibration data; pass gptq(calibration) with a list of tuples '
            "of the function's arguments."
        )
    return SOLVERS[solver]()
