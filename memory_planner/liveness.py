"""From a block and what it writes to memory: steps in order, buffers with lifespans, and the peak.

A step is an operation that writes to memory, everything fused into it included. Steps run in program order, except
that one which frees more than it takes runs as soon as it can: so does an optimizer's update when the gradient is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp

from .cost import MATRIX
from .fusion import Memory, fuse, users_through_views
from .graph import HOST, Block, Graph, Op, Value
from .kinds import REDUCTIONS, UPDATES, VIEWS, is_fusible
from .rules import Rules


@dataclasses.dataclass(frozen=True)
class Span:
    """A buffer's bytes and its lifespan in steps, half-open."""

    name: str
    nbytes: int
    start: int
    end: int
    value: Value | None = None


@dataclasses.dataclass(frozen=True)
class Lifetimes:
    """The device buffers of one block beyond those that it is given.

    Attributes:
      steps: the operations that write, in order.
      spans: their buffers.
      inner: for each step with a loop, what its body needs beside.
    """

    steps: tuple[Op, ...]
    spans: tuple[Span, ...]
    inner: Mapping[int, Lifetimes]

    @property
    def totals(self) -> list[int]:
        """Bytes alive at each step."""
        change = [0] * (len(self.steps) + 1)
        for span in self.spans:
            change[span.start] += span.nbytes
            change[min(span.end, len(self.steps))] -= span.nbytes
        totals, now = [], 0
        for step in range(len(self.steps)):
            now += change[step]
            totals.append(now + (self.inner[step].peak if step in self.inner else 0))
        return totals

    @property
    def peak(self) -> int:
        return max(self.totals, default=0)

    def at_peak(self) -> list[Span]:
        """The buffers alive at the peak, those inside a loop included, the largest first."""
        totals = self.totals
        if not totals:
            return []
        step = totals.index(max(totals))
        alive = [span for span in self.spans if span.start <= step < span.end and span.nbytes]
        alive += self.inner[step].at_peak() if step in self.inner else []
        return sorted(alive, key=lambda span: -span.nbytes)


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation that writes: what it reads, what it must wait for, what it writes."""

    op: Op
    reads: frozenset[Value]
    waits: frozenset[Value]
    writes: tuple[Value, ...]


def lifetimes(block: Block, rules: Rules) -> Lifetimes:
    """Buffers of a loop's body: carries come and go in place, slices of what is scanned are read where they lie."""
    return _Lives(block, rules, keep=(), reusable=frozenset()).run()


def graph_lifetimes(graph: Graph, rules: Rules) -> tuple[Lifetimes, dict[Value, Value]]:
    """Buffers of a whole program, its arguments and outputs aside; and which outputs take which donated input."""
    aliases = donations(graph)
    lives = _Lives(graph, rules, keep=graph.outputs, reusable=frozenset(), aliases=aliases)
    return lives.run(), aliases


def donations(graph: Graph) -> dict[Value, Value]:
    """For each output the donated input whose memory it takes: the first of equal shape and dtype, as jax does."""
    free = [v for v in graph.inputs if v in graph.donated]
    taken: dict[Value, Value] = {}
    for output in graph.outputs:
        kind = (output.shape, output.dtype, output.space)
        fits = [v for v in free if (v.shape, v.dtype, v.space) == kind]
        if fits and not output.literal and output not in taken:
            taken[output] = fits[0]
            free.remove(fits[0])
    return taken


