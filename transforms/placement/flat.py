"""A function as one flat jaxpr: calls inlined, scans kept, their bodies flat too.

It is for programs that are differentiated already: `jit` is looked through, custom rules and what `jax.checkpoint`
recomputes stay single equations.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import compat
from ..core.program import of_arrays, path_string
from .memory import DEVICE, fetched, on_host
from .updates import Update, gathered

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A flat program.

    Attributes:
      jaxpr: open; its equations are no calls; those of updates stand together.
      consts: values of its constants.
      out_tree: structure of the result.
      names: of its arguments, for reports.
      replaced: of results, by number, the numbers of the arguments whose new values they are.
      updates: of arguments that may be in host memory.
    """

    jaxpr: compat.Jaxpr
    consts: tuple[Any, ...]
    out_tree: Any
    names: tuple[str, ...]
    replaced: Mapping[int, int] = dataclasses.field(default_factory=dict)
    updates: tuple[Update, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Equal for equal programs on equal shapes."""
        words = [
            f"{e.primitive.name}{[v.aval.str_short() for v in e.outvars]}" for e in walk(self.jaxpr)
        ]
        words += [v.aval.str_short() for v in self.jaxpr.invars]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def flatten(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flat:
    """Traces `fn` and flattens it."""
    flat, leaves = of_arrays(fn, args, kwargs)
    shapes = [on_device(v) for v in leaves.values()]
    whole, out = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    body, consts = compat.open_jaxpr(whole)
    for run in (evaluate, _sunk):
        traced = jax.make_jaxpr(functools.partial(run, body, consts))
        body, consts = compat.open_jaxpr(traced(*shapes))
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path((args, kwargs))]
    paths = [paths[i] for i in leaves]
    replaced = _replaced(list(zip(paths, shapes)), jax.tree_util.tree_leaves_with_path(out))
    body, updates = gathered(body, replaced)
    names = tuple(map(path_string, paths))
    return Flat(body, tuple(consts), jax.tree.structure(out), names, replaced, updates)


def _replaced(given: Sequence[Any], results: Sequence[Any]) -> dict[int, int]:
    """Results that are new values of arguments: of equal path and type, at the same place, or the only such result.

    Args:
      given, results: path and shape of each leaf. Paths of arguments begin with two entries that name the argument.
    """
    types: dict[Any, list[int]] = {}
    for j, (path, x) in enumerate(results):
        for rest in (path, path[1:]):
            types.setdefault((rest, x.shape, x.dtype), []).append(j)
    found: dict[int, int] = {}
    for i, (path, x) in enumerate(given):
        fits = [j for j in types.get((path[2:], x.shape, x.dtype), ()) if j not in found]
        same = [j for j in fits if results[j][0][:1] == path[1:2]]
        for j in (same or fits)[:1]:
            found[j] = i
    return found


def on_device(leaf: Any) -> Any:
    """The shape of a leaf as the program sees it, wherever it lives."""
    if jax.typeof(leaf).memory_space == DEVICE:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def evaluate(jaxpr: compat.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Runs a jaxpr with its calls inlined."""
    return compat.read(environment(jaxpr, consts, args), jaxpr.outvars)


def environment(jaxpr: compat.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> dict[Any, Any]:
    """The same: the value of every variable."""
    env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, step(eqn, compat.read(env, eqn.invars))))
    return env


