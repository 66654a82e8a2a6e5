"""From a block to buffers with lifespans: what is alive when, and the peak.

Buffers are reused in place as compilers do: an update of a part and a loop's carry take over their operand's memory
when nobody needs the old content, elementwise results that of an operand of equal size, outputs that of a donated
argument. A loop's stacks lie outside its body: slices are read, results written where they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import jax.numpy as jnp

from .fusion import Memory, fuse, users_through_views
from .graph import HOST, Block, Graph, Op, Value
from .kinds import MATRIX, REDUCTIONS, UPDATES, VIEWS, is_fusible, updated
from .rules import Rules
from .schedule import Step, depth_first, reordered, steps_of


@dataclasses.dataclass(frozen=True)
class Span:
    """One buffer: its bytes and its half-open lifespan, in steps.

    Attributes:
      name: of the value in it.
      nbytes: as written, which may be less than the value's own.
      start, end: it is alive at steps ``start <= t < end``.
      value: the value.
    """

    name: str
    nbytes: int
    start: int
    end: int
    value: Value


@dataclasses.dataclass(frozen=True)
class Lifetimes:
    """The device buffers of a block beyond those that it is given.

    Attributes:
      ops: the operations that write, in order; a loop's body stands, once, in the place of the loop.
      spans: the buffers.
      results: for each output of the program, when its memory is in use: first by the argument that it replaces.
    """

    ops: tuple[Op, ...]
    spans: tuple[Span, ...]
    results: tuple[tuple[Span, ...], ...] = ()

    @property
    def peak(self) -> int:
        return max(totals(self.spans, len(self.ops)), default=0)


def totals(spans: Iterable[Span], steps: int) -> list[int]:
    """Bytes alive at each of so many steps."""
    change = [0] * (steps + 1)
    for span in spans:
        change[span.start] += span.nbytes
        change[span.end] -= span.nbytes
    return list(itertools.accumulate(change[:-1]))


def lifetimes(graph: Graph, rules: Rules) -> Lifetimes:
    """The buffers of a whole program, its arguments and outputs aside."""
    lives = _Lives(graph, rules)
    lives.kept = {lives.memory.home.get(v, v) for v in graph.outputs}
    lives.targets = {lives.memory.home.get(o, o): v for o, v in donations(graph).items()}
    found = lives.run()
    if not rules.reuses_outputs:
        return found
    looped = {v for op in graph.ops if op.blocks for v in op.outputs}
    own = [span for span in found.spans if span.value in looped]
    rest = [span for span in found.spans if span.value not in looped]
    return dataclasses.replace(found, spans=(*own, *_outside(rest, found.results)))


def _outside(spans: Sequence[Span], results: Sequence[tuple[Span, ...]]) -> list[Span]:
    """The buffers that don't lie where a result will be: the largest first, in the smallest that has room."""
    busy = sorted(map(list, results), key=lambda group: group[0].nbytes)
    left: list[Span] = []
    for span in sorted(spans, key=lambda s: -s.nbytes):
        host = next((group for group in busy if _has_room(group, span)), left)
        host.append(span)
    return left


def _has_room(group: Sequence[Span], span: Span) -> bool:
    apart = all(other.start >= span.end or span.start >= other.end for other in group)
    return apart and group[0].nbytes >= span.nbytes


def donations(graph: Graph) -> dict[Value, Value]:
    """For each output the donated input whose memory it takes: the first of equal shape and dtype, as in jax."""
    free = [v for v in graph.inputs if v in graph.donated]
    taken: dict[Value, Value] = {}
    for output in graph.outputs:
        kind = (output.shape, output.dtype, output.space)
        fits = [v for v in free if (v.shape, v.dtype, v.space) == kind]
        if fits and not output.literal and output not in taken:
            taken[output] = fits[0]
            free.remove(fits[0])
    return taken


def _body(op: Op, block: Block, rules: Rules) -> Lifetimes:
    """What one run of a body needs beside its operands, its carries and its results."""
    lives = _Lives(block, rules)
    lives.is_body = op.name != "cond"
    if op.name == "cond":
        placed = block.outputs
    else:
        lives.reusable = set(block.inputs[op.consts : op.consts + op.carries])
        placed = [v for v in block.outputs[op.carries :] if _is_placed(block, v)]
    lives.kept = {lives.memory.home.get(v, v) for v in placed}
    return lives.run()


