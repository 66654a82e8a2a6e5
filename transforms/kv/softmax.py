"""The usual attention, recognised: ``softmax(mask(cap(scale * q @ keys.T))) @ values``.

Any attention can be run as it is (`replay`); one of this form can be run by a kernel. It is recognised by its dataflow,
whatever the layout, the order of casts, or the way of writing: the weights are ``e / sum(e)`` with ``e = exp(x - m)``,
m the same for all tokens, and x the scores after scales, a soft cap and masks, in this order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.core import Tracer

from stowax.pallas_kernels.codecs import LayoutError

from .axes import Atom
from .expr import Node, is_node, is_rooted, shape_of
from .masks import HIDDEN
from .match import Attention, Read

_SAME = (
    "convert_element_type", "reduce_precision", "stop_gradient", "copy", "copy_p", "name", "sharding_constraint",
    "optimization_barrier", "broadcast_in_dim", "reshape", "transpose", "squeeze",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Tokens that are hidden.

    Attributes:
      node: the equation that hides them; its axes are those of the mask.
      array: the condition or the bias, an operand of it.
      shown: its value where a token is seen.
    """

    node: Node
    array: Any
    shown: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """An attention of the usual form.

    Attributes:
      key, value: what it reads.
      dot: the matmul that gives the scores.
      side: which operand of it is the queries.
      scale: factors of the scores, numbers or arrays of one element.
      soft_cap: see `decode_attention`; None for none.
      masks: all of them hide.
    """

    key: Read
    value: Read
    dot: Node
    side: int
    scale: tuple[Any, ...]
    soft_cap: float | None
    masks: tuple[Mask, ...]


def recognise(run: Any, found: Attention) -> Softmax:
    """The form of an attention. Raises LayoutError with what is unusual."""
    if [r.role for r in found.reads] not in (["key", "value"], ["value", "key"]):
        raise LayoutError("keys and values are not one stream each")
    key, value = sorted(found.reads, key=lambda r: r.role)
    if run.axes.resolve(key.lead) != run.axes.resolve(value.lead):
        raise LayoutError("keys and values have their heads in different orders")
    if peel(found.operands[1 - found.side]) is not peel(value.node):
        raise LayoutError("values are changed after they are read")
    top = _exponent(run, found)
    scores = _Scores(run, found.token, key)
    scores.follow(top)
    assert scores.dot is not None
    return Softmax(
        key, value, scores.dot, scores.side, tuple(scores.scale), scores.soft_cap, tuple(scores.masks),
    )  # fmt: skip


def peel(x: Any) -> Any:
    """What casts and layout alone were done to."""
    while is_rooted(x) and x.view is None and x.op in _SAME:
        x = x.inputs[0]
    return x


def made_of(run: Any, x: Any) -> Node | None:
    """The equation that made what does not depend on caches, where it is known."""
    if is_node(x):
        return x if x.eqn is not None else None
    return run.made_by(x) if isinstance(x, Tracer) else None


def number(run: Any, x: Any) -> float | None:
    """The one number that all entries of an array are, where it is a constant of the program."""
    while (node := made_of(run, x)) is not None and node.op in _SAME:
        x = node.inputs[0]
    if node is not None or is_node(x) or isinstance(x, Tracer):
        return None
    value = np.asarray(x, np.float64)
    return float(value.flat[0]) if value.size and np.all(value == value.flat[0]) else None


def _exponent(run: Any, found: Attention) -> Any:
    """The scores that the softmax is of."""
    weights = peel(found.weights)
    if weights.op != "div" or not all(map(is_rooted, weights.inputs)):
        raise LayoutError("the weights are not divided by their sum before they meet the values")
    e, total = map(peel, weights.inputs)
    if total.op != "reduce_sum" or peel(total.inputs[0]) is not e or e.op != "exp":
        raise LayoutError("the weights are no softmax")
    if not _reduces(run, total, found.token):
        raise LayoutError("the sum of the softmax is not over the tokens alone")
    x = peel(e.inputs[0])
    if x.op == "sub" and is_rooted(x.inputs[0]):
        if _varies(run, x.inputs[1], x, 1, found.token):
            raise LayoutError("what is taken from the scores differs between tokens")
        return x.inputs[0]
    return x


def _reduces(run: Any, node: Node, token: Atom) -> bool:
    source = node.inputs[0]
    labels = run.axes.labels(source.labels)
    return [labels[a] for a in node.eqn.params["axes"] if labels[a]] == [(token,)]  # pyright: ignore


