"""The interpreter that follows caches through a program.

`CacheRun` evaluates a jaxpr with caches held as deferred values (`expr.Node`). Where an attention is complete,
`attention` is called; where a cache leaves the program, its store takes its place. The two users are `Probe`, which
only records what is there (`find.py`), and `Emit`, which puts compressed caches in (`emit.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from stowax.pallas_kernels.append import entry_of, entry_put
from stowax.pallas_kernels.codecs import LayoutError

from ..core import compat
from ..core.control import stacked
from ..core.interpret import Interpreter, Recorder
from ..core.program import is_packed
from .defer import LAYOUT, Deferral, Scalar, literal, make
from .expr import DONE, Cell, Node, View, is_node, is_rooted, shape_of
from .history import History
from .match import Attention, Read, match, reads_of, stored
from .store import is_ragged


class Unfit(Exception):
    """A leaf can't be compressed: the program does something with it that has no compressed form."""

    def __init__(self, leaves: Sequence[str], reason: str, where: str = ""):
        super().__init__(f"{', '.join(leaves)}: {reason}")
        self.leaves, self.reason, self.where = tuple(leaves), reason, where


class Store:
    """What holds the rows of a group of cells.

    Attributes:
      whole: its state in this scope; of all entries of a stack where `entry` is not None.
      entry: the entry of the stack that a scan is at, ``int32[]``.
      opened: the attention whose new rows are not stored yet, in whatever form the user of `CacheRun` keeps it.
      attended: the attentions over it since it was opened.
      views: the last that was seen of each cell, with its updates.
    """

    guessed = False  # the layout was guessed, and rightly

    def __init__(self, arrays: Any = (), group: Any = None):
        self.whole, self.entry, self.group = arrays, None, group
        self.opened: Any = None
        self.attended: list[Attention] = []
        self.views: dict[str, View] = {}

    @property
    def arrays(self) -> Any:
        """The state, of its entry."""
        return self.whole if self.entry is None else entry_of(self.whole, self.entry)

    @arrays.setter
    def arrays(self, arrays: Any) -> None:
        self.whole = arrays if self.entry is None else entry_put(self.whole, arrays, self.entry)

    def shut(self) -> Any:
        """Nothing is pending any more; what was."""
        opened, self.opened, self.attended, self.views = self.opened, None, [], {}
        return opened


