"""A program as operations and values: what the planner reads a jaxpr into.

Calls (`jit`, `custom_jvp_call`, `custom_vjp_call`, `jax.checkpoint`, ...) are read through; `scan`, `while` and
`cond` keep their bodies as blocks of their own, so that a repeated layer is looked at once. A value carries true bytes
(sub-byte types packed) and its memory space, an operation its flops and the bytes it touches.

What the gradient of `jax.checkpoint` recomputes stands behind a `barrier`, an operation that moves nothing: no
compiler may compute before it what comes after it, or merge the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from .flops import flops_of
from .report import tree_nbytes

DEVICE, HOST = "device", "host"

_JAXPRS = tuple({jex.Jaxpr, jex.ClosedJaxpr})
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
}
# They carry jaxprs, of scalars or for a compiler of their own, but are single operations to a planner.
_LEAVES = frozenset(
    {
        "core_map",
        "custom_linear_solve",
        "io_callback",
        "mosaic_gpu_call",
        "pallas_call",
        "pure_callback",
        "reduce",
        "reduce_window",
        "scatter",
        "scatter-add",
        "scatter-apply",
        "scatter-max",
        "scatter-min",
        "scatter-mul",
        "scatter-sub",
        "scatter_add",
        "scatter_apply",
        "scatter_max",
        "scatter_min",
        "scatter_mul",
        "scatter_sub",
        "select_and_scatter",
        "sort",
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array that the program computes or is given. Two values are equal only if they are one.

    Attributes:
      name: path of an argument (`params['w']`), or the operation that makes it and a number.
      shape, dtype: as in the program; of one shard inside `shard_map`.
      nbytes: true bytes on one device, sub-byte types packed.
      space: `"device"` or `"host"`.
      literal: whether it is a constant written into the program.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    space: str = DEVICE
    literal: bool = False

    def __repr__(self) -> str:
        where = "<host>" if self.space == HOST else ""
        return f"{self.name}:{_short(self.dtype)}{where}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
      name: of its primitive; `barrier` for what keeps recomputation apart.
      inputs, outputs: values, literals included.
      params: of the primitive, as JAX has them.
      flops: floating-point operations of one run, trips of inner loops included.
      blocks: of `scan` (body), `while` (condition, body) and `cond` (branches).
      trips: how often the blocks run; 1 where that is unknown (`while`).
      consts, carries: of loops, how many leading inputs are constants, and how many then are carried.
      scope: the name scopes around it, for reports.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flops: int = 0
    blocks: tuple[Block, ...] = ()
    trips: int = 1
    consts: int = 0
    carries: int = 0
    scope: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that it reads and writes in one run, if every input and output lies in memory.

        A loop's bytes are its body's, for all trips.
        """
        if self.blocks:
            return self.trips * max(sum(op.nbytes for op in block.ops) for block in self.blocks)
        return sum(v.nbytes for v in (*self.inputs, *self.outputs) if not v.literal)

    def __repr__(self) -> str:
        times = f" x{self.trips}" if self.trips != 1 else ""
        return f"{', '.join(map(repr, self.outputs))} = {self.name}{times} {', '.join(v.name for v in self.inputs)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A straight line of operations in program order.

    Attributes:
      inputs: the values that it is given, in order. Of a scan body: constants, carries, slices.
      outputs: the values that it returns, in order; inputs and literals among them.
      ops: the operations.
      constants: arrays that the program holds itself.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    constants: tuple[Value, ...] = ()

    @functools.cached_property
    def producers(self) -> dict[Value, Op]:
        """The operation that makes a value; inputs, constants and literals have none."""
        return {value: op for op in self.ops for value in op.outputs}

    @functools.cached_property
    def users(self) -> dict[Value, list[Op]]:
        """The operations that read a value, each once, in program order."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in dict.fromkeys(op.inputs):
                users.setdefault(value, []).append(op)
        return users

    @functools.cached_property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def walk(self) -> Iterator[Op]:
        """All operations, those of inner blocks behind their loop."""
        for op in self.ops:
            yield op
            for block in op.blocks:
                yield from block.walk()

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph(Block):
    """A whole program.

    Attributes:
      donated: inputs whose memory the program may reuse.
    """

    donated: frozenset[Value] = frozenset()


def trace(fn: Callable[..., Any] | Any, *args: Any, donate: int | Sequence[int] = ()) -> Graph:
    """Reads a function, or a jaxpr, into a graph.

    Args:
      fn: a function of arrays; or a closed jaxpr, and then `args` are left out.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s; other leaves are static. Memory spaces and shardings of
        their types are kept.
      donate: numbers of the donated arguments, of the donated operands for a jaxpr.

    Raises:
      ValueError: `donate` names an argument that isn't there.
      NotImplementedError: the program has a higher-order primitive that the planner can't look into; it is named.
    """
    donate = (donate,) if isinstance(donate, int) else tuple(donate)
    if isinstance(fn, _JAXPRS):
        if args:
            raise ValueError("`fn` is a jaxpr, so `args` must be left out.")
        count = len(getattr(fn, "jaxpr", fn).invars)
        names, groups = [f"args[{i}]" for i in range(count)], list(range(count))
        jaxpr = fn
    else:
        jaxpr, names, groups = _trace_function(fn, args)
        count = len(args)
    if bad := [i for i in donate if not -count <= i < count]:
        raise ValueError(f"`donate` has {bad}; there are {count} arguments, counted from 0.")
    given = {i % count for i in donate}
    reader = _Reader()
    block = reader.block(jaxpr, names)
    donated = frozenset(v for v, group in zip(block.inputs, groups) if group in given)
    fields = {f.name: getattr(block, f.name) for f in dataclasses.fields(Block)}
    return Graph(**fields, donated=donated)


def _trace_function(
    fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, list[str], list[int]]:
    """The jaxpr of `fn`, and of each of its operands the name and the number of its argument."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(args)
    dynamic = [i for i, (_, leaf) in enumerate(leaves) if _is_array(leaf)]

    def flat(*arrays: Any) -> Any:
        values = [leaf for _, leaf in leaves]
        for i, array in zip(dynamic, arrays):
            values[i] = array
        return fn(*jax.tree_util.tree_unflatten(tree, values))

    jaxpr = jax.make_jaxpr(flat)(*(leaves[i][1] for i in dynamic))
    paths = [leaves[i][0] for i in dynamic]
    names = [f"args{jax.tree_util.keystr(path)}" for path in paths]
    return jaxpr, names, [path[0].idx for path in paths]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


