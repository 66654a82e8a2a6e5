"""Puts compressed caches into a program: append, attend, and keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.append import entry_of, entry_put
from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from ..core.interpret import Recorder
from ..core.program import Program
from . import depth, fused, prefill, tiers
from .defer import LAYOUT
from .expr import Cell, Node, is_rooted, walk
from .find import Caches
from .match import Attention, new_rows, stream_key
from .method import Method
from .replay import Replay, Rows, attend, reduced
from .rewrite import CacheRun, Store
from .source import find_source
from .state import KVState, Moved
from .store import Incoming, Working, absorb, in_place, is_ragged, placed, stored, working
from .writes import Positions


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A store with new rows that are not stored yet.

    Attributes:
      found: the attention that opened it.
      arrays: the state of its entry of the stack.
      incoming: its new rows; None after a `cond` of which only some branches attended.
      working: the rows to attend to, made when they are asked for.
      stats: what the selector wants to know of the attention weights; None before.
    """

    found: Attention
    arrays: Any
    incoming: Incoming | None = None
    working: Working | None = None
    stats: Any = None


class Emit(CacheRun):
    """See the module."""

    def __init__(
        self,
        *,
        strict: bool,
        caches: Caches,
        methods: dict[str, Method],
        recorder: Recorder | None = None,
    ):
        history = any(m.input for m in methods.values())
        super().__init__(strict=strict, recorder=recorder, history=history)
        self.caches, self.methods = caches, methods
        self.postponed |= caches.postponed

    def attention(self, found: Attention) -> jax.Array:
        store: Store = found.reads[0].cell.store
        if store.opened is None:
            store.opened = self.open(store, found)
        opened: Opened = store.opened
        method = self.method(store)
        try:
            form = fused.form(self, found, method, store.group)
        except LayoutError:  # `explain` says why
            form = None
        if form is None and (many := self.many_tokens(found, method)) is not None:
            replayed = lambda: attend(self, found, self.rows(found))[0]
            return prefill.attend(self, found, many, replayed)
        statistic = self.statistic(store, opened)
        if form is not None:
            what = method, store.group, opened.arrays, self.incoming(store)
            out, stats = fused.attend(self, found, form, *what, statistic)
        else:
            out, stats = attend(self, found, self.rows(found), statistic)
        if stats is not None and opened.stats is None:
            store.opened = dataclasses.replace(store.opened, stats=stats)
        return out

    def many_tokens(self, found: Attention, method: Method) -> prefill.Prefill | None:
        if found.rows < 2 or prefill.refusal(method):
            return None
        try:
            return prefill.form(self, found)
        except LayoutError:  # `explain` says why
            return None

    def locally(self, store: Store, f: Callable[[], jax.Array]) -> jax.Array:
        """``f()`` in a branch: what it computes on the way is not there outside."""
        opened = store.opened
        self.scopes.append({})
        try:
            return f()
        finally:
            self.scopes.pop()
            store.opened = opened

    def reduced(self, found: Attention, value: Node) -> jax.Array:
        return reduced(self, found, self.rows(found), value)

    def rows(self, found: Attention) -> Rows:
        """What an attention runs on, in the order of its streams."""
        store: Store = found.reads[0].cell.store
        w = self.worked(store)
        order = [store.group.streams.index(stream_key(r)) for r in found.reads]
        return Rows([w.rows[i] for i in order], w.positions, w.live)

    def incoming(self, store: Store) -> Incoming:
        opened: Opened = store.opened
        if opened.incoming is None:
            new = self.new_rows(store, opened.found)
            store.opened = opened = dataclasses.replace(opened, incoming=new)
        assert opened.incoming is not None
        return opened.incoming

    def worked(self, store: Store) -> Working:
        new = self.incoming(store)
        opened: Opened = store.opened
        if opened.working is None:
            w = self.work(store, opened.found, opened.arrays, new)
            store.opened = opened = dataclasses.replace(opened, working=w)
        assert opened.working is not None
        return opened.working

    def postpone(self, store: Store, found: Attention) -> Opened:
        method, selector = self.method(store), self.method(store).selector
        if method.needs_queries or (selector is not None and selector.needs_attention):
            raise ValueError(
                f"{store.group.name}: only some branches of a `cond` attend to this cache, so {method.name} does "
                "not see the attention of every call; use a recipe without a selector, or one that looks at keys or "
                "positions (`streaming`, `keydiff`)"
            )
        return Opened(found, tiers.fetch(store.arrays, method.tier))

    def keeps_shapes(self, store: Store) -> bool:
        return not store.group.grows and self.method(store).tier == "device"

    def method(self, store: Store) -> Method:
        return self.methods[store.group.leaves[0][0]]

    def statistic(self, store: Store, opened: Opened) -> Any:
        selector = self.method(store).selector
        if selector is None or not selector.needs_attention:
            return None
        total = opened.found.rows
        return lambda p, t: selector.statistic(p, t, total)

    def queries(self, found: Attention) -> jax.Array:
        """The queries of an attention, ``f32[B, K, Q, D]`` with elements as the keys' rows have them."""
        key = next(r for r in found.reads if r.role != "value")
        node = self._first_dot(found.weights, key)
        side = 1 if is_rooted(node.inputs[0]) else 0
        contract, batch = node.eqn.params["dimension_numbers"]  # pyright: ignore
        q = self.array(node.inputs[side])
        theirs = self.axes.labels(node.inputs[1 - side].labels)
        free = [d for d in range(q.ndim) if d not in contract[side] and d not in batch[side]]
        pairs = [(d, theirs[e]) for d, e in zip(batch[side], batch[1 - side])]
        inner = [(d, theirs[e]) for d, e in zip(contract[side], contract[1 - side])]
        order = [d for d, _ in pairs] + free + [d for d, _ in inner]
        atoms = [a for _, dim in pairs for a in dim]
        extra = [a for a in atoms if a not in key.lead]  # heads repeated over queries
        ends = [a for _, dim in inner for a in dim]
        q = q.transpose(order).reshape([a.size for a in atoms] + [-1] + [a.size for a in ends])
        lead = [atoms.index(a) for a in key.lead] + [atoms.index(a) for a in extra]
        last = [len(atoms) + 1 + ends.index(a) for a in key.inner]
        q = q.transpose([*lead, len(atoms), *last])
        return q.reshape(key.batch, key.heads, -1, key.width).astype(jnp.float32)

    def _first_dot(self, node: Node, key: Any) -> Node:
        """The matmul that reads the keys."""
        for n in walk(node):
            if n.op == "dot_general" and any(_is_read(v, key.node) for v in n.inputs):
                return n
        raise ValueError(
            f"{key.cell.name}: the selector looks at queries, but the keys are changed after they are read from the "
            "cache (rotary positions at reading, a norm): use a selector that looks at attention weights"
        )

    def open(self, store: Store, found: Attention) -> Opened:
        arrays = store.arrays
        if is_ragged(arrays):
            raise ValueError(
                f"{store.group.name}: layers have buffers of different sizes, and the program reads them from one "
                "stack at an index. Use a recipe with equal budgets and without `merge`, or a model that scans over "
                "its layers' caches."
            )
        if found.index is not None:
            index = self.array(found.index[1])
            arrays = entry_of(arrays, index)
        arrays = tiers.fetch(arrays, self.method(store).tier)
        return Opened(found, arrays)

    def new_rows(self, store: Store, found: Attention) -> Incoming:
        """The new rows of what is stored."""
        at, how = self.positions(found)
        if self.method(store).input:
            assert store.group.source is not None
            source = find_source(self, found)
            rows = source.to_rows(self.array(source.value)).astype(store.group.source.dtype)
            return Incoming([rows], at, "run")
        if found.start == "grow" and not store.group.grows:
            how = "behind"
        return Incoming(self.read_rows(store, found), at, how)

    def read_rows(self, store: Store, found: Attention) -> list[jax.Array]:
        """The new keys and values that `found` reads."""
        group = store.group
        new: list[Any] = [()] * len(group.streams)
        for read in found.reads:
            i = group.streams.index(stream_key(read))
            if read.write is None:
                shape = (read.batch, read.heads, 0, read.width)
                new[i] = jnp.zeros(shape, read.cell.dtype)
                continue
            value: Any = read.write.value
            value = value() if callable(value) else self.array(value)
            new[i] = new_rows(self, read, found.token, value).astype(read.cell.dtype)
        missing = [s.leaf for s, x in zip(group.streams, new) if isinstance(x, tuple)]
        assert not missing, missing
        return new

    def work(self, store: Store, found: Attention, arrays: Any, new: Incoming) -> Working:
        """The rows that are kept, and the new ones."""
        method, group = self.method(store), store.group
        w = working(method, group, arrays, new)
        if not method.input:
            return w
        # What was stored is made into keys and values again; the new ones stay as they are.
        source, rows = find_source(self, found), self.read_rows(store, found)
        made = dict(zip(map(stream_key, found.reads), source.rebuild(self, found, w.rows[0])))
        kept = [made[s].astype(x.dtype) for s, x in zip(group.streams, rows)]
        return Working(placed(kept, rows, new.at))

    def positions(self, found: Attention) -> tuple[jax.Array, str]:
        """``int32[T]`` or ``int32[B, T]``, S or more for rows to drop; and how they lie."""
        start, t, length = found.start, found.rows, found.length
        if start is None:
            return jnp.zeros(0, jnp.int32), "any"
        if start == "grow":
            return length - t + jnp.arange(t, dtype=jnp.int32), "run"
        if start == "roll":
            return length - t + jnp.arange(t, dtype=jnp.int32), "roll"
        if not isinstance(start, Positions):
            first = jnp.clip(jnp.asarray(self.array(start), jnp.int32), 0, length - t)
            return first + jnp.arange(t, dtype=jnp.int32), "run"
        at = start()
        if start.drops:
            at = jnp.where((at < 0) | (at >= length), length, at)
        elif start.contiguous:
            at = jnp.clip(at[..., :1], 0, length - t) + jnp.arange(t, dtype=jnp.int32)
        else:
            at = jnp.clip(at, 0, length - 1)
        if at.ndim == 2 and not start.along:
            at = at[0]
        return at, "run" if start.contiguous and not start.drops else "any"

    def close(self, store: Store) -> None:
        if store.opened is None:
            return
        found = self.written(store)
        opened: Opened = store.shut()
        method = self.method(store)
        queries = self.queries(opened.found) if method.needs_queries else None
        new, w, stats = opened.incoming, opened.working, None
        if new is None or found is not opened.found:
            new, w = self.new_rows(store, found), None
        if method.selector is not None:
            w = w or self.work(store, found, opened.arrays, new)
            stats = _for_slots(opened.stats, w)
        index = None if opened.found.index is None else self.array(opened.found.index[1])
        entries = [i for i in (store.entry, index) if i is not None]
        keep = lambda arrays, entry: jax.lax.stop_gradient(
            absorb(method, store.group, arrays, new, w, stats, queries, entry)
        )
        if len(entries) == 1 and in_place(method, store.group, opened.arrays, new.how):
            store.whole = keep(store.whole, entries[0])
        else:
            arrays = tiers.put(keep(opened.arrays, None), method.tier)
            store.arrays = arrays if index is None else entry_put(store.arrays, arrays, index)
        if store.group.grows:
            longer = store.group.length + opened.found.rows
            store.group = dataclasses.replace(store.group, length=longer)

    def view_array(self, node: Node, eqn: Any = None, reason: str = "") -> jax.Array:
        """A cache's rows as the program reads them, where something other than attention wants them."""
        assert node.view is not None
        opened: Opened | None = node.view.cell.store.opened
        assert opened is not None, node.view.cell.name
        found = opened.found
        read = next(r for r in found.reads if r.cell is node.view.cell)
        read = dataclasses.replace(read, node=node)
        w = self.worked(node.view.cell.store)
        i = node.view.cell.store.group.streams.index(stream_key(read))
        replay = Replay(self, found, Rows(w.rows, w.positions, w.live))
        return replay.arrange(read, w.rows[i])


