"""`joined.join` as one kernel: a program joins the parts of one query head, with the rows that are kept in full."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .. import triton
from ..codecs.rows import hadamard_matrix
from ..op import Op, one_by_one
from . import joined
from .joined import LOG2E, NEVER, Part
from .reference import by_head
from .rows import FullRows

TILE = 2**14  # elements that a program has in registers at a time
WARPS = 4

Carry = tuple[jax.Array, jax.Array, jax.Array]  # greatest score, total of weights, weighted sum


def refusal(q: Any) -> str:
    """Why this kernel can't join; "" where it can."""
    h = q.shape[-1]
    return f"{h} elements of a row are no power of two" if h & (h - 1) else ""


def kernel(
    parts: Part,
    q: jax.Array,
    full: Sequence[FullRows],
    *,
    scale: float,
    soft_cap: float | None,
    rotated: bool,
    weights: bool = False,
    interpret: bool = False,
) -> tuple[Any, ...]:
    """See `joined.join`. Where there are `joined.MANY` rows in full, XLA attends to them."""
    form = {"scale": scale, "soft_cap": soft_cap}
    few = [rows for rows in full if _are_few(rows)]
    many = [rows for rows in full if rows.keys.shape[2] > joined.MANY]
    dtype = jnp.float32 if many else q.dtype
    out, total, *scores = _call(parts, q, few, dtype, rotated, weights, interpret, **form)
    if many:
        lead = (*parts[0].shape[:2], parts[0].shape[3])
        found = joined.Sums(total.reshape(lead), jnp.ones(lead), out.reshape(*lead, -1))
        more = (joined.attend(q, rows, **form) for rows in many)
        out, total = joined.finished(found, *more)
        out, total = out.reshape(q.shape).astype(q.dtype), total.reshape(q.shape[:2])
    if not weights:
        return out, total
    own = map(joined.natural, scores)
    of = lambda rows: joined.scores_of(q, rows, **form).swapaxes(2, 3)
    every = [next(own) if _are_few(rows) else of(rows) for rows in full]
    return out, total, tuple(joined.weights_of(x, total) for x in every)


def _are_few(rows: FullRows) -> bool:
    """Whether the kernel takes them."""
    return 0 < rows.keys.shape[2] <= joined.MANY


