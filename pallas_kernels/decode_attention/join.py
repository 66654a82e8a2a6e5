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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `joined.join`."""
    b, n, h = q.shape
    full = [rows for rows in full if rows.seen.shape[-1]]
    operands = [*parts, q]
    if rotated:
        operands.append(jnp.asarray(_signs(h)))
    if full:
        flags = [by_head(rows.seen).astype(jnp.int32) for rows in full]
        heads = max(x.shape[1] for x in flags)
        wide = [jnp.broadcast_to(x, (b, heads, x.shape[2])) for x in flags]
        operands += [jnp.concatenate(wide, axis=2), *(x for r in full for x in (r.keys, r.values))]
    body = functools.partial(_body, scale, soft_cap, rotated, bool(full))
    k = parts[0].shape[1]
    return triton.call(
        body,
        grid=(b, k, n // k),
        out=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, n), jnp.float32),
        ],
        aliases={},
        warps=WARPS,
        interpret=interpret,
    )(*operands)


def _signs(width: int) -> np.ndarray:
    """The Hadamard matrix as signs, ``int8[width, width]``."""
    return np.sign(hadamard_matrix(width)).astype(np.int8)


def _body(scale: float, soft_cap: float | None, rotated: bool, has_full: bool, *refs: Any) -> None:
    outs, logs, q, *rest, out, total = refs
    b, k, g = (pl.program_id(i) for i in range(3))
    head = k * pl.num_programs(2) + g
    h = q.shape[-1]
    lane = lax.broadcasted_iota(jnp.int32, (1, h), 1)
    signs = rest.pop(0) if rotated else None

    def part(at: jax.Array, there: jax.Array) -> tuple[Any, ...]:
        scores = jnp.where(there, logs[b, k, at, g], NEVER)
        return scores, outs[b, k, at[:, None], g, lane]

    def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
        x = (keys.astype(jnp.float32) * (q[b, head, :].astype(jnp.float32) * scale)[None]).sum(1)
        x = soft_cap * jnp.tanh(x / soft_cap) if soft_cap is not None else x
        return jnp.where(seen, x * LOG2E, NEVER)

    tiles = [_Tiles(outs.shape[2], h, part, lambda score, values: (score, values))]
    if has_full:
        seen, *pieces = rest
        of = k if seen.shape[1] > 1 else 0
        start = 0
        for keys, values in zip(pieces[::2], pieces[1::2]):

            def row(at: jax.Array, there: jax.Array, keys=keys, values=values, start=start) -> Any:
                flags = there & (seen[b, of, start + at] != 0)
                return keys[b, k, at[:, None], lane], flags, values[b, k, at[:, None], lane]

            use = lambda keys, flags, values: (scores(keys, flags), values.astype(jnp.float32))
            tiles.append(_Tiles(keys.shape[2], h, row, use))
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
    """

    def __init__(self, count: int, h: int, load: Callable[..., Any], use: Callable[..., Any]):
        self.count, self.load, self.use = count, load, use
        self.size = min(pl.next_power_of_2(count), max(1, TILE // h))
        self.first: Any = None

    def some(self, i: Any) -> Any:
        at = i * self.size + lax.broadcasted_iota(jnp.int32, (self.size,), 0)
        return self.load(jnp.minimum(at, self.count - 1), at < self.count)

    def prefetch(self) -> None:
        """Loads them before any are used, where one tile holds all: a program waits once for all its rows."""
        if self.count <= self.size:
            self.first = self.some(0)

    def add(self, carry: Carry) -> Carry:
        if self.first is not None:
            return _add(carry, *self.use(*self.first))
        step = lambda i, carry: _add(carry, *self.use(*self.some(i)))
        return lax.fori_loop(0, -(-self.count // self.size), step, carry)


def _add(carry: Carry, scores: jax.Array, values: jax.Array) -> Carry:
    """With rows ``f32[E, H]`` of scores ``f32[E]``, to base 2."""
    top, total, acc = carry
    best = jnp.maximum(top, scores.max())
    weights = jnp.where(scores <= NEVER, 0.0, jnp.exp2(scores - best))
    old = jnp.exp2(top - best)
    return best, total * old + weights.sum(), acc * old + (weights[:, None] * values).sum(0)


def _by_xla(operands: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    return joined.join(*operands, **options)


def _on_cuda(operands: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    if refusal(operands[1]) or triton.refusal():
        return _by_xla(operands, **options)
    return kernel(*operands, **options)


JOIN = Op(
    "join_attention", _by_xla, {"cuda": _on_cuda}, one_by_one, stable=False, context=triton.lowering
)