def _sunk(jaxpr: compat.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Runs a jaxpr whose scans make the broadcasts that they read (masks) themselves, where they are fused.

    Differentiation takes them out of the body, and they would be there, written, until the last scan is done.
    """
    env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
    makers: dict[Any, compat.Eqn] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "broadcast_in_dim" and len(compat.variables(eqn)) == 1:
            makers[eqn.outvars[0]] = eqn
        held = eqn.invars[: compat.scan_split(eqn)[0]] if eqn.primitive.name == "scan" else ()
        own = {i: makers[v] for i, v in enumerate(held) if not compat.is_literal(v) and v in makers}

        def body(values: list[Any], eqn: compat.Eqn = eqn, own: Any = own) -> list[Any]:
            made = {i: compat.bind(e, compat.read(env, e.invars))[0] for i, e in own.items()}
            return evaluate(*body_of(eqn), *(made.get(i, x) for i, x in enumerate(values)))

        values = compat.read(env, eqn.invars)
        with compat.scope(eqn):
            out = scan(eqn, values, body) if own else compat.bind(eqn, values)
        env.update(zip(eqn.outvars, out))
    return compat.read(env, jaxpr.outvars)


def step(eqn: compat.Eqn, values: Sequence[Any]) -> list[Any]:
    """One equation; operands that are in host memory only by placement are fetched, a scan's stacks slice by slice."""
    name = eqn.primitive.name
    if name in _INLINED:
        inner, consts = compat.open_jaxpr(eqn.params[_INLINED[name]])
        with compat.scope(eqn):
            return evaluate(inner, consts, *values)
    if name == "scan" and (any(map(on_host, values)) or _has_calls(eqn)):
        with compat.scope(eqn):
            return scan(eqn, values, lambda values: evaluate(*body_of(eqn), *values))
    return compat.bind(eqn, list(map(fetched, values, eqn.invars)))


def _has_calls(eqn: compat.Eqn) -> bool:
    return any(e.primitive.name in _INLINED for e in body_of(eqn)[0].eqns)


def body_of(eqn: compat.Eqn) -> tuple[compat.Jaxpr, Sequence[Any]]:
    return compat.open_jaxpr(eqn.params["jaxpr"])


def scan(
    eqn: compat.Eqn,
    values: Sequence[Any],
    body: Callable[[list[Any]], list[Any]],
    *,
    late: bool = False,
) -> list[Any]:
    """`eqn`, a scan, with another body, which may have more scanned operands and more results.

    Of operands in host memory each run fetches its own slice.

    Args:
      late: the memory of stacked floats (gradients of layers) is taken when the first carry is there. XLA for GPUs
        fills stacks with zeros, before the scan, and before all else that takes more memory.
    """
    consts, carries = compat.scan_split(eqn)
    start = list(map(fetched, values[: consts + carries], eqn.invars))
    fixed, init, xs = start[:consts], start[consts:], values[consts + carries :]
    p = eqn.params
    empty = _late_stacks(eqn.outvars[carries:], init) if late and init else {}

    def run(state: Any, x: Any) -> Any:
        carry, filled, i = state
        out = body([*fixed, *carry, *map(fetched, x)])
        made = dict(enumerate(out[carries:]))
        if not filled:
            return (out[:carries], {}, i), made
        at = p["length"] - 1 - i if p["reverse"] else i
        filled = {
            k: lax.dynamic_update_slice_in_dim(stack, made.pop(k)[None], at, 0)
            for k, stack in filled.items()
        }
        return (out[:carries], filled, i + 1), made

    state = init, empty, jnp.int32(0) if empty else None
    (carry, filled, _), stacks = lax.scan(
        run, state, list(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    found = {**stacks, **filled}
    return [*carry, *(found[k] for k in sorted(found))]


def _late_stacks(stacks: Sequence[Any], init: Sequence[Any]) -> dict[int, Any]:
    """Zeros for stacked floats on the device, by number, that can't be made before `init` is there."""
    zero = lax.optimization_barrier((jnp.float32(0), init[0]))[0]
    avals = {k: v.aval for k, v in enumerate(stacks) if not on_host(v.aval)}
    return {
        k: jnp.broadcast_to(zero.astype(a.dtype), a.shape)
        for k, a in avals.items()
        if jnp.issubdtype(a.dtype, jnp.floating)
    }


def walk(jaxpr: compat.Jaxpr) -> Any:
    """All equations, inner ones behind their own."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in compat.inner_jaxprs(eqn):
            yield from walk(compat.open_jaxpr(inner)[0])
