"""What the mask of an attention is, in words: "causal", "causal + window 1024", "length", "full", ...

A mask that is made of iotas and lengths is evaluated in numpy, for a few positions and lengths; the tokens that it lets
through say what it is. Nothing of the program is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .axes import Dim
from .evaluate import Coord, Evaluation, index_array, moves
from .expr import Node, is_node, is_rooted, shape_of
from .match import Attention
from .rewrite import CacheRun
from .writes import Positions

OTHER, ARRAY = "structured", "array"
HIDDEN = -1e4  # a bias below this hides a token


class _Unnamed(Exception):
    """There is no better name than this."""


def mask_name(run: CacheRun, found: Attention) -> str:
    """The name of an attention's mask.

    Terms joined by " + ": "causal", "window N" (of the newest N tokens) and "length" (a bound that the program is
    given or counts); "full" where every token is seen, "structured" for anything else that is made of positions,
    "array" for what is an array with an entry for each token.
    """
    try:
        terms = list(_terms(run, found))
        return _Mask(run, found, terms).name() if terms else "full"
    except _Unnamed as error:
        return str(error)


def _terms(run: CacheRun, found: Attention) -> Iterator[tuple[Node, int]]:
    """Equations between the two matmuls that have an operand with an entry for each token, and which operand."""
    todo, seen = [found.weights], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or node.labels is None or node.op in ("dot_general", "cache"):
            continue
        seen.add(id(node))
        todo += [v for v in node.inputs if is_rooted(v)]
        labels = run.axes.labels(node.labels)
        for i, v in enumerate(node.inputs):
            if is_rooted(v) or (
                node.op == "select_n" and i
            ):  # what stands in a hidden token's place
                continue
            if any(found.token in dim and n != 1 for dim, n in zip(labels, shape_of(v))):
                yield node, i


class _Mask:
    """Evaluates the terms of a mask.

    The traced numbers that it depends on are its roots: those that say where new rows go (`own`), and others.
    """

    def __init__(self, run: CacheRun, found: Attention, terms: Sequence[tuple[Node, int]]):
        self.run, self.found, self.terms = run, found, terms
        leaves = [leaf for node, i in terms for leaf in _leaves(run, node.inputs[i])]
        if any(found.length in shape_of(v) for v in leaves if isinstance(v, Tracer)):
            raise _Unnamed(ARRAY)
        self.roots = {id(v): v for v in leaves if isinstance(v, Tracer)}
        if not all(jnp.issubdtype(v.dtype, jnp.integer) for v in self.roots.values()):
            raise _Unnamed(OTHER)
        written = {id(v) for s in _sources(found.start) for v in _leaves(run, s)}
        self.own = {k for k, v in self.roots.items() if k in written or self._is_positions(v)}
        rows = found.rows
        self.queries = np.unique([0, min(1, rows - 1), rows // 2, rows - 1])

    def _is_positions(self, root: Any) -> bool:
        """Whether it has an entry for each new token."""
        return self.found.rows > 1 and root.shape[-1:] == (self.found.rows,)

    def name(self) -> str:
        length, last = self.found.length, self.found.length - self.found.rows
        starts = {n for n in (0, length // 3, length // 2, last) if n <= last}
        if isinstance(self.found.start, str):  # the newest rows are the last ones
            starts = {last}
        elif not self.own:
            starts = {0}
        others = set(self.roots) - self.own
        loose = max((length, 0), key=lambda n: self.seen(last, n).sum()) if others else length
        shown = {start: self.seen(start, loose) for start in sorted(starts)}
        words = self._bounds(shown)
        if others and any(np.any(self.seen(s, length // 2) != x) for s, x in shown.items()):
            words.append("length")
        return " + ".join(dict.fromkeys(words)) or "full"

    def _bounds(self, shown: dict[int, np.ndarray]) -> list[str]:
        """Names for the first and the last token that each query sees."""
        at = np.array([start + self.queries for start in shown])
        seen = np.array(list(shown.values()))  # [start, query, token]
        low, high = seen.argmax(-1), seen.shape[-1] - 1 - seen[..., ::-1].argmax(-1)
        if not np.array_equal(seen.sum(-1), high - low + 1):
            raise _Unnamed(OTHER)
        words = []
        if np.array_equal(high, at):
            words.append("causal")
        elif np.any(high != high[:, :1]):
            raise _Unnamed(OTHER)
        elif np.any(high != seen.shape[-1] - 1):
            words.append("length")
        if low.any():
            window = (high - low + 1).max()
            if not np.array_equal(low, np.maximum(0, high - window + 1)):
                raise _Unnamed(OTHER)
            words.append(f"window {window}")
        return words

    def seen(self, start: int, other: int) -> np.ndarray:
        """``bool[queries, tokens]`` where new rows go to `start` and other roots are `other`."""
        given = {}
        for key, root in self.roots.items():
            value = np.full(root.shape, start if key in self.own else other)
            if key in self.own and self._is_positions(root):
                value = value + np.arange(self.found.rows)
            given[key] = value.astype(root.dtype)
        numbers = _Numbers(self.run, given)
        shown = np.ones((self.queries.size, self.found.length), bool)
        for node, i in self.terms:
            mask = node.inputs[i]
            labels = self.run.axes.labels(node.labels)  # pyright: ignore[reportArgumentType]
            coords = [self._coord(d) if n != 1 else None for d, n in zip(labels, shape_of(mask))]
            shown &= _lets_through(node, i, numbers(mask, coords))
        return shown

    def _coord(self, dim: Dim) -> Coord:
        """The queries and all tokens, of the first row of the batch and the first head."""
        index: Any = np.zeros((1, 1), int)
        for atom in dim:
            index = index * atom.size
            if atom is self.found.token:
                index = index + np.arange(self.found.length)
            elif atom.size == self.found.rows and atom not in self.found.reads[0].lead:
                index = index + self.queries[:, None]
        return index


def _lets_through(node: Node, i: int, value: np.ndarray) -> np.ndarray:
    """The tokens that a term leaves as they are."""
    if node.op == "select_n":
        kept = [is_rooted(v) for v in node.inputs[1:]]
        if sum(kept) != 1:
            raise _Unnamed(OTHER)
        return value.astype(int) == kept.index(True)
    if np.ptp(value) == 0:
        return np.ones((), bool)
    if node.op in ("add", "sub"):
        value = -value if node.op == "sub" else value
        hidden, same = value < HIDDEN, value == 0
    elif node.op == "mul":
        hidden, same = value == 0, value == 1
    else:
        raise _Unnamed(OTHER)
    if not np.all(hidden | same):
        raise _Unnamed(OTHER)
    return same


def _sources(start: Any) -> list[Any]:
    """The indices that say where new rows go."""
    if isinstance(start, Positions):
        return [v for v in start.source if is_node(v) or hasattr(v, "shape")]
    return [] if start is None or isinstance(start, str) else [start]


def made(run: CacheRun, x: Any) -> Node | None:
    """The equation that made what is not a constant."""
    return run.made_by(x) if is_node(x) or isinstance(x, Tracer) else None


def _leaves(run: CacheRun, x: Any) -> Iterator[Any]:
    """What an index is made of."""
    todo, seen = [x], set()
    while todo:
        v = todo.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        node = made(run, v)
        if node is None:
            yield v
        else:
            todo += node.inputs


class _Numbers(Evaluation):
    """Index arithmetic in numpy, on values `given` for what is traced."""

    def __init__(self, run: CacheRun, given: dict[int, np.ndarray]):
        super().__init__(2, lambda x: self(x, ()))  # pyright: ignore[reportArgumentType]
        self.run, self.given = run, given

    def __call__(self, x: Any, coords: Sequence[Coord]) -> Any:
        node = None if id(x) in self.given else made(self.run, x)
        if node is None:
            x = self.given[id(x)] if id(x) in self.given else np.asarray(x)
            index = [np.clip(index_array(c, 2), 0, n - 1) for c, n in zip(coords, x.shape)]
            return x[tuple(index)]
        assert node.eqn is not None
        if node.op == "iota":
            coord = coords[node.eqn.params["dimension"]]
            return index_array(coord, 2).astype(node.dtype)
        moved = moves(node, coords, self)
        if moved is not None:
            return self(node.inputs[0], moved)
        if node.op not in _NUMPY:
            raise _Unnamed(OTHER)
        values = [self(v, coords if shape_of(v) else ()) for v in node.inputs]
        return _NUMPY[node.op](node.eqn.params, *values).astype(node.dtype)

    def start(self, x: Any, last: int) -> Any:
        return np.clip(self(x, ()), 0, last)


def _divide(p: Any, x: Any, y: Any) -> Any:
    return np.trunc(x / y) if np.issubdtype(x.dtype, np.integer) else x / y


def _plain(*functions: str) -> dict[str, Any]:
    """numpy functions of the name of a primitive, or ``primitive=name``."""
    pairs = [f.split("=") if "=" in f else (f, f) for f in functions]
    return {op: lambda p, *v, name=name: getattr(np, name)(*v) for op, name in pairs}


# fmt: off
_NUMPY: dict[str, Any] = {
    **_plain(
        "neg=negative", "not=invert", "sign", "abs", "floor", "ceil", "round", "is_finite=isfinite", "square",
        "copy=asarray", "copy_p=asarray", "stop_gradient=asarray", "name=asarray", "convert_element_type=asarray",
        "reduce_precision=asarray", "sharding_constraint=asarray", "add", "add_any=add", "sub=subtract",
        "mul=multiply", "max=maximum", "min=minimum", "rem=fmod", "and=bitwise_and", "or=bitwise_or",
        "xor=bitwise_xor", "eq=equal", "ne=not_equal", "lt=less", "le=less_equal", "gt=greater", "ge=greater_equal",
        "shift_left=left_shift", "shift_right_arithmetic=right_shift",
    ),
    "div": _divide,
    "integer_pow": lambda p, x: x ** p["y"],
    "clamp": lambda p, low, x, high: np.clip(x, low, high),
    "select_n": lambda p, which, *cases: np.choose(which.astype(int), cases),
}
# fmt: on