def _is_placed(block: Block, value: Value) -> bool:
    """Whether a stacked result is computed right in the stack: all but copies that were updated."""
    op = block.producers.get(value)
    while op is not None and op.name in VIEWS:
        value = op.inputs[op.outputs.index(value)]
        op = block.producers.get(value)
    return op is not None and op.name not in UPDATES


class _Lives:
    """Buffers of one block.

    `kept` are values that lie in memory counted elsewhere, `targets` says which of them lie in a donated argument,
    `reusable` are inputs that may be overwritten, `is_body` says that it runs in a loop.
    """

    def __init__(self, block: Block, rules: Rules):
        self.block, self.rules = block, rules
        self.memory: Memory = fuse(block, rules)
        self.kept: Set[Value] = set()
        self.targets: Mapping[Value, Value] = {}
        self.reusable: Set[Value] = set()
        self.is_body = False
        self.given = {*block.inputs, *block.constants}
        self.returned = {self.memory.home.get(v, v) for v in block.outputs}
        self.users = users_through_views(block)

    def run(self) -> Lifetimes:
        steps = steps_of(self.block, self.memory)
        if not self.rules.reorders:
            return self.flat(steps)
        deep = depth_first(steps, [self.memory.home.get(v, v) for v in self.block.outputs])
        if self.rules.by_outputs and any(op.name == "device_put" for op in self.block.ops):
            return self.flat(deep)
        in_place = any(v in self.reusable for s in steps for v in updated(s.op).values())
        ordered = self.rules.by_outputs or self.is_body
        orders = (deep,) if ordered and not in_place else (steps, deep)
        eager = not (self.rules.by_outputs and self.is_body)
        pinned = self.given | self.kept
        lives = [self.flat(reordered(order, pinned, eager_products=eager)) for order in orders]
        return min(lives, key=lambda one: one.peak)

    def flat(self, steps: Sequence[Step]) -> Lifetimes:
        lives, begins = _flat(steps, self.spans(steps), self.rules)
        return dataclasses.replace(lives, results=tuple(self.results(steps, begins)))

    def results(self, steps: Sequence[Step], begins: Sequence[int]) -> Iterator[tuple[Span, ...]]:
        last = {v: i for i, s in enumerate(steps) for v in s.reads}
        begun = self.begun(steps)
        later = set(begun.values())
        for i, step in enumerate(steps):
            for v in (begun.get(v, v) for v in step.writes if v not in later):
                if v not in self.kept or v.space == HOST:
                    continue
                own = Span(v.name, v.nbytes, begins[i], begins[-1], v)
                replaced = [self.targets[v]] if v in self.targets else []
                ends = [begins[last.get(old, -1) + 1] for old in replaced]
                yield (*(Span(o.name, o.nbytes, 0, end, o) for o, end in zip(replaced, ends)), own)

    def begun(self, steps: Sequence[Step]) -> dict[Value, Value]:
        """What loops start from that lies where a result will be, which they carry: for each that result."""
        last, found = self.last_reads(steps), dict[Value, Value]()
        for i, step in enumerate(steps):
            for v in step.writes:
                carry = _carry(step.op, v) if v in self.kept and v not in self.targets else None
                start = self.memory.home.get(carry) if carry is not None else None
                if start is not None and start not in self.given and last[start] == i:
                    found[start] = v
        return found

    def spans(self, steps: Sequence[Step]) -> list[Span]:
        last = self.last_reads(steps)
        begun = self.begun(steps)
        reduces = [s for s in steps if s.op.name in REDUCTIONS]
        self.reduced = {v: s.reads for s in reduces for v in s.writes}
        start: dict[Value, int] = {}
        end: dict[Value, int] = {}
        owner: dict[Value, Value] = {}  # in whose buffer a value lies
        for i, step in enumerate(steps):
            for number, value in enumerate(step.writes):
                if value.space == HOST or value in begun:
                    continue
                stop = last.get(value, i) + 1
                if value in self.kept:
                    stop = self.moved_at(step, value, i, last)
                    if stop is None:
                        continue
                elif (source := self.overwritten(step, number, value, i, last)) is not None:
                    owner[value] = owner.get(source, source)
                    if owner[value] in end:
                        end[owner[value]] = max(end[owner[value]], stop)
                    continue
                start[value], end[value], owner[value] = i, stop, value
        ends = len(steps)
        return [Span(v.name, self.size(v), start[v], min(end[v], ends), v) for v in start]

    def last_reads(self, steps: Sequence[Step]) -> dict[Value, int]:
        last = {v: i for i, s in enumerate(steps) for v in s.reads}
        last.update({v: len(steps) for v in self.returned})
        return last

    def moved_at(self, step: Step, value: Value, i: int, last: Mapping[Value, int]) -> int | None:
        """When a result moves into the donated argument that it replaces; None if it is made there."""
        target = self.targets.get(value)
        busy = -1 if target is None else last.get(target, -1)
        inside = is_fusible(step.op) or step.op.name in UPDATES or _carry(step.op, value) is target
        direct = busy == i and inside
        return None if busy < i or direct else busy + 1

    def overwritten(self, step: Step, number: int, value: Value, i: int, last: Mapping[Value, int]):
        """The value, read for the last time here, whose buffer `value` takes over, if any."""
        if not self.rules.fuses:
            return None
        for v in self.candidates(step, number, value):
            if self.rules.fuses_norms and any(v in self.reduced.get(r, ()) for r in step.reads):
                continue
            is_free = v not in self.given or v in self.reusable
            if is_free and v not in self.kept and last.get(v, i) <= i and v.space == value.space:
                return v
        return None

    def candidates(self, step: Step, number: int, value: Value) -> Iterator[Value]:
        op, home = step.op, self.memory.home
        if op.name in UPDATES:
            yield from (home[v] for o, v in updated(op).items() if o is value and v in home)
        elif op.name in ("scan", "while"):
            if (carry := _carry(op, value)) in home:
                yield home[carry]
        elif is_fusible(op) and not any(u.name in REDUCTIONS for u in self.users.get(value, ())):
            multiplied = self.memory.products.get(value, frozenset())
            equal = [v for v in step.reads if v.nbytes == value.nbytes and v not in multiplied]
            yield from sorted(equal, key=lambda v: v.name)

    def size(self, value: Value) -> int:
        """Bytes as written: what only matrix products read is rounded to what they multiply."""
        names = {u.name for u in self.users.get(value, ())}
        rounded = names & MATRIX and names <= MATRIX | REDUCTIONS and value.dtype == jnp.float32
        if self.rules.rounds_products and rounded and value not in self.kept | self.returned:
            return value.nbytes // 2
        return value.nbytes