class _Reader:
    """Numbers the values of one program and memoises the bodies that occur more than once."""

    def __init__(self):
        self.count = 0
        self.bodies: dict[int, Block] = {}

    def value(self, aval: Any, name: str, numbered: bool = True, literal: bool = False) -> Value:
        if numbered:
            self.count += 1
            name = f"{name}.{self.count}"
        shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
        return Value(name, shape, dtype, _nbytes(aval), _space(aval), literal)

    def block(self, jaxpr: Any, names: Sequence[str] = ()) -> Block:
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        names = names or ["input"] * len(jaxpr.invars)
        given = [self.value(v.aval, n, n == "input") for v, n in zip(jaxpr.invars, names)]
        held = [self.value(v.aval, "constant") for v, _ in zip(jaxpr.constvars, consts)]
        ops: list[Op] = []
        outputs = self.inline(jaxpr, given, held, ops)
        return Block(tuple(given), tuple(outputs), tuple(ops), tuple(held))

    def body(self, jaxpr: Any) -> Block:
        """The block of a loop; layers that share a jaxpr share it."""
        if id(jaxpr) not in self.bodies:
            self.bodies[id(jaxpr)] = self.block(jaxpr)
        return self.bodies[id(jaxpr)]

    def inline(self, jaxpr: Any, inputs: Sequence[Value], consts: Sequence[Value], ops: list[Op]):
        """Appends the operations of `jaxpr` to `ops`; gives its outputs."""
        env = dict(zip(jaxpr.invars, inputs)) | dict(zip(jaxpr.constvars, consts))

        def read(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):
                return self.value(atom.aval, str(atom.val), numbered=False, literal=True)
            return env[atom]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, tuple(map(read, eqn.invars)), ops)
            env.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: tuple[Value, ...], ops: list[Op]) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in _CALLS:
            return self.call(eqn, inputs, ops)
        if name == "name":
            return inputs
        outputs = tuple(self.value(var.aval, name) for var in eqn.outvars)
        if name in ("scan", "while", "cond"):
            op = getattr(self, name.strip("_") + "_op")(eqn, inputs, outputs)
        elif name not in _LEAVES and (name == "call_hi_primitive" or _has_jaxpr(eqn.params)):
            raise NotImplementedError(
                f"the planner can't look into the primitive `{name}`: it reads {', '.join(sorted(_CALLS))}, scan,"
                " while and cond. With the flags jax_remat3, jax_scan3 or jax_custom_jvp3 on, switch them off."
            )
        else:
            op = Op(name, inputs, outputs, eqn.params, flops_of(eqn))
        scope = str(getattr(eqn.source_info, "name_stack", ""))
        ops.append(dataclasses.replace(op, scope=scope))
        return outputs

    def call(self, eqn: Any, inputs: tuple[Value, ...], ops: list[Op]) -> Sequence[Value]:
        inner = eqn.params[_CALLS[eqn.primitive.name]]
        open_inner = getattr(inner, "jaxpr", inner)
        if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
            fresh = tuple(dataclasses.replace(v, literal=False) for v in inputs)
            ops.append(Op("barrier", inputs, fresh))
            inputs = fresh
        if eqn.primitive.name == "shard_map":
            return self.shards(eqn, open_inner, inputs, ops)
        held = [self.value(v.aval, "constant") for v in open_inner.constvars]
        return self.inline(open_inner, inputs, held, ops)

    def shards(self, eqn: Any, inner: Any, inputs: tuple[Value, ...], ops: list[Op]):
        """Bytes are those of one device inside; outside as far as types say (`_nbytes`)."""
        local = tuple(self.value(v.aval, "shard") for v in inner.invars)
        ops.append(Op("barrier", inputs, local))
        outputs = tuple(self.inline(inner, local, (), ops))
        whole = tuple(self.value(v.aval, "shard_map") for v in eqn.outvars)
        whole = tuple(dataclasses.replace(w, nbytes=o.nbytes) for w, o in zip(whole, outputs))
        ops.append(Op("barrier", outputs, whole))
        return whole

    def scan_op(self, eqn: Any, inputs: Any, outputs: Any) -> Op:
        consts, carries = _scan_split(eqn.params)
        body, trips = self.body(eqn.params["jaxpr"]), eqn.params["length"]
        return Op(
            "scan",
            inputs,
            outputs,
            {"reverse": eqn.params["reverse"]},
            trips * body.flops,
            (body,),
            trips,
            consts,
            carries,
        )

    def while_op(self, eqn: Any, inputs: Any, outputs: Any) -> Op:
        """Its inputs become: constants of the body, carries. What the condition alone reads is small."""
        n = eqn.params["cond_nconsts"]
        body = self.body(eqn.params["body_jaxpr"])
        consts = eqn.params["body_nconsts"]
        return Op("while", inputs[n:], outputs, {}, body.flops, (body,), 1, consts, len(outputs))

    def cond_op(self, eqn: Any, inputs: Any, outputs: Any) -> Op:
        branches = tuple(self.body(branch) for branch in eqn.params["branches"])
        flops = max(branch.flops for branch in branches)
        return Op("cond", inputs[1:], outputs, {}, flops, branches, 1, len(inputs) - 1)


