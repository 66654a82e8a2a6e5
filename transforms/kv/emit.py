"""Puts compressed caches into a program: append, attend, and keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import compat
from ..core.interpret import Recorder
from ..core.program import Program
from .expr import Cell, Node
from .find import Caches, stream_key
from .match import Attention, new_rows
from .replay import Replay, Rows, attend
from .rewrite import CacheRun, Store
from .state import KVState, Moved
from .store import Working, absorb, working
from .writes import Positions


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A store with new rows that are not stored yet.

    Attributes:
      found: the attention that opened it.
      arrays: the state of its entry of the stack.
      working: the rows to attend to.
      stats: what the selector wants to know of the attention weights; None before.
    """

    found: Attention
    arrays: Any
    working: Working
    stats: Any = None


class Emit(CacheRun):
    """See the module."""

    def __init__(self, *, strict: bool, caches: Caches, method: Any, recorder: Recorder | None = None):
        super().__init__(strict=strict, recorder=recorder)
        self.caches, self.method = caches, method

    def attention(self, found: Attention) -> jax.Array:
        store: Store = found.reads[0].cell.store
        if not self._is_open(store, found):
            self.close(store)
            store.opened = self.open(store, found)
        opened: Opened = store.opened
        order = [store.group.streams.index(stream_key(r)) for r in found.reads]
        w = opened.working
        rows = Rows([w.rows[i] for i in order], w.positions, w.live)
        statistic = self.statistic(store, opened)
        out, stats = attend(self, found, rows, statistic)
        if stats is not None and opened.stats is None:
            store.opened = dataclasses.replace(opened, stats=stats)
        return out

    def statistic(self, store: Store, opened: Opened) -> Any:
        selector = self.method.selector
        if selector is None or not selector.needs_attention:
            return None
        total = opened.found.rows
        return lambda p, t: selector.statistic(p, t, total)

    def _is_open(self, store: Store, found: Attention) -> bool:
        opened: Opened | None = store.opened
        return opened is not None and all(
            any(r.write is o.write for o in opened.found.reads) for r in found.reads
        )

    def open(self, store: Store, found: Attention) -> Opened:
        arrays = store.arrays
        if found.index is not None:
            index = self.array(found.index[1])
            arrays = jax.tree.map(lambda x: _entry(x, index, found), arrays)
        new = [()] * len(store.group.streams)
        for read in found.reads:
            value = read.write.value
            value = value() if callable(value) else self.array(value)
            rows = new_rows(self, read, found.token, value)
            new[store.group.streams.index(stream_key(read))] = rows.astype(read.cell.dtype)
        missing = [s.leaf for s, x in zip(store.group.streams, new) if isinstance(x, tuple)]
        assert not missing, missing
        at, how = self.positions(found)
        group = store.group
        return Opened(found, arrays, working(self.method, group, arrays, new, at, how))

    def positions(self, found: Attention) -> tuple[jax.Array, str]:
        """``int32[T]`` or ``int32[B, T]``, S or more for rows to drop; and how they lie."""
        start, t, length = found.start, found.rows, found.length
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
        if at.ndim == 2 and not start.batched:
            at = at[0]
        return at, "run" if start.contiguous and not start.drops else "any"

    def close(self, store: Store) -> None:
        opened: Opened | None = store.opened
        if opened is None:
            return
        store.opened = None
        arrays = absorb(self.method, store.group, opened.arrays, opened.working, opened.stats)
        arrays = jax.lax.stop_gradient(arrays)
        if opened.found.index is not None:
            index = self.array(opened.found.index[1])
            stack = opened.found.reads[0].cell.stack
            arrays = jax.tree.map(
                lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, index, 0), store.arrays, arrays
            )
            assert not stack or len(stack) < len(store.group.stack)
        store.arrays = arrays
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
        w = opened.working
        i = node.view.cell.store.group.streams.index(stream_key(read))
        replay = Replay(self, found, Rows(w.rows, w.positions, w.live))
        return replay.arrange(read, w.rows[i])


def _entry(x: jax.Array, index: jax.Array, found: Attention) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def run(
    program: Program,
    names: list[str],
    caches: Caches,
    method: Any,
    strict: bool,
    recorder: Recorder | None = None,
) -> list[Any]:
    """The results of a program whose caches are `KVState`s; they are so in the results too."""
    emit = Emit(strict=strict, caches=caches, method=method, recorder=recorder)
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
            store.arrays = leaf.arrays
        shape = next(s for n, s, _ in group.leaves if n == name)
        cells[name] = Cell(name, shape, leaf.dtype, (), store)
        values.append(cells[name].node())
    out = emit.run(program.jaxpr, values)
    for store in stores.values():
        emit.close(store)
    place = {j: leaf for leaf, j in caches.outputs.items()}
    body, _ = compat.open_jaxpr(program.jaxpr)
    shapes = {leaf: tuple(body.outvars[j].aval.shape) for leaf, j in caches.outputs.items()}
    finish = lambda j, v: (
        _returned(stores, caches, place[j], shapes, method)
        if j in place
        else emit.array(v, None, "it is a result")
    )
    return [finish(j, v) for j, v in enumerate(out)]


def _returned(
    stores: dict[str, Store], caches: Caches, leaf: str, shapes: dict[str, Any], method: Any
) -> KVState | Moved:
    group = caches.group_of(leaf)
    assert group is not None
    owner = group.leaves[0][0]
    if leaf != owner:
        dtype = next(d for n, _, d in group.leaves if n == leaf)
        return Moved(owner, shapes[leaf], dtype)
    leaves = tuple((n, shapes[n], d) for n, _, d in group.leaves)
    group = dataclasses.replace(stores[owner].group, leaves=leaves)
    return KVState(stores[owner].arrays, group, method)
