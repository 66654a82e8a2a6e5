"""What both ways of the Hopper kernel share: which steps a warpgroup takes, their tiles, and which tokens count."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import hopper
from ..hopper import ROWS
from .joined import LOG2E, NEVER
from .problem import Config, OfHeads, Problem, bounds


class Block:
    """A block's part of a head, for one of its warpgroups.

    Attributes:
      wg: the warpgroup's number.
      count: steps that it takes.
      queries: the first row of q that it attends with.
      row: of the outputs, its first.
      scale: of q, so that scores are to base 2, or what a soft cap takes.
    """

    def __init__(
        self,
        problem: Problem,
        config: Config,
        parts: int,
        of_heads: OfHeads,
        arrays: list[Any],
        n_keys: int,
        scores: list[Any],
        scratch: dict[str, Any],
    ):
        self.problem, self.config, self.of_heads = problem, config, of_heads
        self.n_keys, self.arrays, self.out = n_keys, arrays, scores
        self.wg, self.head, part = (lax.axis_index(a) for a in ("wg", "head", "part"))
        self.interpret = problem.interpret
        self.queries = self.head * problem.group
        self.row = (self.head * parts + part) * problem.group
        self.scale = problem.scale * (1 if problem.soft_cap else LOG2E)
        self.low, self.high = self._bounds()
        wgs, tiles = config.warpgroups, config.tiles
        self.first = lax.div(self.low, ROWS)
        steps = lax.div(self.high + ROWS - 1, ROWS) - self.first
        steps = lax.div(steps + tiles - 1, tiles)
        share = lax.div(steps + parts - 1, parts)
        self.start = part * share + self.wg
        stop = jnp.minimum((part + 1) * share, steps)
        self.count = jnp.maximum(0, lax.div(stop - self.start + wgs - 1, wgs))
        self.ring = hopper.Ring(
            scratch["ring"], scratch["full"], self.wg, config.stages, self.interpret, tiles
        )

    def _bounds(self) -> tuple[Any, Any]:
        p, span = self.problem, self.of_heads.span
        length = self.of_heads.lengths[self._own(self.of_heads.lengths)]
        if span is not None:
            at = self._own(span)
            span = span[at, 0], span[at, 1]
        return bounds(length, span, p.tokens, p.window)

    def _own(self, x: Any) -> Any:
        """Where an array of `OfHeads`, its first axes joined, has what is the head's."""
        p = self.problem
        return self.head if x.shape[0] == p.rows else lax.div(self.head, p.heads)

    def begin(self, i: Any) -> Any:
        """The first tile of a step."""
        return self.first + (self.start + i * self.config.warpgroups) * self.config.tiles

    def tile(self, i: Any) -> Any:
        """The first tile that is read: of the last step maybe one that was seen before, not one behind the rows."""
        return jnp.minimum(self.begin(i), self.problem.tokens // ROWS - self.config.tiles)

    def fetch(self, i: Any) -> None:
        """Starts the copies of a step, if there is such a one."""
        p = self.problem
        stored = lax.div(self.head, p.share) * (p.tokens // ROWS)
        self.ring.fetch(i, self.arrays, stored + self.tile(i), i < self.count)

    def fetch_first(self) -> None:
        self.ring.start()
        self.fetch(jnp.int32(0))

    def fetch_rest(self) -> None:
        """Of the first steps, after all warpgroups have asked for their first: what is asked for first comes first."""
        for i in range(1, self.config.stages):
            self.fetch(jnp.int32(i))

    def wait(self, i: Any) -> tuple[list[Any], list[Any]]:
        """Keys and values of a step, once they are there."""
        self.ring.wait(i)
        refs = self.ring.slot(i)
        return refs[: self.n_keys], refs[self.n_keys :]

    def shown(self, i: Any, scores: list[jax.Array], runs: int) -> list[jax.Array]:
        """Scores of a step, capped, `NEVER` where a token does not count. They are written where they are a result.

        Args:
          runs: see `hopper.softmax`.
        """
        p, first, interpret = self.problem, self.begin(i) * ROWS, self.interpret
        if (cap := p.soft_cap) is not None:
            scores = [(cap * LOG2E) * jnp.tanh(x * (1 / cap)) for x in scores]
        cut = functools.partial(
            hopper.hide,
            first=self.tile(i) * ROWS,
            high=self.high,
            never=NEVER,
            runs=runs,
            interpret=interpret,
        )
        if (words := self.of_heads.words) is not None:
            row, tile = self._own(words), self.tile(i)
            scores = hopper.hide_unset(scores, words, row, tile, NEVER, runs, interpret)
        if not p.weights:
            return cut(scores, low=jnp.maximum(self.low, first))
        scores = cut(scores, low=self.low)
        (out,) = self.out
        column = self.tile(i) * ROWS
        hopper.store_scores(out, scores, self.queries, column, p.group, runs, interpret)
        return cut(scores, low=first)
