"""The one file that knows which JAX this is: parameters of primitives that are not public.

Tested on jax 0.11.2 and on the newest release that ``pyproject.toml`` allows;
``tests/transforms/test_compat.py`` keeps the parameter names of every primitive used here, so that an upgrade
that moves one fails there by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.extend import source_info_util

Jaxpr = jex.Jaxpr
Eqn = jex.JaxprEqn

_JAXPR_TYPES = tuple({jex.Jaxpr, jex.ClosedJaxpr})


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants. Before 0.11 a `ClosedJaxpr` holds both, since then a `Jaxpr` does."""
    consts = tuple(getattr(jaxpr, "consts", ()))
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def scan_split(eqn: Eqn) -> tuple[int, int]:
    """How many operands of a `scan` are constants and how many are carries; the rest are scanned."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """Runs or traces `eqn` again on other operands: custom rules, policies, names and effects stay."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # before 0.10: (functions, params)
        functions, params = params
        values = [*functions, *values]
    with scope(eqn):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def scope(eqn: Eqn) -> Iterator[None]:
    """What is traced inside carries the names, the source line and the context of `eqn`."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def inner_jaxprs(eqn: Eqn) -> list[Any]:
    """Every jaxpr among the parameters of `eqn`."""
    found = []
    for value in eqn.params.values():
        items = value if isinstance(value, (tuple, list)) else (value,)
        found += [item for item in items if isinstance(item, _JAXPR_TYPES)]
    return found


def has_program(eqn: Eqn) -> bool:
    """Whether `eqn` runs a program of its own, in sight or not (the flags ``jax_remat3`` and alike)."""
    return eqn.primitive.name == "call_hi_primitive" or bool(inner_jaxprs(eqn))


def read(env: dict[Any, Any], atoms: Iterable[Any]) -> list[Any]:
    """Values of variables and literals."""
    return [atom.val if isinstance(atom, jex.Literal) else env[atom] for atom in atoms]


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def shape_of(atom: Any) -> tuple[int, ...]:
    """Of a variable or literal."""
    return atom.aval.shape


def variables(eqn: Eqn) -> list[Any]:
    """What `eqn` reads, each once, literals left out."""
    return list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))


def fresh(var: Any) -> Any:
    """A new variable of the type of `var`."""
    return jex.Var(var.aval)


def where(eqn: Eqn) -> str:
    """The name scopes around `eqn`, for reports."""
    return str(getattr(eqn.source_info, "name_stack", ""))


def is_specified(sharding: Any) -> bool:
    return type(sharding).__name__ != "UnspecifiedValue"


def is_sharded(eqn: Eqn) -> bool:
    """Whether types around `eqn` name mesh axes (meshes with ``AxisType.Explicit``)."""
    if eqn.params.get("out_sharding") is not None:
        return True
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    specs = [aval.sharding.spec for aval in avals if hasattr(aval, "sharding")]
    return any(axis is not None for spec in specs for axis in spec)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; everything else (functions, strings, Python numbers) is static."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and hasattr(leaf, "__array__")
    )
