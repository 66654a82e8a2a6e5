"""The rewriter: evaluates a jaxpr on values some of which are `Packed`.

An equation without a packed operand is bound again as it is: custom rules, policies, shardings, names and
effects stay. One with a packed operand goes to the rule of its primitive: layout rules (`layout.py`) give back
a `Packed` over the same buffers, compute rules (`compute.py`) call a kernel, control rules (`control.py`) rewrite
the inner jaxpr and call the public construct again. Whatever has no rule gets the decoded tensor, and a
record says so.

The same evaluation, under `jax.eval_shape` and with a `record`, is the analysis that finds sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from stowax.pallas_kernels.codecs import Packed

from . import compat
from .program import is_packed

Rule = Callable[["Interpreter", compat.Eqn, list[Any]], list[Any]]
RULES: dict[str, Rule] = {}

# primitives with an inner jaxpr that take arrays and are kernels, not control flow
_LEAVES = {"pallas_call", "custom_linear_solve", "reduce", "reduce_window", "scatter", "core_map"}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives by name."""

    def register(fn: Rule) -> Rule:
        for name in primitives:
            RULES[name] = fn
        return fn

    return register


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight in a program.

    Attributes:
      name: path of the leaf.
      op: the primitive that takes it.
      kind: "matmul", "gather" or "conv" where it is used as a weight, else "other".
      how: the kernel, or "decode" where the tensor is decoded first.
      reason: why it is decoded.
      where: name scopes in the program.
      inner: axes of the leaf that are contracted (for a gather: read whole).
      rows: axes of the leaf that stay in the result; the others are stacked (layers, experts).
    """

    name: str
    op: str
    kind: str
    how: str
    reason: str = ""
    where: str = ""
    inner: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


class Recorder:
    """Collects uses, each equation once for each weight (a body may be traced more than once)."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str, str], Use] = {}

    def add(self, eqn: compat.Eqn | None, use: Use) -> None:
        self.found.setdefault((id(eqn), use.name, use.kind), use)

    @property
    def uses(self) -> list[Use]:
        return list(self.found.values())


class Interpreter:
    """Evaluates jaxprs; `recorder`, where given, takes every use of a packed value."""

    def __init__(self, *, strict: bool, recorder: Recorder | None = None):
        self.strict = strict
        self.recorder = recorder
        self.memo: dict[Any, Any] = {}

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of `jaxpr` on `values`; outputs may be `Packed`."""
        body, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(body.constvars, consts))
        env.update(zip(body.invars, values))
        for eqn in body.eqns:
            out = self.step(eqn, compat.read(env, eqn.invars))
            env.update(zip(eqn.outvars, out))
        return compat.read(env, body.outvars)

    def run_arrays(self, eqn: compat.Eqn | None, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """Like `run`, for the inner jaxpr of `eqn`, with packed outputs decoded."""
        return [self.array(v, eqn, "it is a result") for v in self.run(jaxpr, values)]

    def step(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        if not any(map(is_packed, values)):
            return compat.bind(eqn, values)
        handle = RULES.get(eqn.primitive.name)
        if handle is not None:
            with compat.scope(eqn):
                return handle(self, eqn, values)
        if self.strict and eqn.primitive.name not in _LEAVES and compat.has_program(eqn):
            raise NotImplementedError(
                f"`{eqn.primitive.name}` has an inner program that stowax cannot rewrite, and the "
                f"weight {describe(values)} goes into it. Keep that weight as it is with a rule "
                "`{path: None}`, or pass `strict=False` to decode it before the call."
            )
        return self.decode(eqn, values, f"`{eqn.primitive.name}` has no low-bit form")

    def decode(self, eqn: compat.Eqn, values: list[Any], reason: str) -> list[Any]:
        """Binds `eqn` on decoded operands."""
        return compat.bind(eqn, [self.array(v, eqn, reason) for v in values])

    def array(self, value: Any, eqn: compat.Eqn | None, reason: str) -> Any:
        """`value`, decoded and recorded if it is packed."""
        if not is_packed(value):
            return value
        if -1 not in value.view.axes:  # gathered rows are what their gather is for
            self.note(value, eqn, "other", "decode", reason=reason)
        return value.decode()

    def note(
        self,
        packed: Packed,
        eqn: compat.Eqn | None,
        kind: str,
        how: str,
        *,
        reason: str = "",
        inner: Sequence[int] = (),
        rows: Sequence[int] = (),
    ) -> None:
        """Records a use; `inner` and `rows` are atoms of the view."""
        if self.recorder is None:
            return
        axes = lambda atoms: tuple(sorted({packed.view.axes[a] for a in atoms} - {-1}))
        use = Use(
            packed.name,
            eqn.primitive.name if eqn else "result",
            kind,
            how,
            reason,
            compat.where(eqn) if eqn else "",
            axes(inner),
            axes(rows),
        )
        self.recorder.add(eqn, use)


def describe(values: Sequence[Any]) -> str:
    return ", ".join(f"{v.name} {v}".strip() for v in values if is_packed(v))
