"""The KV methods that the experiments compare, by name: one line each."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from stowax import recipes
from stowax.transforms import Method

BASELINE = "full"

# name: the method. Codecs first, as `docs/kv.md` tables them; `select:` and `+` make the rest.
METHODS: dict[str, Callable[[], Method]] = {
    "full": recipes.full,
    "int8": recipes.int8,
    "int4-g64": lambda: recipes.int4(64),
    "int4-g32": lambda: recipes.int4(32),
    "hadamard-int4-g64": lambda: recipes.int4(64, rotate=True),
    "hadamard-int4-g32": lambda: recipes.int4(32, rotate=True),
    "kivi4-r32": lambda: recipes.kivi(4, residual=32),
    "kivi4": lambda: recipes.kivi(4),
    "kivi2": lambda: recipes.kivi(2),
    "kivi2-sinks": lambda: recipes.kivi(2, sinks=4),
    "kv4": recipes.kv4,
    "kv3": recipes.kv3,
    "kv2": recipes.kv2,
    "gear4": lambda: recipes.gear(4),
    "gear2": lambda: recipes.gear(2),
    "think": recipes.think,
    "xquant8": lambda: recipes.xquant(8),
    "xquant4": recipes.xquant,
    "xquant4-g32": lambda: recipes.xquant(4, group=32),
    "minicache4": recipes.minicache,
    "minicache4-only": lambda: recipes.minicache(residual=0, sinks=0),
    "minicache": lambda: recipes.minicache(None, residual=0, sinks=0),
    "kv4-host": lambda: recipes.offload(recipes.kv4()),
}


def get(name: str) -> Method:
    """A method by name.

    One of `METHODS`, ``selector:budget`` (``snapkv:0.25``), or two joined by ``+`` (``h2o:256+int8``).

    Raises:
      ValueError: no method has this name.
    """
    if "+" in name:
        tokens, rows = name.split("+", 1)
        return recipes.combine(get(tokens), get(rows))
    if ":" in name:
        selector, budget = name.split(":", 1)
        return recipes.select(selector, float(budget) if "." in budget else int(budget))
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3)
        raise ValueError(
            f"unknown method {name!r}; near ones: {near}. All: {list(METHODS)}, selector:budget, a+b"
        )
    return METHODS[name]()