class _Lives:
    def __init__(
        self,
        block: Block,
        rules: Rules,
        keep: Iterable[Value],
        reusable: frozenset[Value],
        aliases: Mapping[Value, Value] | None = None,
    ):
        self.block, self.rules = block, rules
        self.memory = fuse(block, rules)
        self.aliases = dict(aliases or {})
        self.kept = {self.memory.home.get(v, v) for v in keep}
        self.given = {*block.inputs, *block.constants}
        self.returned = {self.memory.home.get(v, v) for v in block.outputs}
        self.product_users = users_through_views(block)
        self.reusable = reusable

    def run(self) -> Lifetimes:
        steps = schedule(steps_of(self.block, self.memory), self.memory, self.pinned())
        last = self.last_reads(steps)
        inner = {i: body for i, s in enumerate(steps) if (body := self.inside(s.op)) is not None}
        spans = tuple(self.spans(steps, last))
        return Lifetimes(tuple(s.op for s in steps), spans, inner)

    def pinned(self) -> set[Value]:
        return self.given | self.kept

    def inside(self, op: Op) -> Lifetimes | None:
        if not op.blocks:
            return None
        bodies = [body_lifetimes(op, block, self.rules) for block in op.blocks]
        return max(bodies, key=lambda body: body.peak)

    def last_reads(self, steps: Sequence[Step]) -> dict[Value, int]:
        last = {v: i for i, s in enumerate(steps) for v in s.reads}
        for value in self.block.outputs:
            if value in self.memory.home:
                last[self.memory.home[value]] = len(steps)
        return last

    def spans(self, steps: Sequence[Step], last: Mapping[Value, int]):
        """Walks the steps; `owner` says in whose buffer a value lies."""
        owner: dict[Value, Value] = {}
        end: dict[Value, int] = {}
        start: dict[Value, int] = {}
        homes = {self.memory.home.get(o, o): i for o, i in self.aliases.items()}
        for i, step in enumerate(steps):
            for k, value in enumerate(step.writes):
                stop = max(last.get(value, i), i) + 1
                if value.space == HOST:
                    continue
                if value in self.kept:
                    target = homes.get(value)
                    busy = last.get(target, -1) if target is not None else -1
                    if target is None or busy < i or (busy == i and self.in_place(step.op, target)):
                        continue  # straight into the argument's or the output's memory
                    start[value], end[value], owner[value] = i, max(busy, i) + 1, value
                    continue
                source = self.overwrites(step, k, value, i, last, owner)
                if source is not None:
                    owner[value] = owner.get(source, source)
                    if owner[value] in end:
                        end[owner[value]] = max(end[owner[value]], stop)
                    continue
                owner[value], start[value], end[value] = value, i, stop
        return [Span(v.name, self.size(v), start[v], end[v], v) for v in start]

    def size(self, value: Value) -> int:
        """Bytes as written: what only matrix products read is rounded to what they multiply."""
        users = self.product_users.get(value, ())
        if value.dtype == jnp.float32 and value not in self.kept and value not in self.returned:
            names = {u.name for u in users}
            if names & MATRIX and names <= MATRIX | REDUCTIONS:
                return value.nbytes // 2
        return value.nbytes

    def is_reduced(self, value: Value) -> bool:
        """Whether a reduction is made along with `value`: then it can't overwrite an operand."""
        return any(u.name in REDUCTIONS for u in self.product_users.get(value, ()))

    def in_place(self, op: Op, target: Value) -> bool:
        return is_fusible(op) or op.name in UPDATES

    def overwrites(self, step, k, value, i, last, owner) -> Value | None:
        """The value, read for the last time here, whose buffer `value` can take."""
        op = step.op
        if op.name in UPDATES:
            candidates = [self.memory.home.get(op.inputs[0])]
        elif op.name in ("scan", "while"):
            n = op.consts + k
            candidates = [self.memory.home.get(op.inputs[n])] if k < op.carries else []
        elif is_fusible(op) and not self.is_reduced(value):
            candidates = [v for v in step.reads if v.nbytes == value.nbytes]
        else:
            return None
        for v in candidates:
            if v is None or last.get(v, i) > i or v.space != value.space:
                continue
            if v in self.given and v not in self.reusable:
                continue
            if v in self.kept:
                continue
            return v
        return None


def body_lifetimes(op: Op, block: Block, rules: Rules) -> Lifetimes:
    """What one run of a loop's body needs beside its carries, constants, stacks, and what they are sliced from."""
    n, c = op.consts, op.carries
    carried = frozenset(block.inputs[n : n + c]) if op.name != "cond" else frozenset()
    stacked = block.outputs[c:] if op.name == "scan" else ()
    lives = _Lives(block, rules, keep=(), reusable=carried)
    straight = {v for v in stacked if _goes_straight(block, v, lives.memory)}
    lives.kept = {lives.memory.home.get(v, v) for v in straight}
    return lives.run()


def _goes_straight(block: Block, value: Value, memory: Memory) -> bool:
    """Whether a stacked output is computed right in the stack."""
    op = block.producers.get(value)
    while op is not None and op.name in VIEWS:
        op = block.producers.get(op.inputs[op.outputs.index(value)])
        value = op.outputs[0] if op else value
    return op is not None and op.name not in UPDATES


def steps_of(block: Block, memory: Memory) -> list[Step]:
    """The operations that write, in program order."""
    waits: dict[Value, frozenset[Value]] = {}
    steps = []
    for op in block.ops:
        given = [v for v in op.inputs if not v.literal]
        reads = frozenset().union(*(memory.roots[v] for v in given))
        wait = frozenset().union(*(waits.get(v, frozenset()) for v in given))
        if op.name == "barrier":
            wait |= reads
        writes = tuple(v for v in op.outputs if v in memory)
        if writes and op.name not in VIEWS:
            steps.append(Step(op, reads, wait, writes))
        waits.update({v: wait for v in op.outputs if v not in memory or op.name in VIEWS})
    return steps


def schedule(steps: Sequence[Step], memory: Memory, pinned: set[Value]) -> list[Step]:
    """Program order, but a step that frees more than it takes runs once it can."""
    maker = {v: i for i, s in enumerate(steps) for v in s.writes}
    needs = [{maker[v] for v in s.reads | s.waits if v in maker} - {i} for i, s in enumerate(steps)]
    followers: list[list[int]] = [[] for _ in steps]
    for i, need in enumerate(needs):
        for j in need:
            followers[j].append(i)
    missing = [len(need) for need in needs]
    readers: dict[Value, set[int]] = {}
    for i, s in enumerate(steps):
        for v in s.reads - pinned:
            readers.setdefault(v, set()).add(i)
    done = [False] * len(steps)
    order: list[Step] = []

    def gain(i: int) -> int:
        taken = sum(v.nbytes for v in steps[i].writes if v not in pinned)
        return sum(v.nbytes for v in steps[i].reads if readers.get(v) == {i}) - taken

    def run(i: int) -> None:
        stack = [i]
        while stack:
            i = stack.pop()
            if done[i]:
                continue
            done[i] = True
            order.append(steps[i])
            touched = set()
            for v in steps[i].reads:
                if v in readers:
                    readers[v].discard(i)
                    touched |= readers[v]
            for j in followers[i]:
                missing[j] -= 1
                touched.add(j)
            ready = [j for j in touched if not done[j] and not missing[j] and gain(j) > 0]
            stack += sorted(ready, reverse=True)

    for i in range(len(steps)):
        if not done[i]:
            run(i)
    return order
