"""Which values a program writes to memory, by the fusion rules of XLA for TPUs.

1. Results of matrix products, reductions, loops and opaque operations are written. A product whose only user is
   elementwise is fused with it, and so on down the line: then what the line ends in is written.
2. Fusible operations (elementwise, broadcasts, slices, ...) are computed inside their users, again in each of several,
   as long as that needs at most `duplicate_inputs` large arrays; after that they are written.
3. What is written is written at the narrowest dtype of its line: a bfloat16 rather than the float32 it is cast to.
4. Views (reshapes, transposes) share the bytes of their operand.
5. What an opaque operation or a loop reads, and what the block returns, is written.
"""

from __future__ import annotations

import dataclasses
import math

from .graph import Block, Op, Value
from .kinds import MATRIX, UPDATES, VIEWS, is_fusible, reads_memory, updated
from .rules import Rules


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the values of a block lie.

    Attributes:
      home: for each value, the written value whose bytes it shares; itself if it is written; missing if it is fused.
      roots: for each value, the written values that computing it reads.
      products: for each written value that a matrix product was fused into, what the product itself reads.
    """

    home: dict[Value, Value]
    roots: dict[Value, frozenset[Value]]
    products: dict[Value, frozenset[Value]]

    def __contains__(self, value: Value) -> bool:
        return self.home.get(value) is value


def fuse(block: Block, rules: Rules) -> Memory:
    """Decides for every value of `block`, not of blocks inside it."""
    return _Fusion(block, rules).run()


class _Fusion:
    def __init__(self, block: Block, rules: Rules):
        self.block, self.rules = block, rules
        self.home: dict[Value, Value] = {}
        self.roots: dict[Value, frozenset[Value]] = {}
        self.products: dict[Value, frozenset[Value]] = {}
        self.lines: dict[
            Op, list[Value]
        ] = {}  # what ends in this operation: a product, nothing written yet
        self.users = users_through_views(block)
        self.demanded = _demanded(block, rules)
        self.joins = Joins(block, self.users)
        self.ready = _ready(block)

    def run(self) -> Memory:
        for value in (*self.block.inputs, *self.block.constants):
            self.write(value)
        for op in self.block.ops:
            self.visit(op)
        for value in self.block.outputs:
            if not value.literal and value not in self.home:
                self.write(value)
        return Memory(self.home, self.roots, self.products)

    def write(self, value: Value) -> None:
        self.home[value] = value
        self.roots[value] = frozenset((value,))

    def visit(self, op: Op) -> None:
        if op.name in VIEWS:
            for source, target in zip(op.inputs, op.outputs):
                self.view(source, target)
        elif is_fusible(op):
            for target in op.outputs:
                self.fusible(op, target)
        else:
            for target in op.outputs:
                self.anchored(op, target)

    def view(self, source: Value, target: Value) -> None:
        if source.literal:
            self.roots[target] = frozenset()
            return
        self.roots[target] = self.roots[source]
        if source in self.home:
            self.home[target] = self.home[source]

    def anchored(self, op: Op, target: Value) -> None:
        self.roots[target] = self.read_by(op)
        if not self.rules.fuses or op.name not in MATRIX or not self.goes_on([target]):
            self.write(target)

    def fusible(self, op: Op, target: Value) -> None:
        self.roots[target] = self.read_by(op)
        if not self.rules.fuses:
            self.write(target)
            return
        line = self.lines.pop(op, [])
        if target in self.demanded or self.is_softmax_exp(op):
            self.write(target)
            self.note_product(target, line)
        elif line:
            if not self.goes_on([*line, target]):
                self.note_product(self.write_narrowest([*line, target]), line)
        elif self.is_dear(target) and self.user(target) is None:
            self.write_narrowest(self.casts(target))

    def note_product(self, value: Value, line: list[Value]) -> None:
        if line:
            self.products[value] = self.read_by(self.block.producers[line[0]])

    def goes_on(self, line: list[Value]) -> bool:
        """Hands a line on to the operation that it is fused with, if there is one."""
        user = self.user(line[-1])
        if user is not None and self.ready[user.outputs[0]] > self.ready[line[-1]]:
            user = None  # it waits for something else: the product would be held up
        user = user or self.softmax(line[-1])
        if user is None or user in self.lines or not _same_size(user, line[-1]):
            return False
        self.lines[user] = line
        return True

    def user(self, value: Value) -> Op | None:
        """The one fusible operation in which all uses of `value` meet, all of them fused on the way."""
        return None if value in self.demanded else self.joins.of(value)

    def read_by(self, op: Op) -> frozenset[Value]:
        return frozenset().union(*(self.roots[v] for v in op.inputs if not v.literal))

    def softmax(self, value: Value) -> Op | None:
        """The difference to its row maximum, if `value` goes into nothing else and a tile of rows is small enough."""
        users = self.users.get(value, [])
        if value in self.demanded or [u.name for u in users] != ["reduce_max", "sub"]:
            return None
        axis = users[0].params["axes"][0]
        skipped = (axis, 0) if len(value.shape) > 2 else (axis,)  # the first is a batch
        others = [size for i, size in enumerate(value.shape) if i not in skipped]
        tile = value.shape[axis] * max(others, default=1) * value.dtype.itemsize
        return users[1] if tile <= self.rules.softmax_product_tile else None

    def is_softmax_exp(self, op: Op) -> bool:
        """``exp(x - max(x))`` of rows short enough, which is also summed: the sum and it are made together."""
        if op.name != "exp" or len(self.users.get(op.outputs[0], ())) < 2:
            return False
        sub = self.block.producers.get(op.inputs[0])
        if sub is None or sub.name != "sub":
            return False
        names = [u.name for u in self.users.get(sub.inputs[0], ())]
        return "reduce_max" in names and op.outputs[0].shape[-1] <= self.rules.softmax_row

    def is_dear(self, value: Value) -> bool:
        least = self.rules.large_fraction * value.nbytes
        large = sum(root.nbytes >= least for root in self.roots[value])
        return large > self.rules.duplicate_inputs

    def casts(self, value: Value) -> list[Value]:
        """The line of single-operand operations of equal size that ends in `value`."""
        line = [value]
        while (op := self.block.producers.get(line[0])) is not None and is_fusible(op):
            big = [v for v in op.inputs if not v.literal and v.nbytes * 8 > line[0].nbytes]
            same = len(big) == 1 and math.prod(big[0].shape) == math.prod(value.shape)
            if not same or big[0] in self.home:
                break
            line.insert(0, big[0])
        return line

    def write_narrowest(self, line: list[Value]) -> Value:
        """Writes the last of the narrowest values of a line, and gives it; the rest of the line reads it."""
        least = min(v.nbytes for v in line)
        chosen = max(i for i, v in enumerate(line) if v.nbytes == least)
        self.write(line[chosen])
        self.refresh(line[chosen])
        return line[chosen]

    def refresh(self, value: Value) -> None:
        """Lets what was already computed from `value` read it from memory."""
        order = self.joins.order
        ahead = {order[op] for op in self.block.users.get(value, ())}
        while ahead:
            op = self.block.ops[min(ahead)]
            ahead.remove(order[op])
            for v in op.outputs:
                if v not in self.roots or v in self:
                    continue
                self.roots[v] = self.read_by(op)
                if op.name in VIEWS:
                    self.view(op.inputs[op.outputs.index(v)], v)
                ahead.update(order[user] for user in self.block.users.get(v, ()))

    def __contains__(self, value: Value) -> bool:
        return self.home.get(value) is value


class Joins:
    """Where the uses of a value meet again: post-dominators among the operations of a block."""

    def __init__(self, block: Block, users: dict[Value, list[Op]]):
        self.users = users
        outputs = set(block.outputs)
        self.order = {op: i for i, op in enumerate(block.ops)}
        self.above: dict[
            Op, Op | None
        ] = {}  # the next operation that everything after this one meets in
        for op in reversed(block.ops):
            if op.name not in VIEWS:
                ends = any(v in outputs for v in op.outputs)
                after = [u for v in op.outputs for u in users.get(v, ())]
                self.above[op] = None if ends else self.meet(after)

    def meet(self, ops: list[Op]) -> Op | None:
        found: Op | None = ops[0] if ops else None
        for op in ops[1:]:
            other: Op | None = op
            while found is not other:
                if found is None or other is None:
                    return None
                if self.order[found] < self.order[other]:
                    found = self.above[found]
                else:
                    other = self.above[other]
        return found

    def of(self, value: Value) -> Op | None:
        """The fusible operation where all uses of `value` meet, if all between are fusible as well."""
        users = self.users.get(value, [])
        end = self.meet(users)
        if end is None or not is_fusible(end):
            return None
        ahead, seen = [u for u in users if u is not end], set()
        while ahead:
            op = ahead.pop()
            if op in seen:
                continue
            seen.add(op)
            if not is_fusible(op):
                return None
            ahead += [u for v in op.outputs for u in self.users.get(v, ()) if u is not end]
        return end


def _ready(block: Block) -> dict[Value, int]:
    """The last operation, by its number, that is not fused and that a value depends on directly."""
    ready: dict[Value, int] = {}
    for i, op in enumerate(block.ops):
        fused = is_fusible(op) or op.name in VIEWS
        at = max((ready.get(v, -1) for v in op.inputs), default=-1) if fused else i
        ready.update(dict.fromkeys(op.outputs, at))
    return ready


def _same_size(op: Op, value: Value) -> bool:
    return math.prod(op.outputs[0].shape) == math.prod(value.shape)


def users_through_views(block: Block) -> dict[Value, list[Op]]:
    """The operations that use a value or a view of it, views themselves left out."""
    users: dict[Value, list[Op]] = {}
    for op in reversed(block.ops):
        if op.name in VIEWS:
            for source, target in zip(op.inputs, op.outputs):
                users[source] = users.get(target, []) + users.get(source, [])
        else:
            for value in dict.fromkeys(op.inputs):
                users.setdefault(value, []).insert(0, op)
    return users


def _demanded(block: Block, rules: Rules) -> set[Value]:
    """What must be written whatever the rules say: outputs, and what opaque operations read."""
    demanded = {v for v in block.outputs if not v.literal}
    for op in reversed(block.ops):
        if op.name in VIEWS:
            demanded.update(s for s, t in zip(op.inputs, op.outputs) if t in demanded)
        elif op.name in UPDATES and not is_fusible(op):
            demanded.update(updated(op).values())
        elif reads_memory(op) or (rules.products_read and op.name in MATRIX):
            demanded.update(v for v in op.inputs if not v.literal)
    return demanded
