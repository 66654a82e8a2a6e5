"""Control flow and custom rules: the inner program is rewritten, the construct is called again.

Scans stay scans: stacked weights go in as packed scanned operands, one body for all layers. Custom rules are
never inlined: with a packed operand, the new rule's gradient is that of the original rule on the decoded
tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from stowax.pallas_kernels.codecs import LayoutError, Packed

from . import compat
from .interpret import Interpreter, rule
from .program import is_packed


@rule("jit", "pjit", "closed_call", "core_call", "custom_lin")
def _jit(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Calls of one inner jaxpr with the same packed operands share one `jax.jit`."""
    jaxpr = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    if run.recorder is not None:  # an analysis sees each call
        return run.run(jaxpr, values)
    key = (id(jaxpr), jax.tree.structure(values))
    if key not in run.memo:
        name = eqn.params.get("name", "call")
        run.memo[key] = jaxpr, _named_jit(lambda *a: run.run(jaxpr, a), name, eqn, values)
    return run.memo[key][1](*values)


def _named_jit(fn: Any, name: str, eqn: compat.Eqn, values: list[Any]) -> Any:
    fn.__name__ = fn.__qualname__ = name
    options: dict[str, Any] = {"inline": eqn.params.get("inline", False)}
    shardings = eqn.params.get("in_shardings", ())
    if any(map(compat.is_specified, shardings)):
        options["in_shardings"] = tuple(
            None if is_packed(v) or not compat.is_specified(s) else s
            for v, s in zip(values, shardings)
        )
    return jax.jit(fn, **options)


@rule("scan")
def _scan(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    jaxpr, params = eqn.params["jaxpr"], eqn.params
    body, _ = compat.open_jaxpr(jaxpr)
    n_consts, n_carry = compat.scan_split(eqn)
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    fixed = _loop_invariant(body.invars[n_consts : n_consts + n_carry], body.outvars, init)
    init = [
        v if i in fixed else run.array(v, eqn, "the loop changes it") for i, v in enumerate(init)
    ]
    xs = [stacked(run, eqn, v) for v in values[n_consts + n_carry :]]

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        full = _merge(fixed, init, carry)
        out = run.run(jaxpr, [*consts, *full, *x])
        carry = [v for i, v in enumerate(out[:n_carry]) if i not in fixed]
        decode = lambda vs, why: [run.array(v, eqn, why) for v in vs]
        return decode(carry, "the loop changes it"), decode(out[n_carry:], "the scan stacks it")

    moving = [v for i, v in enumerate(init) if i not in fixed]
    carry, ys = lax.scan(
        step,
        moving,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*_merge(fixed, init, carry), *ys]


def stacked(run: Interpreter, eqn: compat.Eqn, value: Any) -> Any:
    """What a scan runs over: of a packed weight its parts, the stacked axis in front."""
    if not is_packed(value):
        return value
    try:
        return value.unstack(0)[0]
    except LayoutError as error:
        return run.array(value, eqn, f"the scanned axis is not a stored axis: {error}")


def _loop_invariant(carry_in: Any, out: Any, values: list[Any]) -> set[int]:
    """The packed carries that the loop hands on untouched."""
    return {i for i, v in enumerate(values) if is_packed(v) and out[i] is carry_in[i]}


def _merge(fixed: set[int], init: list[Any], carry: Any) -> list[Any]:
    moving = iter(carry)
    return [v if i in fixed else next(moving) for i, v in enumerate(init)]


@rule("while")
def _while(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = values[n_cond + n_body :]
    body, _ = compat.open_jaxpr(p["body_jaxpr"])
    fixed = _loop_invariant(body.invars[n_body:], body.outvars, init)
    why = "the loop changes it"
    init = [v if i in fixed else run.array(v, eqn, why) for i, v in enumerate(init)]

    def cond(carry: list[Any]) -> Any:
        return run.run(p["cond_jaxpr"], [*cond_consts, *_merge(fixed, init, carry)])[0]

    def step(carry: list[Any]) -> list[Any]:
        out = run.run(p["body_jaxpr"], [*body_consts, *_merge(fixed, init, carry)])
        return [run.array(v, eqn, why) for i, v in enumerate(out) if i not in fixed]

    carry = lax.while_loop(cond, step, [v for i, v in enumerate(init) if i not in fixed])
    return _merge(fixed, init, carry)


@rule("cond")
def _cond(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    index, *operands = values
    index = run.array(index, eqn, "it is an index")
    branches = [
        lambda *ops, jaxpr=jaxpr: run.run_arrays(eqn, jaxpr, ops)
        for jaxpr in eqn.params["branches"]
    ]
    return lax.switch(index, branches, *operands)


@rule("remat2", "remat", "checkpoint")
def _remat(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    again = jax.checkpoint(
        lambda *args: run.run(eqn.params["jaxpr"], args),
        policy=eqn.params["policy"],
        prevent_cse=eqn.params["prevent_cse"],
    )
    return again(*values)


@rule("custom_jvp_call")
def _custom_jvp(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    original = _on_decoded(run, eqn, values)
    call = jax.custom_jvp(lambda *args: run.run_arrays(eqn, eqn.params["call_jaxpr"], args))
    call.defjvp(lambda primals, tangents: jax.jvp(original, primals, tangents))
    return call(*values)


@rule("custom_vjp_call")
def _custom_vjp(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    original = _on_decoded(run, eqn, values)
    call = jax.custom_vjp(lambda *args: run.run_arrays(eqn, eqn.params["call_jaxpr"], args))
    call.defvjp(
        lambda *args: (call(*args), args),
        lambda args, cotangents: jax.vjp(original, *args)[1](list(cotangents)),
    )
    return call(*values)


def _on_decoded(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> Callable[..., list[Any]]:
    """The original call, custom rule and all, on decoded operands."""
    decode = lambda v: v.decode() if is_packed(v) else v
    return lambda *args: compat.bind(eqn, [decode(a) for a in args])


@rule("shard_map")
def _shard_map(run: Interpreter, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    values, specs, local = list(values), [], []
    for i, (value, spec) in enumerate(zip(values, p["in_specs"])):
        if is_packed(value):
            try:
                spec, view = _shard_view(value, spec, p["mesh"])
            except LayoutError as error:
                values[i] = run.array(value, eqn, str(error))
                view = None
        else:
            view = None
        specs.append(spec)
        local.append(view)

    def body(*args: Any) -> tuple[Any, ...]:
        values = [
            a if view is None else dataclasses.replace(a, view=view) for a, view in zip(args, local)
        ]
        return tuple(run.run_arrays(eqn, p["jaxpr"], values))

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=set(p["newly_manual_axes"]),
    )
    return list(mapped(*values))


def _shard_view(w: Packed, spec: PartitionSpec, mesh: Any) -> tuple[Packed, Any]:
    """Specs for the parts of `w`, and the view that a shard has."""
    view = w.view
    lead: list[Any] = [None] * len(view.lead)
    sizes = list(view.lead)
    for dim, axes in enumerate(spec):
        if axes is None:
            continue
        names = axes if isinstance(axes, tuple) else (axes,)
        axis = view.lead_axis(dim)
        lead[axis] = axes
        sizes[axis] //= math.prod(mesh.shape[name] for name in names)

    parts = {
        name: PartitionSpec(*(a if part.shape[i] != 1 else None for i, a in enumerate(lead)))
        for name, part in w.parts.items()
    }
    return dataclasses.replace(w, parts=parts), dataclasses.replace(view, lead=tuple(sizes))