def _scan_split(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many carries. The parameters changed in jax 0.11."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()
    return len(consts), len(carries)


def _has_jaxpr(params: Mapping[str, Any]) -> bool:
    items = [v if isinstance(v, tuple | list) else (v,) for v in params.values()]
    return any(isinstance(item, _JAXPRS) for group in items for item in group)


def _nbytes(aval: Any) -> int:
    """True bytes on one device: mesh axes that the type names divide them. Tokens take none."""
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0
    return -(-tree_nbytes(jax.ShapeDtypeStruct(aval.shape, aval.dtype)) // _shard_count(aval))


def _shard_count(aval: Any) -> int:
    sharding = getattr(aval, "sharding", None)
    if sharding is None or getattr(sharding, "mesh", None) is None:
        return 1
    axes = [
        a for part in sharding.spec if part for a in (part if isinstance(part, tuple) else (part,))
    ]
    return math.prod(sharding.mesh.shape[a] for a in axes if isinstance(a, str))


def _space(aval: Any) -> str:
    return HOST if "host" in str(getattr(aval, "memory_space", "")).lower() else DEVICE


def _short(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _lines(block: Block, indent: str = "") -> Iterator[str]:
    yield f"{indent}inputs {', '.join(map(repr, block.inputs))}"
    for op in block.ops:
        yield f"{indent}{op!r}"
        for inner in op.blocks:
            yield from _lines(inner, indent + "    ")
    yield f"{indent}outputs {', '.join(v.name for v in block.outputs)}"
