"""Which equations are deferred, and what becomes of the axes and the caches in them.

Each rule takes an equation with at least one deferred operand and gives the nodes of its results, or raises
`LayoutError` with the reason why it has to be run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from .axes import Atom, Axes, Dim, Labels, fresh
from .expr import Node, View, is_rooted, shape_of

# fmt: off
UNARY = (
    "neg", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "integer_pow", "abs",
    "sign", "floor", "ceil", "round", "is_finite", "not", "convert_element_type", "stop_gradient", "copy", "copy_p",
    "square", "reduce_precision", "name", "erf", "sharding_constraint", "cbrt",
)
NARY = (
    "add", "sub", "mul", "div", "max", "min", "pow", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
    "select_n", "clamp", "rem", "add_any", "shift_left", "shift_right_logical", "shift_right_arithmetic",
)
LAYOUT = frozenset(("broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "split", "rev"))
REDUCTIONS = frozenset(("reduce_max", "reduce_min", "reduce_sum", "reduce_and", "reduce_or"))
# fmt: on
ELEMENTWISE = frozenset(UNARY + NARY)
INDEX = (ELEMENTWISE - {"exp", "log", "tanh", "erf", "logistic"}) | LAYOUT | {"concatenate"}

Rule = Callable[["Deferral", compat.Eqn, list[Any]], list[Node]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


class Deferral:
    """The axes of one rewriting, and the rules."""

    def __init__(self) -> None:
        self.axes = Axes()

    def array(self, value: Any, eqn: compat.Eqn | None = None, reason: str = "") -> Any:
        """A value, computed."""
        raise NotImplementedError

    def same(self, a: Any, b: Any) -> bool:
        """Whether two indices are certainly equal."""
        raise NotImplementedError

    def made_by(self, x: Any) -> Node | None:
        """The equation that made a value, where it is known."""
        raise NotImplementedError

    def nodes(self, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
        """The results of `eqn`, deferred. Raises LayoutError."""
        if any(map(is_rooted, values)):
            handle = RULES.get(eqn.primitive.name)
            if handle is None:
                raise LayoutError(f"`{eqn.primitive.name}` is no part of attention")
            return handle(self, eqn, values)
        if eqn.primitive.name not in INDEX | {"dynamic_slice"}:
            raise LayoutError("it is used as an array")
        return [make(eqn, values, i) for i in range(len(eqn.outvars))]


def make(
    eqn: compat.Eqn,
    values: Any,
    out: int = 0,
    labels: Labels | None = None,
    view: View | None = None,
) -> Node:
    aval: Any = eqn.outvars[out].aval
    return Node(tuple(aval.shape), aval.dtype, eqn, tuple(values), out, labels, view)


def _shape(eqn: compat.Eqn) -> tuple[int, ...]:
    aval: Any = eqn.outvars[0].aval
    return tuple(aval.shape)


def rooted(values: list[Any]) -> Node:
    return next(v for v in values if is_rooted(v))


def labels_of(node: Node) -> Labels:
    assert node.labels is not None
    return node.labels


@rule(*ELEMENTWISE)
def _elementwise(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    first = rooted(values)
    labels: list[Dim] = [()] * len(_shape(eqn))
    for value in values:
        if not is_rooted(value):
            continue
        for i, dim in enumerate(labels_of(value)):
            labels[i] = run.axes.merge(labels[i], dim) if labels[i] and dim else labels[i] or dim
    if eqn.primitive.name in ("select_n", "add"):
        from .onehot import one_hot

        found = one_hot(run, eqn, values)
        if found is not None:
            return [found]
    keep = eqn.primitive.name in ("name", "copy", "copy_p", "sharding_constraint", "stop_gradient")
    return [make(eqn, values, 0, tuple(labels), first.view if keep else None)]


@rule("optimization_barrier")
def _barrier(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return list(values)


@rule("transpose")
def _transpose(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x = values[0]
    labels = tuple(labels_of(x)[i] for i in eqn.params["permutation"])
    return [make(eqn, values, 0, labels, x.view)]


@rule("squeeze")
def _squeeze(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, gone = values[0], {d % values[0].ndim for d in eqn.params["dimensions"]}
    labels = tuple(dim for i, dim in enumerate(labels_of(x)) if i not in gone)
    return [make(eqn, values, 0, labels, x.view)]


@rule("reshape")
def _reshape(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x = values[0]
    if eqn.params.get("dimensions") is not None:
        raise LayoutError("the reshape also transposes")
    labels = run.axes.reshape(labels_of(x), eqn.params["new_sizes"])
    return [make(eqn, values, 0, labels, x.view)]


@rule("broadcast_in_dim")
def _broadcast(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, shape = values[0], eqn.params["shape"]
    if not is_rooted(x):
        raise LayoutError("its shape is dynamic")
    labels = list(fresh(shape))
    for i, dim in enumerate(eqn.params["broadcast_dimensions"]):
        if x.shape[i] == shape[dim]:
            labels[dim] = labels_of(x)[i]
    return [make(eqn, values, 0, tuple(labels), x.view)]


@rule("slice")
def _slice(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, p = values[0], eqn.params
    strides = p["strides"] or (1,) * x.ndim
    ranges = list(zip(p["start_indices"], p["limit_indices"], strides))
    labels, view = _cut(run, x, ranges)
    return [make(eqn, values, 0, labels, view)]


@rule("split")
def _split(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, axis = values[0], eqn.params["axis"]
    out, start = [], 0
    for i, size in enumerate(eqn.params["sizes"]):
        ranges = [(0, n, 1) for n in x.shape]
        ranges[axis] = (start, start + int(size), 1)
        labels, view = _cut(run, x, ranges)
        out.append(make(eqn, values, i, labels, view))
        start += int(size)
    return out


@rule("unstack")
def _unstack(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, axis = values[0], eqn.params["axis"]
    out = []
    for i in range(x.shape[axis]):
        ranges = [(0, n, 1) for n in x.shape]
        ranges[axis] = (i, i + 1, 1)
        labels, view = _cut(run, x, ranges)
        labels = labels[:axis] + labels[axis + 1 :]
        out.append(make(eqn, values, i, labels, view))
    return out


def _cut(run: Deferral, x: Node, ranges: list[tuple[int, int, int]]) -> tuple[Labels, View | None]:
    """Labels and view of a slice."""
    labels, view = [], x.view
    for dim, (start, stop, stride), size in zip(labels_of(x), ranges, x.shape):
        if (start, stop, stride) == (0, size, 1):
            labels.append(dim)
            continue
        n = len(range(start, stop, stride))
        dim = run.axes.resolve(dim)
        atom = dim[0] if len(dim) == 1 else None
        if atom is not None and atom.base is not None and stride == 1:
            lo, hi = atom.extra
            if (start, stop) == (lo, size - hi):
                labels.append((atom.base,))
                continue
        if view is None or atom is None or stride != 1:
            if len(dim) > 1 and view is not None:
                raise LayoutError("it is sliced across its axes")
            view = None
            labels.append(fresh((n,))[0])
        elif n == 1:
            view = view.fix(atom, start)
            labels.append(())
        else:
            sub = view.cell.sub(atom, start, n)
            view = dataclasses.replace(view, subs=(*view.subs, sub))
            labels.append((sub,))
    return tuple(labels), view


@rule("dynamic_slice")
def _dynamic_slice(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    x, *starts = values
    if not is_rooted(x):
        raise LayoutError("it is an index")
    sizes, labels, view = eqn.params["slice_sizes"], [], x.view
    for dim, size, whole, start in zip(labels_of(x), sizes, x.shape, starts):
        if size == whole:
            labels.append(dim)
            continue
        dim = run.axes.resolve(dim)
        if view is None or size != 1 or len(dim) != 1:
            raise LayoutError("a part of it is taken at an index that is computed")
        view = view.fix(dim[0], start)
        labels.append(())
    return [make(eqn, values, 0, tuple(labels), view)]


@rule("gather")
def _gather(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    """One entry of an axis, as in ``cache[layer]``."""
    x: Any = values[0]
    index = values[1]
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = [i for i in range(len(sizes)) if is_rooted(x) and sizes[i] != x.shape[i]]
    one = (
        len(cut) == 1
        and tuple(dims.start_index_map) == tuple(cut) == tuple(dims.collapsed_slice_dims)
        and shape_of(index) == (1,)
        and sizes[cut[0]] == 1
        and x.view is not None
    )
    if not one:
        from .paged import looked_up

        found = looked_up(run, eqn, values) if is_rooted(x) else None
        if found is not None:
            return [found]
        raise LayoutError("rows of it are gathered by an index (a paged or beam-searched cache)")
    dim = run.axes.resolve(labels_of(x)[cut[0]])
    if len(dim) != 1:
        raise LayoutError("an entry is gathered from a merged axis")
    view: Any = x.view
    view = view.fix(dim[0], Scalar(index))
    labels = tuple(d for i, d in enumerate(labels_of(x)) if i != cut[0])
    return [make(eqn, values, 0, labels, view)]


class Scalar:
    """An index ``[1]`` that stands for its one entry."""

    def __init__(self, value: Any):
        self.value = value


@rule("concatenate")
def _concatenate(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    axis = eqn.params["dimension"]
    first = rooted(values)
    others = [v for v in values if not is_rooted(v)]
    if first.view is not None and len(others) == len(values) - 1:
        from .writes import concatenated

        return [concatenated(run, eqn, values, axis)]
    from .writes import turned

    if (found := turned(run, eqn, values, axis)) is not None:
        return [found]
    dim = _joined(run, values, axis)
    labels = list(labels_of(first))
    for other in values:
        if is_rooted(other) and other is not first:
            for i, theirs in enumerate(labels_of(other)):
                if i != axis:
                    labels[i] = run.axes.merge(labels[i], theirs)
    labels[axis] = dim
    return [make(eqn, values, 0, tuple(labels), None)]


def _joined(run: Deferral, values: list[Any], axis: int) -> Dim:
    """The axis of a concatenation: scores with extra columns, or a new axis."""
    size = sum(shape_of(v)[axis] for v in values)
    if len([v for v in values if is_rooted(v)]) > 1:
        return (Atom(size),)
    at = next(i for i, v in enumerate(values) if is_rooted(v))
    dim = run.axes.resolve(labels_of(values[at])[axis])
    if len(dim) != 1:
        raise LayoutError("it is concatenated along a merged axis")
    before = sum(shape_of(v)[axis] for v in values[:at])
    after = sum(shape_of(v)[axis] for v in values[at + 1 :])
    return (Atom(size, base=dim[0], extra=(before, after)),)


@rule(*REDUCTIONS)
def _reduce(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    gone = set(eqn.params["axes"])
    labels = tuple(dim for i, dim in enumerate(labels_of(values[0])) if i not in gone)
    return [make(eqn, values, 0, labels, None)]


@rule("dot_general")
def _dot(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    """A cache (or what is made of it) times an array; two of them are the match's affair."""
    (contract, batch) = eqn.params["dimension_numbers"]
    side = 0 if is_rooted(values[0]) else 1
    x = labels_of(values[side])
    labels: list[Dim] = [x[i] for i in batch[side]]
    for s in (0, 1):
        free = [
            i for i in range(len(shape_of(values[s]))) if i not in contract[s] and i not in batch[s]
        ]
        sizes = [shape_of(values[s])[i] for i in free]
        labels += [x[i] for i in free] if s == side else list(fresh(sizes))
    return [make(eqn, values, 0, tuple(labels), None)]


@rule("dynamic_update_slice", "scatter")
def _update(run: Deferral, eqn: compat.Eqn, values: list[Any]) -> list[Node]:
    from .writes import scattered, updated

    handle = updated if eqn.primitive.name == "dynamic_update_slice" else scattered
    return [handle(run, eqn, values)]


def literal(value: Any) -> int | None:
    """A concrete integer, if it is one."""
    if isinstance(value, (int, np.integer)) or (
        isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu"
    ):
        return int(value)
    return None
