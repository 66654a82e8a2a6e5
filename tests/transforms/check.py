"""What every rewritten function must pass: one helper for all tables of cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import check_jaxpr

import stowax as sx


@dataclasses.dataclass(frozen=True)
class Case:
    """A function as a user has it, and what must become of its weights.

    Attributes:
      build: makes the function, its weights and its other arguments.
      packed: the names of the leaves that must be packed; None for every float leaf with two axes or more.
      how: what each use of them says, by its start.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    packed: tuple[str, ...] | None = None
    how: tuple[str, ...] = ("xla", "gather packed rows")


def by_name(case: Case) -> str:
    return case.name


def randn(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def weight(seed: int, *shape: int) -> jax.Array:
    """A random weight whose products keep the size of their inputs."""
    return randn(seed, *shape) / np.sqrt(shape[-2])


def relative_error(got: Any, want: Any) -> float:
    """The largest ||got - want|| / ||want|| of the leaves of a result."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))
    return float(max(errors))


def check_case(case: Case, spec: str, bound: float) -> tuple[Any, Any]:
    """Rewrites `case` with every weight in `spec`; checks results, records and the program."""
    fn, params, args = case.build()
    want = fn(params, *args)
    fast = sx.quantize(spec)(fn, params=0)
    encoded = fast.encode(params, *args)
    check_packed(fast.explain(encoded, *args), case, spec)
    assert relative_error(fast(encoded, *args), want) <= bound
    assert relative_error(jax.jit(fast)(encoded, *args), want) <= bound
    check_jaxpr(fast.jaxprs(encoded, *args)[1].jaxpr)
    return fast, encoded


def check_packed(explained: Any, case: Case, spec: str) -> None:
    names = case.packed
    if names is None:
        names = tuple(row.name for row in explained.rows if len(row.shape) > 1)
    assert {row.name for row in explained.rows if row.codec} == set(names), explained
    assert names
    for name in names:
        row = explained[name]
        assert row.codec == sx.codecs.get(spec).name
        assert row.uses, f"{name} has no use\n{explained}"
        for use in row.uses:
            assert use.how.startswith(case.how), f"{name}: {use}"


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives in a jaxpr and in those inside it."""
    from stowax.transforms.core import compat

    found = set()
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        found.add(eqn.primitive.name)
        for inner in compat.inner_jaxprs(eqn):
            found |= primitives(inner)
    return found