def _for_slots(stats: Any, w: Working) -> Any:
    """What a selector knows of the slots; nothing of rows that are written after the attention."""
    extend = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, w.rows[0].shape[2] - x.shape[2])))
    return jax.tree.map(extend, stats)


def _is_read(x: Any, read: Node) -> bool:
    """Whether `x` is what was read, through casts and layout alone."""
    while (
        is_rooted(x)
        and x is not read
        and x.view is None
        and x.op in ("convert_element_type", *LAYOUT)
    ):
        x = x.inputs[0]
    return x is read


def run(
    program: Program,
    names: list[str],
    caches: Caches,
    methods: dict[str, Method],
    strict: bool,
    recorder: Recorder | None = None,
) -> list[Any]:
    """The results of a program whose caches are `KVState`s; they are so in the results too."""
    emit = Emit(strict=strict, caches=caches, methods=methods, recorder=recorder)
    stores: dict[str, Store] = {}
    cells: dict[str, Cell] = {}
    values: list[Any] = []
    for leaf, name in zip(program.leaves, names):
        group = caches.group_of(name) if name else None
        if group is None:
            values.append(leaf)
            continue
        owner = group.leaves[0][0]
        store = stores.setdefault(owner, Store(None, group))
        if isinstance(leaf, KVState):
            store.arrays, store.guessed = leaf.arrays, leaf.guessed
        shape = next(s for n, s, _ in group.leaves if n == name)
        cells[name] = Cell(name, shape, leaf.dtype, (), store)
        values.append(cells[name].node())
    emit.history.fix(v for v, name in zip(values, program.names) if name)
    _across(stores, methods, depth.spread)
    out = emit.run(program.jaxpr, values)
    place = {j: leaf for leaf, j in caches.outputs.items()}
    out = [v if j in place else emit.array(v, None, "it is a result") for j, v in enumerate(out)]
    for j in place:
        emit.result(out[j], "the program")
    for store in stores.values():
        emit.close(store)
    _across(stores, methods, depth.merge)
    body, _ = compat.open_jaxpr(program.jaxpr)
    avals: list[Any] = [v.aval for v in body.outvars]
    shapes = {leaf: tuple(avals[j].shape) for leaf, j in caches.outputs.items()}
    returned = lambda leaf: _returned(stores, caches, leaf, shapes, methods)
    return [returned(place[j]) if j in place else v for j, v in enumerate(out)]


