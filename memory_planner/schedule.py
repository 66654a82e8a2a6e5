"""The order in which a block's writing operations run.

A step is an operation that writes to memory, with everything that is fused into it. Steps keep their program order,
except that one that frees more than it takes runs as soon as it can: an optimizer's update when the gradient is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set

from .fusion import Memory
from .graph import Block, Op, Value
from .kinds import MATRIX, VIEWS


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation that writes.

    Attributes:
      op: the operation.
      reads: written values that it reads, itself or through what is fused into it.
      waits: values that must be there before (a barrier).
      writes: what it writes.
    """

    op: Op
    reads: frozenset[Value]
    waits: frozenset[Value]
    writes: tuple[Value, ...]


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


def reordered(
    steps: Sequence[Step], pinned: Set[Value], *, eager_products: bool = True
) -> list[Step]:
    """The given order, but a step that frees more bytes than it takes runs once it can.

    Args:
      steps: in program order, or depth first.
      pinned: values whose memory is there from the start to the end: nothing is taken or freed with them.
      eager_products: matrix products as well.
    """
    return _Scheduler(steps, pinned, eager_products).run()


def depth_first(steps: Sequence[Step], outputs: Sequence[Value]) -> list[Step]:
    """Everything that the first output needs, then what the second needs beside, and so on."""
    maker = {v: step for step in steps for v in step.writes}
    number = {id(step): i for i, step in enumerate(steps)}
    order: dict[int, Step] = {}
    ahead = [maker[v] for v in reversed(outputs) if v in maker]
    while ahead:
        step = ahead[-1]
        needs = {
            id(n): n for v in step.reads | step.waits if (n := maker.get(v)) not in (None, step)
        }
        missing = [n for key, n in needs.items() if key not in order]
        if missing and id(step) not in order:
            ahead += sorted(missing, key=lambda n: -number[id(n)])
            continue
        order.setdefault(id(ahead.pop()), step)
    return [*order.values(), *(step for step in steps if id(step) not in order)]


class _Scheduler:
    def __init__(self, steps: Sequence[Step], pinned: Set[Value], eager_products: bool):
        self.steps, self.pinned, self.eager_products = steps, pinned, eager_products
        maker = {v: i for i, s in enumerate(steps) for v in s.writes}
        self.followers: list[list[int]] = [[] for _ in steps]
        self.missing = [0] * len(steps)
        self.readers: dict[Value, set[int]] = {}
        for i, step in enumerate(steps):
            for j in {maker[v] for v in step.reads | step.waits if v in maker} - {i}:
                self.followers[j].append(i)
                self.missing[i] += 1
            for v in step.reads - pinned:
                self.readers.setdefault(v, set()).add(i)
        self.done = [False] * len(steps)
        self.order: list[Step] = []

    def run(self) -> list[Step]:
        for i in range(len(self.steps)):
            ahead = [i]
            while ahead:
                if not self.done[j := ahead.pop()]:
                    ahead += sorted(self.run_one(j), reverse=True)
        return self.order

    def run_one(self, i: int) -> list[int]:
        """Runs a step; gives those that should now run at once."""
        self.done[i] = True
        self.order.append(self.steps[i])
        touched = set(self.followers[i])
        for v in self.steps[i].reads & self.readers.keys():
            self.readers[v].discard(i)
            touched |= self.readers[v]
        for j in self.followers[i]:
            self.missing[j] -= 1
        return [j for j in touched if not self.done[j] and not self.missing[j] and self.gain(j) > 0]

    def gain(self, i: int) -> int:
        """Bytes that a step frees beyond what it takes; none where it has to wait for its turn."""
        step = self.steps[i]
        if step.op.name == "move" or (step.op.name in MATRIX and not self.eager_products):
            return 0
        freed = sum(v.nbytes for v in step.reads if self.readers.get(v) == {i})
        return freed - sum(v.nbytes for v in step.writes if v not in self.pinned)
