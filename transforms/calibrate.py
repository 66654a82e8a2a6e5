"""The calibration run: every weight is solved where the program first multiplies by it.

The function is evaluated once, equation by equation, on all calibration batches in step. When a matmul with a
claimed weight is reached, the second moment of its inputs is taken, the solver runs, and the evaluation goes on with
the quantized weight: layer after layer through the already quantized part (GPTQ's sequential order), in any program.
Scans are stepped through, so stacked layers are solved one by one. Nothing after the last claimed weight is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import LayoutError, Packed

from .core import compat, layout, trace
from .core.compute import contracts_encoded, fold_inputs, unfold_outputs
from .core.interpret import RULES
from .core.program import is_packed
from .solvers import solve_storage
from .solvers.rounding import rounding
from .solvers.storage import merge_infos

Samples = list[Any]  # a value of each calibration batch
Value = Any  # Samples, or the Packed of a claimed weight

UNREACHED = "no calibration token reached it"


class _Done(Exception):
    """Every claimed weight is solved."""


class _Site:
    """A claimed leaf: its entries (layers, experts) are solved one by one."""

    def __init__(self, name: str, value: jax.Array, claim: Any):
        codecs.validate(value, name)
        self.name, self.claim = name, claim
        where = claim.storage
        self.view = codecs.storage_view(value.shape, value.dtype.name, where.lead, where.inner)
        self.values = codecs.fold(value, where.lead, where.inner).astype(jnp.float32)
        self.batch = tuple(value.shape[a] for a in where.batch)
        self.rows = self.values.shape[len(self.batch) : -1]
        self.solved: dict[int, Any] = {}
        self.passed: str = ""  # a use of it whose inputs are not collected

    @property
    def entries(self) -> int:
        return math.prod(self.batch)

    def tracked(self) -> Packed:
        """The leaf as a packed value whose "row" part says which stored rows a view of it has."""
        lead = self.values.shape[:-1]
        row = np.arange(math.prod(lead), dtype=np.int32).reshape(*lead, 1)
        parts = {"values": self.values, "row": jnp.asarray(row)}
        return Packed(parts, codecs.get("f32"), self.view, name=self.name)

    def entry(self, i: int) -> jax.Array:
        """``f32[*rows, length]`` of entry `i`."""
        return self.values.reshape(self.entries, *self.rows, -1)[i]

    def solve(self, i: int, hessian: jax.Array | None, tokens: int, reason: str = "") -> None:
        solver = self.claim.solver if hessian is not None else rounding()
        solved = solve_storage(
            solver,
            self.entry(i)[None],
            self.claim.codec,
            batch_dims=1,
            hessian=None if hessian is None else hessian[None],
        )
        info = dict(solved.info) | {"tokens": float(tokens)}
        if hessian is None:
            info |= {"fallback": "round", "reason": reason}
        self.solved[i] = dataclasses.replace(solved, info=info)
        quantized = self.claim.codec.decode(solved.parts, self.values.shape[-1])
        flat = self.values.reshape(self.entries, *self.rows, -1)
        self.values = flat.at[i].set(quantized[0]).reshape(self.values.shape)

    def result(self) -> tuple[Packed, dict[str, Any]]:
        for i in set(range(self.entries)) - set(self.solved):
            self.solve(i, None, 0, self.passed or UNREACHED)
        entries = [self.solved[i] for i in range(self.entries)]
        shapes = self.claim.codec.part_shapes(self.values.shape, batch_dims=len(self.batch))
        parts = {
            k: jnp.concatenate([e.parts[k] for e in entries]).reshape(s.shape)
            for k, s in shapes.items()
        }
        return Packed(parts, self.claim.codec, self.view), merge_infos([e.info for e in entries])


def calibrate(
    fn: Callable[..., Any],
    batches: Sequence[tuple[Any, ...]],
    kwargs: dict[str, Any],
    params: tuple[int | str, ...],
    claims: Mapping[str, Any],
) -> dict[str, tuple[Packed, dict[str, Any]]]:
    """Solves the claimed weights whose solver needs the inputs of its layer.

    Args:
      fn: the function.
      batches: the positional arguments of a call, weights included, for each calibration batch; all of the
        same shapes.
      kwargs: keywords of every call.
      params: which arguments hold weights.
      claims: what to do with each leaf, by name.

    Returns:
      The packed leaf and the solver's report, by name.
    """
    program = trace(fn, batches[0], kwargs, params)
    arrays = [_arrays(program, batch, kwargs) for batch in batches]
    wanted = {n for n, c in claims.items() if c.codec is not None and "hessian" in c.solver.needs}
    sites: dict[str, _Site] = {}
    values: list[Value] = []
    for i, (name, leaf) in enumerate(zip(program.names, program.leaves)):
        if name in wanted and not is_packed(leaf):
            sites[name] = _Site(name, leaf, claims[name])
            values.append(sites[name].tracked())
        else:
            values.append([sample[i] for sample in arrays])
    total = sum(site.entries for site in sites.values())
    bar = tqdm(total=total, desc="calibrating", unit="layer", leave=False, disable=total < 8)
    with bar, contextlib.suppress(_Done):
        _Calibrator(sites, len(batches), bar).run(program.jaxpr, values)
    return {name: site.result() for name, site in sites.items()}


def _arrays(program: Any, batch: Any, kwargs: Any) -> list[Any]:
    leaves = jax.tree.leaves((batch, kwargs), is_leaf=is_packed)
    arrays = [
        v.decode() if is_packed(v) else v for v in leaves if is_packed(v) or compat.is_array(v)
    ]
    shapes = [tuple(v.shape) for v in arrays]
    expected = [tuple(v.shape) for v in program.leaves]
    if shapes != expected:
        raise ValueError(
            f"`calibration` batches must have one shape; got {shapes} after {expected}. Cut or pad them."
        )
    return arrays


class _Calibrator:
    """Evaluates a jaxpr on samples in step, and solves sites on the way."""

    def __init__(self, sites: dict[str, _Site], count: int, bar: Any):
        self.sites, self.count, self.bar = sites, count, bar
        self.inputs: tuple[Any, Any] = (None, None)  # the last inputs and their second moment

    def run(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        body, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Value] = {v: [c] * self.count for v, c in zip(body.constvars, consts)}
        env.update(zip(body.invars, values))
        last = {v: i for i, eqn in enumerate(body.eqns) for v in eqn.invars if not _literal(v)}
        last |= dict.fromkeys(body.outvars, len(body.eqns)) if body.outvars else {}
        read = lambda a: [a.val] * self.count if _literal(a) else env[a]
        for i, eqn in enumerate(body.eqns):
            out = self.step(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, out))
            for v in {v for v in eqn.invars if not _literal(v)}:
                if last[v] == i:
                    del env[v]
        return [read(a) for a in body.outvars]

    def step(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if not any(map(is_packed, values)):
            return self.each(eqn, values)
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, values)
        if name == "dot_general":
            return [self.matmul(eqn, values)]
        if name in layout.MOVES:
            return self.move(eqn, values)
        if name == "ragged_dot_general":
            self.ragged(eqn, values)
        elif name == "conv_general_dilated":
            self.convolution(eqn, values)
        return self.each(eqn, values)

    def each(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        """Binds `eqn` on each sample, claimed weights as they are by now."""
        for v in filter(is_packed, values):
            self.sites[v.name].passed = f"the inputs of `{eqn.primitive.name}` are not collected"
        values = [[v.decode()] * self.count if is_packed(v) else v for v in map(self.now, values)]
        outs = [compat.bind(eqn, [v[s] for v in values]) for s in range(self.count)]
        return [list(out) for out in zip(*outs)]

    def now(self, value: Value) -> Value:
        """A claimed weight with the values that it has by now: quantized, where it is solved."""
        if not is_packed(value):
            return value
        rows = self.sites[value.name].values
        taken = rows.reshape(-1, rows.shape[-1])[value.parts["row"][..., 0]]
        return dataclasses.replace(value, parts=value.parts | {"values": taken})

    def move(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        """A layout op on a claimed weight; its index operands must agree between samples."""
        rest = [v[0] for v in values[1:] if not is_packed(v)]
        same = all(np.array_equal(v[0], x) for v in values[1:] if not is_packed(v) for x in v)
        if is_packed(values[0]) and len(rest) == len(values) - 1 and same:
            try:
                out = layout.MOVES[eqn.primitive.name](values[0], rest, eqn.params)
                return out if isinstance(out, list) else [out]
            except LayoutError:
                pass
        return self.each(eqn, values)

    def matmul(self, eqn: compat.Eqn, values: list[Value]) -> Samples:
        side = 1 if is_packed(values[1]) else 0
        w, xs = values[side], values[1 - side]
        numbers = eqn.params["dimension_numbers"]
        if is_packed(xs) or not contracts_encoded(w, numbers[0][side]):
            return self.each(eqn, values)[0]
        folded = [fold_inputs(x, w, side, numbers) for x in xs]  # [B, M, K] of each sample
        self.solve(w.folded(numbers[1][side]), folded, xs)
        matrix = self.now(w).folded(numbers[1][side]).decode()
        aval: Any = eqn.outvars[0].aval
        outs = []
        for x, flat in zip(xs, folded):
            y = jnp.einsum("bmk,bnk->bmn", flat, matrix.astype(flat.dtype))
            outs.append(unfold_outputs(y, x, w, side, numbers, aval.shape).astype(aval.dtype))
        return outs

    def ragged(self, eqn: compat.Eqn, values: list[Value]) -> None:
        """Solves each expert of a grouped matmul on the rows that are routed to it."""
        xs, w, sizes = values
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        plain = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
        if not is_packed(w) or numbers != plain or not contracts_encoded(w, (1,)):
            return
        total = counts = 0
        for x, size in zip(xs, sizes):
            total = total + _moments_by_group(x, size)
            counts = counts + size
        means = total / jnp.maximum(counts, 1)[:, None, None]
        self.solve_entries(w.folded((0,)), means, np.asarray(counts).tolist())

    def convolution(self, eqn: compat.Eqn, values: list[Value]) -> None:
        """A convolution is a matmul of the patches of its image."""
        xs, w = values
        p, spec = eqn.params, eqn.params["dimension_numbers"]
        contract = spec.rhs_spec[1:]
        grouped = p["feature_group_count"] != 1 or p["batch_group_count"] != 1
        if not is_packed(w) or is_packed(xs) or grouped or not contracts_encoded(w, contract):
            return
        patches = [
            jax.lax.conv_general_dilated_patches(
                x,
                [w.shape[i] for i in spec.rhs_spec[2:]],
                p["window_strides"],
                p["padding"],
                p["lhs_dilation"],
                p["rhs_dilation"],
                dimension_numbers=spec,
                precision=jax.lax.Precision.HIGHEST,
            )
            for x in xs
        ]
        numbers = (((spec.out_spec[1],), contract), ((), ()))
        self.solve(w.folded(()), [fold_inputs(x, w, 1, numbers) for x in patches], patches)

    def solve(self, w: Packed, folded: Samples, xs: Samples) -> None:
        """Solves the entries that the rows of `w` ``[B, N, K]`` belong to."""
        if any(self.unsolved(w)):
            hessians, tokens = self.second_moments(folded, xs)
            self.solve_entries(w, hessians, [tokens] * w.shape[0])

    def unsolved(self, w: Packed) -> list[list[int]]:
        """The unsolved entries that have rows in each batch entry of `w` ``[B, N, K]``."""
        site = self.sites[w.name]
        rows = np.broadcast_to(np.asarray(w.parts["row"])[:, :, 0], w.shape[:2])
        found = [set((r // math.prod(site.rows)).tolist()) for r in rows]
        return [sorted(entries - set(site.solved)) for entries in found]

    def solve_entries(self, w: Packed, hessians: jax.Array, tokens: Sequence[int]) -> None:
        """Solves `w` ``[B, N, K]``, given ``f32[B, K, K]`` and the tokens of each batch entry."""
        site = self.sites[w.name]
        for b, entries in enumerate(self.unsolved(w)):
            for entry in set(entries) - set(site.solved):
                if tokens[b]:
                    site.solve(entry, hessians[b], tokens[b])
                else:
                    site.solve(entry, None, 0, UNREACHED)
                self.bar.update()
        if all(len(s.solved) == s.entries for s in self.sites.values()):
            raise _Done

    def second_moments(self, folded: Samples, xs: Samples) -> tuple[jax.Array, int]:
        """``f32[B, K, K]`` of the inputs; the last one is kept (q, k and v share theirs)."""
        key = (tuple(map(id, xs)), folded[0].shape)
        if self.inputs[0] is None or self.inputs[0][0] != key:
            total = _moment(folded[0])
            for x in folded[1:]:
                total = total + _moment(x)
            tokens = self.count * folded[0].shape[1]
            self.inputs = ((key, xs), (total / tokens, tokens))
        return self.inputs[1]

    def inline(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        """Calls, remats and custom rules: no gradient is taken here, so their body is all there is."""
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        return self.run(inner, values)

    def scan(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        p = eqn.params
        n_consts, n_carry = compat.scan_split(eqn)
        consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
        xs = values[n_consts + n_carry :]
        steps = range(p["length"])
        ys: list[list[Value]] = []
        for i in reversed(steps) if p["reverse"] else steps:
            out = self.run(p["jaxpr"], [*consts, *carry, *(self.take(x, i) for x in xs)])
            carry = out[:n_carry]
            ys.append([self.arrays(y) for y in out[n_carry:]])
        if p["reverse"]:
            ys.reverse()
        stack = lambda j: [jnp.stack([y[j][s] for y in ys]) for s in range(self.count)]
        return [*carry, *(stack(j) for j in range(len(eqn.outvars) - n_carry))]

    def take(self, value: Value, i: int) -> Value:
        if not is_packed(value):
            return [x[i] for x in value]
        try:
            starts = [i] + [0] * (value.ndim - 1)
            limits = [i + 1, *value.shape[1:]]
            return value.slice(starts, limits, (1,) * value.ndim).squeeze((0,))
        except LayoutError:
            return [x[i] for x in self.arrays(value)]

    def arrays(self, value: Value) -> Samples:
        value = self.now(value)
        return [value.decode()] * self.count if is_packed(value) else value

    def branch(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        index, *operands = values
        picks = {int(i) for i in index}
        if len(picks) > 1:
            raise NotImplementedError(
                "`cond`: calibration batches take different branches around a claimed weight; "
                "calibrate with one batch, or keep the weights in it with a rule `{path: None}`"
            )
        branches = eqn.params["branches"]
        return self.run(branches[min(max(picks.pop(), 0), len(branches) - 1)], operands)

    def loop(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        cond, body, carry = (
            values[:n_cond],
            values[n_cond : n_cond + n_body],
            values[n_cond + n_body :],
        )
        while True:
            going = {bool(x) for x in self.arrays(self.run(p["cond_jaxpr"], [*cond, *carry])[0])}
            if len(going) > 1:
                raise NotImplementedError(
                    "`while`: calibration batches loop a different number of times around a claimed "
                    "weight; calibrate with one batch"
                )
            if not going.pop():
                return carry
            carry = self.run(p["body_jaxpr"], [*body, *carry])

    def refuse(self, eqn: compat.Eqn, values: list[Value]) -> list[Value]:
        raise NotImplementedError(
            f"`{eqn.primitive.name}`: calibration steps through a program on one device; calibrate the "
            "function without it and use the encoded weights with it"
        )


_CONTROL = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _Calibrator.inline),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _Calibrator.inline),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _Calibrator.inline),
    "scan": _Calibrator.scan,
    "cond": _Calibrator.branch,
    "while": _Calibrator.loop,
    "shard_map": _Calibrator.refuse,
}
assert all(name in RULES for name in _CONTROL if name not in ("pjit", "remat", "checkpoint"))


@jax.jit
def _moment(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.einsum("bmi,bmj->bij", x, x)


@jax.jit
def _moments_by_group(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """``f32[G, K, K]``: sums of the second moments of consecutive groups of the rows of `x`."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    x = x.astype(jnp.float32)
    one = lambda g: jnp.einsum("mi,mj->ij", x * (group == g)[:, None], x)
    return jax.lax.map(one, jnp.arange(len(sizes)))


def _literal(atom: Any) -> bool:
    return hasattr(atom, "val")