class CacheRun(Interpreter, Deferral):
    """See the module."""

    def __init__(self, *, strict: bool, recorder: Recorder | None = None, history: bool = False):
        Interpreter.__init__(self, strict=strict, recorder=recorder)
        Deferral.__init__(self)
        self.history = History(history)
        self.scopes: list[dict[int, tuple[Node, Any]]] = [{}]
        self.origin: dict[int, tuple[Any, Node]] = {}
        self.postponed: set[int] = set()  # conds of which only some branches attend

    # what the two users do differently

    def attention(self, found: Attention) -> jax.Array:
        raise NotImplementedError

    def reduced(self, found: Attention, value: Node) -> jax.Array:
        """A value that depends on the rows of an attention and has no axis of tokens."""
        raise NotImplementedError

    def view_array(self, node: Node, eqn: Any = None, reason: str = "") -> jax.Array:
        raise NotImplementedError

    def postpone(self, store: Store, found: Attention) -> Any:
        """What `store.opened` is after a `cond` of which some branches made the attention `found`."""
        return found

    def keeps_shapes(self, store: Store) -> bool:
        """Whether a scan may carry a store's stack on, and update entries of it."""
        return True

    def close(self, store: Store) -> None:
        """Carries out what is pending on a store."""

    # evaluation

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        self.history.fix(compat.open_jaxpr(jaxpr)[1])
        return super().run(jaxpr, values)

    def step(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        out = self._step(eqn, values)
        self.history.note(eqn, values, out)
        return out

    def _step(self, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if not any(map(is_node, values)):
            return self._plain(eqn, values, name)
        if name in CONTROL:
            with compat.scope(eqn):
                return CONTROL[name](self, eqn, values)
        if name == "dot_general" and all(map(is_rooted, values)):
            with compat.scope(eqn):
                return [self._attention(eqn, values)]
        if self._is_settled(values):
            return self.step(eqn, [self.array(v, eqn) if is_rooted(v) else v for v in values])
        try:
            if any(map(is_packed, values)):
                raise LayoutError("it meets a packed weight")
            return self.nodes(eqn, values)
        except LayoutError as error:
            arrays = [self.array(v, eqn, str(error)) if is_node(v) else v for v in values]
            out = super().step(eqn, arrays)
        if not any(map(is_rooted, values)):  # it was made of indices: a sum of one-hot rows, say
            self.origin.update({id(v): (v, make(eqn, values, i)) for i, v in enumerate(out)})
        return out

    def _plain(self, eqn: compat.Eqn, values: list[Any], name: str) -> list[Any]:
        if name == "iota":
            aval: Any = eqn.outvars[0].aval
            return [Node(tuple(aval.shape), aval.dtype, eqn)]
        if name == "broadcast_in_dim" and not np.shape(values[0]) and not is_packed(values[0]):
            return self.nodes(eqn, values)
        if name in ("jit", "pjit") and (_are_indices(eqn.invars) or _are_indices(eqn.outvars)):
            return self.run(eqn.params["jaxpr"], values)
        out = super().step(eqn, values)
        derived = name in _TRACED and any(id(v) in self.origin for v in values)
        for i, (var, value) in enumerate(zip(eqn.outvars, out)):
            if derived or _is_index(var.aval) or not np.shape(value):
                self.origin[id(value)] = value, make(eqn, values, i)
        return out

    def _attention(self, eqn: compat.Eqn, values: list[Any]) -> jax.Array:
        try:
            found = match(self, eqn, values)
        except LayoutError as error:
            names = [n.view.cell.name for v in values for n in reads_of(v)]
            raise Unfit(list(dict.fromkeys(names)), str(error), compat.where(eqn)) from None
        store = found.reads[0].cell.store
        for read in found.reads:
            self.saw(read.node)
        if store.opened is not None and not self.is_open(store, found):
            self.close(store)
        for other in {id(r.cell.store): r.cell.store for r in found.reads}.values():
            other.attended.append(found)
        return self.attention(found)

    def is_open(self, store: Store, found: Attention) -> bool:
        """Whether an attention reads the rows that the store was opened with."""
        opened = _found(store.opened)
        if opened is None:
            return False
        writes = [o.write for o in opened.reads]
        if any(not any(r.write is w for w in writes) for r in found.reads):
            return False
        a, b = opened.index, found.index
        return a is b or (a is not None and b is not None and self.same(a[1], b[1]))

    def saw(self, node: Node) -> None:
        """Notes the updates of a cache, for attentions that read it before them."""
        if node.view.writes:
            node.view.cell.store.views[node.view.cell.name] = node.view

    def written(self, store: Store) -> Attention:
        """The attention that a store was opened by, with the rows that are to be stored. Raises Unfit."""
        found = _found(store.opened)
        assert found is not None
        if not any(map(_is_later, found.reads)):
            return found
        try:
            return stored(self, found, [_last_view(read) for read in found.reads])
        except LayoutError as error:
            raise Unfit(_names(found), str(error), compat.where(found.eqn)) from None

    def attention_over(self, value: Node) -> Attention | None:
        """The attention of whose rows a value is a reduction; None where it has an axis of tokens, or there is none."""
        if value.view is not None or value.labels is None:
            return None
        nodes = reads_of(value)
        here = {a for dim in self.axes.labels(value.labels) for a in dim}
        bases = {a for b in here if b.base is not None for a in self.axes.resolve((b.base,))}
        for found in nodes[0].view.cell.store.attended if nodes else ():
            reads = [r.node for r in found.reads]
            if all(any(n is r for r in reads) for n in nodes) and found.token not in here | bases:
                return found
        return None

    def _is_settled(self, values: Sequence[Any]) -> bool:
        """Whether all that depends on caches is reduced over the tokens, and meets arrays: a deferred denominator."""
        nodes = [v for v in values if is_rooted(v)]
        meets = any(not is_node(v) and not is_packed(v) and np.ndim(v) for v in values)
        return bool(meets and nodes) and all(self.attention_over(v) is not None for v in nodes)

    def array(self, value: Any, eqn: compat.Eqn | None = None, reason: str = "") -> Any:
        """A deferred value, computed; a packed one, decoded."""
        if isinstance(value, Scalar):
            return self.array(value.value).reshape(())
        if not is_node(value):
            return Interpreter.array(self, value, eqn, reason)
        known = self.scopes[-1].get(id(value))
        if known is not None:
            return known[1]
        found = self.attention_over(value)
        if value.view is not None:
            out = self.view_array(value, eqn, reason)
        elif found is not None:
            out = self.reduced(found, value)
        else:
            assert value.eqn is not None
            inputs = [self.array(v, eqn, reason) for v in value.inputs]
            out = compat.bind(value.eqn, inputs)[value.out]
        self.scopes[-1][id(value)] = value, out
        return out

    def same(self, a: Any, b: Any) -> bool:
        """Whether two indices are certainly equal."""
        if a is b:
            return True
        if isinstance(a, Scalar) or isinstance(b, Scalar):
            return self.same(_unwrap(a), _unwrap(b))
        x, y = literal(a), literal(b)
        if x is not None or y is not None:
            return x == y
        if isinstance(a, (tuple, str)) or isinstance(b, (tuple, str)):
            return a == b
        p, q = self.made_by(a), self.made_by(b)
        if p is None or q is None or _operation(p) != _operation(q):
            return _equal_constants(a, b)
        return all(self.same(v, w) for v, w in zip(p.inputs, q.inputs))

    def made_by(self, x: Any) -> Node | None:
        """The equation that made an index, or what was made of indices, deferred or run."""
        if is_node(x):
            return x if x.eqn is not None else None
        return self.origin[id(x)][1] if id(x) in self.origin else None

    # scopes

    def whole(self, value: Any) -> Cell | None:
        """The cell that a value is the whole of, in its own layout."""
        if not is_rooted(value) or value.view is None:
            return None
        view: View = value.view
        cell = view.cell
        mine, theirs = self.axes.labels(value.labels), self.axes.labels(cell.labels)
        grown = {self.axes.resolve((w.grown,)) for w in view.writes if w.grown is not None}
        fits = len(mine) == len(theirs) and all(a == b or a in grown for a, b in zip(mine, theirs))
        return cell if fits and not view.fixed and not view.subs else None

    def result(self, value: Any, where: str) -> Cell | None:
        """The cell that a result is the whole of, updated as attention read it. Raises Unfit."""
        cell = self.whole(value)
        if cell is None:
            if is_rooted(value) and value.view is not None:
                self.refuse_at(value, f"a part of it is a result of {where}")
            return None
        self.saw(value)
        found = _found(cell.store.opened)
        for read in () if found is None else found.reads:
            later = read.write is None or read.write.kind == "grow"
            if read.cell is cell and read.write not in value.view.writes and not later:
                raise Unfit(
                    [cell.name], f"{where} returns it updated otherwise than attention reads it"
                )
        return cell

    def taken(self, value: Any) -> Cell | None:
        """The cell that goes into an inner program whole, nothing pending on it."""
        cell = self.whole(value)
        if cell is None or any(w is not DONE for w in value.view.writes):
            return None
        return cell

    def refuse(self, value: Any, eqn: compat.Eqn, reason: str) -> None:
        self.refuse_at(value, reason, compat.where(eqn))

    def refuse_at(self, value: Any, reason: str, where: str = "") -> None:
        names = [n.view.cell.name for n in reads_of(value)]
        raise Unfit(list(dict.fromkeys(names)), reason, where)

    def enter(self, stores: Sequence[Store], arrays: Any) -> None:
        self.scopes.append({})
        for store, state in zip(stores, arrays):
            store.shut()
            store.whole = state

    def leave(self, stores: Sequence[Store], store_rows: bool = True) -> list[Any]:
        for store in stores if store_rows else ():
            self.close(store)
        for store in stores:
            store.shut()
        self.scopes.pop()
        return [store.whole for store in stores]

    def results(self, eqn: compat.Eqn, out: Sequence[Any]) -> tuple[list[Any], list[Cell | None]]:
        """Results of an inner program: arrays, and the cells that some of them are."""
        arrays, cells = [], []
        for value in out:
            cell = self.result(value, f"`{eqn.primitive.name}`")
            cells.append(cell)
            arrays.append(() if cell is not None else self.array(value, eqn, "it is a result"))
        return arrays, cells

    def inner(
        self, eqn: compat.Eqn, values: list[Any], call: Callable[..., Any], bodies: Sequence[Any]
    ) -> list[Any]:
        """Runs inner programs on `values` through `call(functions, arrays, states)`.

        Deferred operands are closed over; the stores of caches go in and out.
        """
        stores = self.stores_of(values)
        for store in stores:
            self.close(store)
        before = [store.whole for store in stores]
        slots = [i for i, v in enumerate(values) if not is_node(v)]
        found: list[list[Cell | None]] = []
        touched: list[list[Any]] = []

        def function(body: Any, arrays: Any, states: Any) -> Any:
            self.enter(stores, states)
            mine = list(values)
            for i, x in zip(slots, arrays):
                mine[i] = x
            self.history.inherit(values, mine)
            out, cells = self.results(eqn, self.run(body, mine))
            found.append(cells)
            touched.append([store.opened for store in stores])
            return out, self.leave(stores, store_rows=id(eqn) not in self.postponed)

        functions = [functools.partial(function, body) for body in bodies]
        out, states = call(functions, [values[i] for i in slots], before)
        if any(cells != found[0] for cells in found):
            self.refuse(
                next(v for v in values if is_rooted(v)), eqn, "the branches return different caches"
            )
        for store, state in zip(stores, states):
            store.shut()
            store.whole = state
        self._postpone(eqn, values, stores, touched, found[0])
        return [c.node((DONE,)) if c is not None else x for x, c in zip(out, found[0])]

    def _postpone(
        self, eqn: compat.Eqn, values: list[Any], stores: Any, touched: Any, cells: Any
    ) -> None:
        """Where only some branches attend to rows that were written before, those are stored after all of them."""
        views = [n.view for v in values for n in reads_of(v)]
        written = [w for view in views for w in view.writes if w is not DONE]
        flags = [[opened is not None for opened in branch] for branch in touched]
        if not written or all(f == flags[0] for f in flags):
            return
        for store, openings in zip(stores, zip(*touched)):
            found = next((_found(opened) for opened in openings if opened is not None), None)
            if found is None:
                continue
            before = all(any(r.write is w for w in written) for r in found.reads)
            if not before or found.index is not None or any(c is not None for c in cells):
                self.refuse_at(found.weights, "only some branches attend to it", compat.where(eqn))
            self.postponed.add(id(eqn))
            store.opened = self.postpone(store, found)

    def stores_of(self, values: Sequence[Any]) -> list[Store]:
        found = {id(n.view.cell.store): n.view.cell.store for v in values for n in reads_of(v)}
        return list(found.values())


def _found(opened: Any) -> Attention | None:
    return opened if opened is None or isinstance(opened, Attention) else opened.found


def _names(found: Attention) -> list[str]:
    return list(dict.fromkeys(read.cell.name for read in found.reads))


def _last_view(read: Read) -> View | None:
    return read.cell.store.views.get(read.cell.name)


def _is_later(read: Read) -> bool:
    """Whether what is stored is written after the attention has read."""
    if read.write is None:
        return True
    view = _last_view(read)
    return read.write.kind == "grow" and view is not None and read.write not in view.writes


_TRACED = (*LAYOUT, "sub", "convert_element_type")  # of masks that were summed over rows


def _are_indices(atoms: Sequence[Any]) -> bool:
    """Whether all are integers or truth values."""
    return all(_is_index(atom.aval) for atom in atoms)


def _is_index(aval: Any) -> bool:
    return hasattr(aval, "dtype") and (
        jnp.issubdtype(aval.dtype, jnp.integer) or aval.dtype == jnp.bool_
    )


def _operation(node: Node) -> tuple[Any, ...]:
    """What two equations must have in common to give the same for the same operands."""
    assert node.eqn is not None
    params = tuple(sorted((k, str(v)) for k, v in node.eqn.params.items()))
    return node.op, params, node.out, len(node.inputs)


def _unwrap(x: Any) -> Any:
    """The scalar behind an index ``[1]`` and its casts."""
    while True:
        if isinstance(x, Scalar):
            x = x.value
        elif is_node(x) and x.op in ("reshape", "broadcast_in_dim", "squeeze") and x.inputs:
            x = x.inputs[0]
        else:
            return x


def _equal_constants(a: Any, b: Any) -> bool:
    if is_node(a) or is_node(b) or isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    return shape_of(a) == shape_of(b) and bool(np.array_equal(a, b))


def _inline(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return run.run(inner, values)


def _custom(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """A custom rule around a cache: inlined, and its gradient refused rather than changed."""
    out = run.run(eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"], values)
    return [x if is_node(x) else _no_gradient(eqn.primitive.name)(x) for x in out]


def _no_gradient(name: str) -> Callable[[Any], Any]:
    @jax.custom_jvp
    def identity(x: Any) -> Any:
        return x

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"gradient through `{name}` around a compressed cache: its own rule would be lost. "
            "Differentiate the original function."
        )

    return identity


def _remat(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    if any(
        is_rooted(v) and v.view is None for v in values
    ):  # a softmax alone: replayed with its attention
        return run.run(eqn.params["jaxpr"], values)

    def call(functions: Any, arrays: Any, states: Any) -> Any:
        again = jax.checkpoint(
            functions[0], policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
        )
        return again(arrays, states)

    return run.inner(eqn, values, call, [eqn.params["jaxpr"]])


def _cond(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    index, *operands = values
    index = run.array(index, eqn, "it is an index")

    def call(functions: Any, arrays: Any, states: Any) -> Any:
        return lax.switch(index, functions, arrays, states)

    return run.inner(eqn, operands, call, eqn.params["branches"])


def _moving(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Cell | None]:
    """The cells among the carries of a loop."""
    cells = []
    for value in values:
        cell = run.taken(value)
        if cell is None and is_rooted(value):
            run.refuse(value, eqn, f"a part of it is carried by `{eqn.primitive.name}`")
        cells.append(cell)
    return cells


class _Loop:
    """The caches that a loop carries or scans: cells and stores of its body, and their states."""

    def __init__(self, run: CacheRun, eqn: compat.Eqn, carry: list[Any], xs: list[Any]):
        self.run, self.eqn = run, eqn
        self.carry, self.xs = _moving(run, eqn, carry), _moving(run, eqn, xs)
        self.carried = _stores(self.carry)
        self.scanned = _stores(self.xs)
        for store in (*self.carried, *self.scanned):
            run.close(store)
        if set(map(id, self.carried)) & set(map(id, self.scanned)):
            run.refuse(
                carry[0], eqn, "keys are carried by a loop and values scanned, or the reverse"
            )
        self.outer = self.carried + self.scanned
        self.inner = [Store(group=s.group) for s in self.outer]

    def cells(self, cells: list[Cell | None], taken: int) -> list[Any]:
        """Cells of the body; a scan has taken `taken` axes of each."""
        out = []
        for c in cells:
            if c is None:
                out.append(None)
                continue
            store = self.inner[next(i for i, s in enumerate(self.outer) if s is c.store)]
            out.append(Cell(c.name, c.shape[taken:], c.dtype, c.stack + c.shape[:taken], store))
        return out

    def states(self, stores: list[Store]) -> list[Any]:
        return [s.arrays for s in stores]

    def finish(self, stores: list[Store], states: Any) -> None:
        for store, state in zip(stores, states):
            store.shut()
            store.arrays = state


def _stores(cells: Sequence[Cell | None]) -> list[Store]:
    return list({id(c.store): c.store for c in cells if c is not None}.values())


def _given(cells: list[Any], arrays: Any) -> list[Any]:
    """Operands of a loop's body: nodes for caches, arrays for the rest."""
    rest = iter(arrays)
    return [c.node() if c is not None else next(rest) for c in cells]


def _scan(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    n_consts, n_carry = compat.scan_split(eqn)
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = values[n_consts + n_carry :]
    loop = _Loop(run, eqn, init, xs)
    outside = [s for s in run.stores_of(consts) if s not in loop.outer]
    ragged = any(is_ragged(s.arrays) for s in loop.scanned)
    carries_all = not ragged and all(map(run.keeps_shapes, loop.scanned))
    n, first = len(loop.outer if carries_all else loop.carried), len(loop.carried)
    ys_cells: list[Any] = []

    def step(carry: Any, x: Any) -> Any:
        (arrays, states, entry), (rows, slices) = carry, x
        for store in loop.inner[first:n]:
            store.entry = entry
        run.enter(loop.inner, [*states, *slices])
        known = [s.opened for s in outside]
        carry_cells, x_cells = loop.cells(loop.carry, 0), loop.cells(loop.xs, 1)
        given = _given(x_cells, rows)
        run.history.inherit(xs, given)
        mine = [*_given(carry_cells, arrays), *given]
        out = run.run(p["jaxpr"], [*consts, *mine])
        moved, cells = run.results(eqn, out[:n_carry])
        for got, want, value in zip(cells, carry_cells, out):
            if got is not want:
                _lost(run, eqn, got or want, value)
        ys, made = run.results(eqn, out[n_carry:])
        for cell in made:
            if cell is not None and cell not in x_cells:
                raise Unfit([cell.name], "a loop stacks copies of it", compat.where(eqn))
        if [s.opened for s in outside] != known:
            names = [n.view.cell.name for v in consts for n in reads_of(v)]
            raise Unfit(names, "it is updated in a loop that does not carry it", compat.where(eqn))
        ys_cells[:] = [None if c is None else loop.xs[x_cells.index(c)] for c in made]
        after = run.leave(loop.inner)
        kept = [x for x, c in zip(moved, cells) if c is None]
        entry = entry + (-1 if p["reverse"] else 1)
        return (kept, after[:n], entry), ([y for y, c in zip(ys, made) if c is None], after[n:])

    start = [run.array(v, eqn) for v, c in zip(init, loop.carry) if c is None]
    plain = [v for v, c in zip(xs, loop.xs) if c is None]
    rows = [run.array(v, eqn) if is_node(v) else stacked(run, eqn, v) for v in plain]
    carry = (start, loop.states(loop.outer[:n]), jnp.int32(p["length"] - 1 if p["reverse"] else 0))
    scanned = (rows, loop.states(loop.outer[n:]))
    scan = _unrolled if ragged else lax.scan
    (moved, states, _), (ys, entries) = scan(
        step, carry, scanned, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    loop.finish(loop.outer, [*states, *entries])
    return [*_given_back(loop.carry, moved), *_given_back(ys_cells, ys)]


def _unrolled(step: Any, carry: Any, xs: Any, *, length: int, reverse: bool, unroll: Any) -> Any:
    """A scan as a loop: its layers have buffers of different sizes."""
    rows, states = xs
    entry = lambda s, i: s["layers"][i] if is_ragged(s) else jax.tree.map(lambda x: x[i], s)
    ys: list[Any] = [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        carry, ys[i] = step(carry, (row, [entry(s, i) for s in states]))
    stack = lambda *parts: jnp.stack(parts)
    out = jax.tree.map(stack, *(y for y, _ in ys))
    after = [
        {"layers": [s[j] for _, s in ys]}
        if is_ragged(state)
        else jax.tree.map(stack, *(s[j] for _, s in ys))
        for j, state in enumerate(states)
    ]
    return carry, (out, after)


def _lost(run: CacheRun, eqn: compat.Eqn, cell: Cell, value: Any) -> None:
    raise Unfit(
        [cell.name],
        f"`{eqn.primitive.name}` carries another value on in its place",
        compat.where(eqn),
    )


def _given_back(cells: Sequence[Any], arrays: Any) -> list[Any]:
    rest = iter(arrays)
    return [c.node((DONE,)) if c is not None else next(rest) for c in cells]


def _while(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = values[n_cond + n_body :]
    loop = _Loop(run, eqn, init, [])
    for v in (*cond_consts, *body_consts):
        if is_rooted(v):
            run.refuse(v, eqn, "a `while` loop reads it but does not carry it")

    def cond(state: Any) -> Any:
        run.enter(loop.inner, state[1])
        cells = loop.cells(loop.carry, 0)
        out = run.array(run.run(p["cond_jaxpr"], [*cond_consts, *_given(cells, state[0])])[0], eqn)
        run.leave(loop.inner)
        return out

    def body(state: Any) -> Any:
        run.enter(loop.inner, state[1])
        cells = loop.cells(loop.carry, 0)
        out = run.run(p["body_jaxpr"], [*body_consts, *_given(cells, state[0])])
        arrays, got = run.results(eqn, out)
        for g, want, value in zip(got, cells, out):
            if g is not want:
                _lost(run, eqn, g or want, value)
        return [x for x, c in zip(arrays, got) if c is None], run.leave(loop.inner)

    start = [run.array(v, eqn) for v, c in zip(init, loop.carry) if c is None]
    arrays, states = lax.while_loop(cond, body, (start, loop.states(loop.carried)))
    loop.finish(loop.carried, states)
    return _given_back(loop.carry, arrays)


def _shard_map(run: CacheRun, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    for value in values:
        if is_rooted(value):
            run.refuse(value, eqn, "it goes into `shard_map`")
    return Interpreter.step(run, eqn, [run.array(v, eqn) for v in values])


CONTROL: dict[str, Callable[[CacheRun, compat.Eqn, list[Any]], list[Any]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "custom_lin"), _inline),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _remat),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