def _varies(run: Any, x: Any, node: Node, i: int, token: Atom) -> bool:
    """Whether operand `i` of an equation differs along the tokens."""
    if is_rooted(x):
        return any(token in dim for dim in run.axes.labels(x.labels))
    labels = run.axes.labels(node.labels)
    return any(token in dim and n != 1 for dim, n in zip(labels, shape_of(x)))


class _Scores:
    """Follows scores back to the matmul that they come from."""

    def __init__(self, run: Any, token: Atom, key: Read):
        self.run, self.token, self.key = run, token, key
        self.scale: list[Any] = []
        self.soft_cap: float | None = None
        self.masks: list[Mask] = []
        self.dot: Node | None = None
        self.side = 0

    def follow(self, x: Any) -> None:
        while self.dot is None:
            node = peel(x)
            step = _STEPS.get(node.op) if is_rooted(node) and node.view is None else None
            if step is None:
                raise LayoutError(f"`{getattr(node, 'op', 'a constant')}` is done to the scores")
            x = step(self, node)

    def divide(self, node: Node) -> Any:
        return self.factor(node, node.inputs[0], node.inputs[1], lambda c: 1 / c)

    def multiply(self, node: Node) -> Any:
        x, y = node.inputs if is_rooted(node.inputs[0]) else node.inputs[::-1]
        return self.factor(node, x, y, lambda c: c)

    def factor(self, node: Node, x: Any, y: Any, of: Any) -> Any:
        if not is_rooted(x) or is_rooted(y):
            raise LayoutError("scores are multiplied by scores")
        value = number(self.run, y)
        if value is not None:
            self.scale.append(of(value))
        elif not any(n != 1 for n in shape_of(y)):
            self.scale.append(of(self.run.array(y).reshape(())))
        else:
            raise LayoutError("scores are multiplied by different numbers")
        return x

    def tanh(self, node: Node) -> Any:
        """``c * tanh(x)`` is ``c * tanh(c * x / c)``."""
        if self.soft_cap is not None or not all(isinstance(c, float) for c in self.scale):
            raise LayoutError("the soft cap is not one number")
        self.soft_cap = float(np.prod(self.scale))
        if self.soft_cap <= 0:
            raise LayoutError("the soft cap is not positive")
        return node.inputs[0]

    def select(self, node: Node) -> Any:
        which, *cases = node.inputs
        kept = [i for i, c in enumerate(cases) if is_rooted(c)]
        if len(cases) != 2 or len(kept) != 1 or is_rooted(which):
            raise LayoutError("a choice between scores")
        self.hide(cases[1 - kept[0]])
        self.masks.append(Mask(node, which, bool(kept[0])))
        return cases[kept[0]]

    def add(self, node: Node) -> Any:
        x, bias = node.inputs if is_rooted(node.inputs[0]) else node.inputs[::-1]
        if is_rooted(bias):
            raise LayoutError("scores are added to scores")
        if _varies(self.run, bias, node, node.inputs.index(bias), self.token):
            self.masks.append(self.bias(node, bias))
        elif self.soft_cap is not None:
            raise LayoutError("a bias is added before the soft cap")
        return x  # what is the same for all tokens changes no weight

    def bias(self, node: Node, x: Any) -> Mask:
        """A bias that is 0 or hides."""
        made = made_of(self.run, x)
        while made is not None and made.op in _SAME:
            made = made_of(self.run, made.inputs[0])
        if made is None or made.op != "select_n" or len(made.inputs) != 3:
            raise LayoutError("a bias is added that is no mask of positions")
        zero = [number(self.run, v) == 0 for v in made.inputs[1:]]
        if sum(zero) != 1:
            raise LayoutError("a bias is added that is no mask of positions")
        self.hide(made.inputs[2 - zero.index(True)])
        return Mask(node, x, 0)

    def hide(self, fill: Any) -> None:
        if self.soft_cap is not None:
            raise LayoutError("a mask comes before the soft cap")
        value = number(self.run, fill)
        factor = np.prod(self.scale) if all(isinstance(c, float) for c in self.scale) else 0
        if value is None or not value * factor <= HIDDEN:
            raise LayoutError("hidden scores do not become very low")

    def matmul(self, node: Node) -> Any:
        reads = [peel(v) is peel(self.key.node) for v in node.inputs]
        if sum(reads) != 1 or is_rooted(node.inputs[reads.index(False)]):
            raise LayoutError("keys are changed after they are read")
        self.dot, self.side = node, reads.index(False)


_STEPS = {
    "div": _Scores.divide,
    "mul": _Scores.multiply,
    "tanh": _Scores.tanh,
    "select_n": _Scores.select,
    "add": _Scores.add,
    "dot_general": _Scores.matmul,
}
