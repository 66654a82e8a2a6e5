"""Named rules for what to keep, in the form of a choice: what an optimal plan has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stowax.memory_planner import KEEP, OFFLOAD, Choice

from .residuals import Numbers, Place, crossings

Baseline = Callable[[Sequence[Place], Numbers], Choice]


def _keep_all(found: Sequence[Place], labels: Numbers) -> set[int]:
    """What JAX itself keeps."""
    return set(labels.problem.required)


def _full(found: Sequence[Place], labels: Numbers) -> set[int]:
    """Full rematerialization: only what comes into each layer."""
    return {i for i, (p, var) in enumerate(labels.variables) if _is_boundary(found[p], var)}


def _sqrt(found: Sequence[Place], labels: Numbers) -> set[int]:
    """Of n layers, every ceil(sqrt(n))-th one's input (Chen et al., https://arxiv.org/abs/1604.06174); scans: all."""
    kept = _full(found, labels)
    for p, place in enumerate(found):
        if place.pair is None:
            points = crossings(place)
            step = max(1, math.ceil(math.sqrt(len(points))))
            skipped = {v for i, v in enumerate(points) if i % step}
            kept -= {
                i for i in kept if labels.variables[i][0] == p and labels.variables[i][1] in skipped
            }
    return kept


def _dots(found: Sequence[Place], labels: Numbers) -> set[int]:
    """Results of matrix products, and what comes into each layer (`jax.checkpoint_policies.dots_saveable`)."""
    return _full(found, labels) | _products(found, labels, batched=True)


def _dots_no_batch(found: Sequence[Place], labels: Numbers) -> set[int]:
    """Those without batch axes (`dots_with_no_batch_dims_saveable`)."""
    return _full(found, labels) | _products(found, labels, batched=False)


def _products(found: Sequence[Place], labels: Numbers, batched: bool) -> set[int]:
    kept = set()
    for i, (p, _) in enumerate(labels.variables):
        producer = labels.problem.values[i].producer
        if producer is None:
            continue
        eqn = found[p].jaxpr.eqns[labels.equations[producer][1]]
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            batch = (
                eqn.params["dimension_numbers"][1][0] if eqn.primitive.name == "dot_general" else ()
            )
            if batched or not batch:
                kept.add(i)
    return kept


def _is_boundary(place: Place, var: object) -> bool:
    if place.pair is not None:
        return var in place.jaxpr.invars and var not in place.free
    return var in crossings(place)


def _as_choice(rule: Callable[[Sequence[Place], Numbers], set[int]], how: str = KEEP) -> Baseline:
    def choice(found: Sequence[Place], labels: Numbers) -> Choice:
        p = labels.problem
        kept = {i for i in rule(found, labels) if not p.values[i].free}
        again = _again(labels, kept)
        size = sum(p.values[i].nbytes for i in kept)
        seconds = sum(p.values[i].seconds for i in kept) + sum(p.ops[o].seconds for o in again)
        if how == OFFLOAD:
            shown = [max(0.0, size / speed - p.hidden) for speed in (p.to_host, p.from_host)]
            seconds = sum(shown) + sum(p.ops[o].seconds for o in again)
        on_device = round(p.staged * size) if how == OFFLOAD else size
        host = size if how == OFFLOAD else 0
        return Choice(
            dict.fromkeys(sorted(kept), how), frozenset(again), on_device, host, seconds, 0.0
        )

    return choice


def _again(labels: Numbers, kept: set[int]) -> set[int]:
    """The operations that have to run again."""
    p, again = labels.problem, set()
    todo = [i for i in p.required if i not in kept]
    while todo:
        i = todo.pop()
        value = p.values[i]
        if value.free or i in kept or value.producer is None or value.producer in again:
            if not value.free and i not in kept and value.producer is None:
                kept.add(i)  # nothing makes it again
            continue
        again.add(value.producer)
        todo += p.ops[value.producer].inputs
    return again


BASELINES: dict[str, Baseline] = {
    "keep-all": _as_choice(_keep_all),
    "full-remat": _as_choice(_full),
    "sqrt": _as_choice(_sqrt),
    "save-dots": _as_choice(_dots),
    "save-dots-no-batch": _as_choice(_dots_no_batch),
    "offload-inputs": _as_choice(_full, OFFLOAD),
    "offload-dots": _as_choice(_dots_no_batch, OFFLOAD),
}