def _call(
    parts: Part,
    q: jax.Array,
    full: Sequence[FullRows],
    dtype: Any,
    rotated: bool,
    weights: bool,
    interpret: bool,
    **form: Any,
) -> list[jax.Array]:
    """The output, the logarithm of the denominator, and scores to base 2 ``f32[B, N, E]`` of each of `full`."""
    b, n, h = q.shape
    operands = [*parts, q]
    if rotated:
        operands.append(jnp.asarray(_signs(h)))
    if full:
        flags = [by_head(rows.seen).astype(jnp.int32) for rows in full]
        heads = max(x.shape[1] for x in flags)
        wide = [jnp.broadcast_to(x, (b, heads, x.shape[2])) for x in flags]
        operands += [jnp.concatenate(wide, axis=2), *(x for r in full for x in (r.keys, r.values))]
    counts = [rows.keys.shape[2] for rows in full] if weights else []
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    padded = [f32(b, n, count + -count % _rows_together(count, h)) for count in counts]
    body = functools.partial(_body, **form, rotated=rotated, full=len(full), outs=2 + len(counts))
    k = parts[0].shape[1]
    out, total, *scores = triton.call(
        body,
        grid=(b, k, n // k),
        out=[jax.ShapeDtypeStruct(q.shape, dtype), f32(b, n), *padded],
        aliases={},
        warps=WARPS,
        interpret=interpret,
    )(*operands)
    return [out, total, *(x[..., :count] for x, count in zip(scores, counts))]


def _signs(width: int) -> np.ndarray:
    """The Hadamard matrix as signs, ``int8[width, width]``."""
    return np.sign(hadamard_matrix(width)).astype(np.int8)


def _body(
    *refs: Any, scale: float, soft_cap: float | None, rotated: bool, full: int, outs: int
) -> None:
    parts, logs, q, *rest = refs[:-outs]
    out, total, *score_outs = refs[-outs:]
    b, k, g = (pl.program_id(i) for i in range(3))
    head = k * pl.num_programs(2) + g
    h = q.shape[-1]
    lane = lax.broadcasted_iota(jnp.int32, (1, h), 1)
    signs = rest.pop(0) if rotated else None

    def part(at: jax.Array, there: jax.Array) -> tuple[Any, ...]:
        scores = jnp.where(there, logs[b, k, at, g], NEVER)
        return scores, parts[b, k, at[:, None], g, lane]

    def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
        x = (keys.astype(jnp.float32) * (q[b, head, :].astype(jnp.float32) * scale)[None]).sum(1)
        x = soft_cap * jnp.tanh(x / soft_cap) if soft_cap is not None else x
        return jnp.where(seen, x * LOG2E, NEVER)

    tiles = [_Tiles(parts.shape[2], h, part, lambda score, values: (score, values))]
    if full:
        seen, *pieces = rest
        of = k if seen.shape[1] > 1 else 0
        start = 0
        score_outs = score_outs or [None] * full
        for keys, values, score_out in zip(pieces[::2], pieces[1::2], score_outs):

            def row(at: jax.Array, there: jax.Array, keys=keys, values=values, start=start) -> Any:
                flags = there & (seen[b, of, start + at] != 0)
                return keys[b, k, at[:, None], lane], flags, values[b, k, at[:, None], lane]

            use = lambda keys, flags, values: (scores(keys, flags), values.astype(jnp.float32))
            to = None if score_out is None else (score_out, b, head)
            tiles.append(_Tiles(keys.shape[2], h, row, use, to))
            start += keys.shape[2]
    for t in tiles:
        t.prefetch()
    turn = None if signs is None else signs[...]
    top, sum_, acc = tiles[0].add((jnp.float32(NEVER), jnp.float32(0), jnp.zeros(h, jnp.float32)))
    if turn is not None:
        acc = (acc[:, None] * turn.astype(jnp.float32)).sum(0) / math.sqrt(h & -h)
    carry = top, sum_, acc
    for t in tiles[1:]:
        carry = t.add(carry)
    top, sum_, acc = carry
    out[b, head, :] = (acc / jnp.where(sum_ == 0, 1.0, sum_)).astype(out.dtype)
    log = top / LOG2E + jnp.log(jnp.where(sum_ == 0, 1.0, sum_))
    total[b, head] = jnp.where(sum_ == 0, -jnp.inf, log)


class _Tiles:
    """Rows that are added to the sums, as many at a time as there are registers for.

    Args:
      count: of rows.
      load: what rows are made of, by their numbers and whether they are there.
      use: scores ``f32[E]`` to base 2 and values ``f32[E, H]``, of what was loaded.
      to: an array and the row of it that scores are written to, up to whole tiles; None for nowhere.
    """

    def __init__(
        self,
        count: int,
        h: int,
        load: Callable[..., Any],
        use: Callable[..., Any],
        to: Any = None,
    ):
        self.count, self.load, self.use, self.to = count, load, use, to
        self.size = _rows_together(count, h)
        self.first: Any = None

    def at(self, i: Any) -> jax.Array:
        return i * self.size + lax.broadcasted_iota(jnp.int32, (self.size,), 0)

    def some(self, i: Any) -> Any:
        at = self.at(i)
        return self.load(jnp.minimum(at, self.count - 1), at < self.count)

    def prefetch(self) -> None:
        """Loads them before any are used, where one tile holds all: a program waits once for all its rows."""
        if self.count <= self.size:
            self.first = self.some(0)

    def add(self, carry: Carry) -> Carry:
        if self.first is not None:
            return self.add_some(0, carry, self.first)
        step = lambda i, carry: self.add_some(i, carry, self.some(i))
        return lax.fori_loop(0, -(-self.count // self.size), step, carry)

    def add_some(self, i: Any, carry: Carry, loaded: Any) -> Carry:
        scores, values = self.use(*loaded)
        if self.to is not None:
            ref, *row = self.to
            ref[*row, self.at(i)] = scores
        return _add(carry, scores, values)


def _rows_together(count: int, h: int) -> int:
    """Rows of a tile."""
    return min(pl.next_power_of_2(count), max(1, TILE // h))


def _add(carry: Carry, scores: jax.Array, values: jax.Array) -> Carry:
    """With rows ``f32[E, H]`` of scores ``f32[E]``, to base 2."""
    top, total, acc = carry
    best = jnp.maximum(top, scores.max())
    weights = jnp.where(scores <= NEVER, 0.0, jnp.exp2(scores - best))
    old = jnp.exp2(top - best)
    return best, total * old + weights.sum(), acc * old + (weights[:, None] * values).sum(0)


def _by_xla(operands: Any, **options: Any) -> tuple[Any, ...]:
    return joined.join(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> tuple[Any, ...]:
    if refusal(operands[1]) or triton.refusal():
        return _by_xla(operands, **options)
    return kernel(*operands, **options)


JOIN = Op(
    "join_attention", _by_xla, {"cuda": _on_cuda}, one_by_one, stable=False, context=triton.lowering
)
