"""What every rewritten function must pass: one helper for all tables of cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import check_jaxpr

import stowax as sx
from stowax.pallas_kernels.codecs import Codec
from stowax.transforms.core import compat, is_packed
from stowax.transforms.solvers import Solved, Solver


@dataclasses.dataclass(frozen=True)
class Case:
    """A function as a user has it, and what must become of its weights.

    Attributes:
      build: makes the function, its weights and its other arguments.
      packed: the leaves that must be packed, by name; None for all with two axes or more.
      how: what each use of them says, by its start.
      rounding: the relative error that floats may make.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    packed: tuple[str, ...] | None = None
    how: tuple[str, ...] = ("xla", "gather packed rows")
    rounding: float = 1e-6


def by_name(case: Case) -> str:
    return case.name


def randn(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    """Normal numbers, made by numpy: nothing to compile."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def weight(seed: int, *shape: int) -> jax.Array:
    """A random weight whose products keep the size of their inputs."""
    return randn(seed, *shape) / np.sqrt(shape[-2]).astype(np.float32)


def init(model: Any, *args: Any, seed: int = 0) -> Any:
    """The variables of a Linen module, weights as `weight` makes them, vectors positive."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    rng = np.random.default_rng(seed)

    def draw(s: Any) -> jax.Array:
        x = rng.standard_normal(s.shape).astype(s.dtype)
        return jnp.asarray(np.abs(x) if x.ndim < 2 else x / np.sqrt(s.shape[-2]).astype(s.dtype))

    return jax.tree.map(draw, shapes)


def relative_error(got: Any, want: Any) -> float:
    """The largest ||got - want|| / ||want|| of the leaves of a result."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))
    return float(max(errors))


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """8 bits and a scale for each row, encoded by numpy: tables of cases have nothing to compile for it."""

    name = "plain"

    def encode(self, x: Any, *, batch_dims: int = 0) -> Any:
        x = np.asarray(x)
        scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-9) / 127
        return {"codes": np.round(x / scale).astype(np.int8), "scale": scale}

    def decode(self, parts: Any, length: int) -> jax.Array:
        return parts["codes"] * parts["scale"]

    def part_shapes(self, shape: tuple[int, ...], *, batch_dims: int = 0) -> Any:
        codes = jax.ShapeDtypeStruct(shape, jnp.int8)
        return {"codes": codes, "scale": jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Quick(Solver):
    """Encodes, and reports nothing."""

    name = "quick"

    def solve(self, w: jax.Array, codec: Codec, *, hessian: Any = None) -> Solved:
        return Solved(codec.encode(w), {})


def rewrite(fn: Any, params: Any, *args: Any, spec: Any = Plain()) -> tuple[Any, Any]:
    """`fn` on weights in `spec`, and those weights, without a report of errors."""
    fast = sx.quantize(spec, solver=Quick())(fn)
    return fast, fast.encode(params, *args)


def check_case(case: Case, spec: Any = Plain(), bound: float = 0.02) -> tuple[Any, Any]:
    """Rewrites `case` with every weight in `spec`; checks results, records and the program.

    The result must be that of the function on decoded weights to float rounding, and that on the
    original weights to `bound`.
    """
    fn, params, args = case.build()
    fast, encoded = rewrite(fn, params, *args, spec=spec)
    check_packed(fast.explain(encoded, *args), case, spec)

    @eqx.filter_jit
    def run(encoded: Any, params: Any, *args: Any) -> Any:
        return fast(encoded, *args), fn(decode(encoded), *args), fn(params, *args)

    got, same, original = run(encoded, params, *args)
    assert relative_error(got, same) <= case.rounding
    assert relative_error(got, original) <= max(bound, case.rounding)
    check_jaxpr(fast.jaxprs(encoded, *args)[1].jaxpr)
    return fast, encoded


def decode(tree: Any) -> Any:
    """A tree with each packed leaf decoded."""
    return jax.tree.map(lambda v: v.decode() if is_packed(v) else v, tree, is_leaf=is_packed)


def check_packed(explained: Any, case: Case, spec: Any) -> None:
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
    found = set()
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        found.add(eqn.primitive.name)
        for inner in compat.inner_jaxprs(eqn):
            found |= primitives(inner)
    return found