def _across(stores: dict[str, Store], methods: dict[str, Method], change: Any) -> None:
    """Changes the buffers of merged layers, which are stacked or have stores of their own."""
    chains: dict[Method, list[tuple[Any, Store]]] = {}
    for owner, store in stores.items():
        method = methods[owner]
        if method.merge is None:
            continue
        if is_ragged(store.arrays):
            layers = _changed(change, method, store.group, store.arrays["layers"])
            store.arrays = {"layers": layers}
            continue
        rule = dataclasses.replace(method, merge=dataclasses.replace(method.merge, layer=None))
        chains.setdefault(rule, []).append((method.merge.layer, store))
    for rule, chain in chains.items():
        chain.sort(key=lambda pair: pair[0])
        group = chain[0][1].group
        layers = _changed(change, rule, group, [store.arrays for _, store in chain])
        for (_, store), arrays in zip(chain, layers):
            store.arrays = arrays


def _changed(change: Any, method: Method, group: Any, layers: list[Any]) -> list[Any]:
    """In whatever tier the buffers are."""
    group = stored(method, group)
    layers = [tiers.fetch(x, method.tier) for x in layers]
    return [tiers.put(x, method.tier) for x in change(method, group, layers)]


def _returned(
    stores: dict[str, Store], caches: Caches, leaf: str, shapes: dict[str, Any], methods: Any
) -> KVState | Moved:
    group = caches.group_of(leaf)
    assert group is not None
    owner = group.leaves[0][0]
    if leaf != owner:
        dtype = next(d for n, _, d in group.leaves if n == leaf)
        return Moved(owner, shapes[leaf], dtype)
    leaves = tuple((n, shapes[n], d) for n, _, d in group.leaves)
    group = dataclasses.replace(stores[owner].group, leaves=leaves)
    return KVState(stores[owner].arrays, group, methods[owner], stores[owner].guessed)