def _carry(op: Op, value: Value) -> Value | None:
    """The operand that a loop carries to `value`, one of its results; None if it is a stack."""
    at = op.outputs.index(value)
    looped = op.name in ("scan", "while") and at < op.carries
    return op.inputs[op.consts + at] if looped else None


def _flat(
    steps: Sequence[Step], spans: Sequence[Span], rules: Rules
) -> tuple[Lifetimes, list[int]]:
    """Puts the bodies of loops, the larger branch of a `cond`, in the place of their step.

    Returns also where each step begins then, and where the last ends.
    """
    ops: list[Op] = []
    inner: list[Span] = []
    begins: list[int] = []
    for step in steps:
        begins.append(len(ops))
        bodies = [_body(step.op, block, rules) for block in step.op.blocks]
        body = max(bodies, key=lambda body: body.peak, default=Lifetimes((), ()))
        inner += [_shifted(span, len(ops)) for span in body.spans]
        ops += body.ops or (step.op,)
    begins.append(len(ops))
    outer = [dataclasses.replace(s, start=begins[s.start], end=begins[s.end]) for s in spans]
    return Lifetimes(tuple(ops), (*outer, *inner)), begins


def _shifted(span: Span, by: int) -> Span:
    return dataclasses.replace(span, start=span.start + by, end=span.end + by)
