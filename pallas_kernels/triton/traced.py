"""Plain jax functions inside a kernel: a function is traced, and its operations are replayed on the kernel's values.

Triton has no rounding, padding, slices of arrays, nor concatenation of more than two numbers; those become arithmetic.
Bytes are held in 32-bit integers, of which only the last 8 bits count until something else is read: GPUs have no
arithmetic on bytes. Arrays that a function holds become operands of the kernel. Every array must have a power of two of
elements along each axis.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

LARGEST = 2**16  # elements of an array, in registers of a program

# What Triton lowers itself.
PLAIN = {
    "abs", "add", "and", "argmax", "argmin", "broadcast_in_dim", "clamp",
    "convert_element_type", "copy", "div", "eq", "exp", "exp2", "ge", "gt", "integer_pow", "iota",
    "is_finite", "le", "log", "log2", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "reduce_max",
    "reduce_min", "reduce_sum", "rem", "reshape", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "split", "sqrt", "square", "squeeze", "stop_gradient", "sub", "transpose",
    "xor",
}  # fmt: skip
# Those of which the last 8 bits of the result depend on those of the operands alone.
MODULAR = {
    "add", "and", "broadcast_in_dim", "concatenate", "copy", "mul", "neg", "not", "or", "pad", "reshape", "select_n",
    "shift_left", "split", "squeeze", "sub", "transpose", "xor",
}  # fmt: skip
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "scan": "jaxpr",
}


class Traced:
    """A function for arguments of given shapes.

    Attributes:
      constants: the arrays that it holds, to be handed to `__call__` as values.
      refusal: why it can't be replayed in a kernel; "" where it can.
    """

    def __init__(self, function: Callable[..., Any], *shapes: Any):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        self.jaxpr, self.own = closed.jaxpr, closed.consts
        self.tree = jax.tree.structure(out)
        found: dict[int, Any] = {}
        for x in _constants(closed.jaxpr, closed.consts):
            found.setdefault(id(x), x)
        self.constants = list(found.values())
        self.refusal = _refusal(closed.jaxpr)

    def __call__(self, constants: Sequence[Any], *args: Any) -> Any:
        """The result on a kernel's values; `constants` are those of `self.constants`."""
        known = {id(x): _wide(y) for x, y in zip(self.constants, constants, strict=True)}
        out = _replay(self.jaxpr, self.own, list(map(_wide, jax.tree.leaves(args))), known)
        shapes: list[Any] = [v.aval for v in self.jaxpr.outvars]
        exact = [x.astype(s.dtype) for x, s in zip(out, shapes)]
        return jax.tree.unflatten(self.tree, exact)


def _is_byte(v: Any) -> bool:
    return v.aval.dtype == jnp.uint8


def _wide(x: Any) -> Any:
    return x.astype(jnp.int32) if x.dtype == jnp.uint8 else x


def _on_bytes(eqn: Any, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Operands and parameters of an equation on bytes, for 32-bit integers."""
    name, params = eqn.primitive.name, dict(eqn.params)
    if name not in MODULAR:
        exact = lambda v, x: x & 255 if _is_byte(v) and not isinstance(v, Literal) else x
        values = list(map(exact, eqn.invars, values))
    for key in ("new_dtype", "dtype"):
        if params.get(key) == jnp.uint8:
            params[key] = jnp.dtype(jnp.int32)
    return values, params


def _inner(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The program of an equation that has one."""
    name = CALLS.get(eqn.primitive.name)
    if name is None:
        return None
    program = eqn.params[name]
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def _loop(inner: tuple[Any, Sequence[Any]], eqn: Any, values: list[Any], known: Any) -> list[Any]:
    """A loop stays one, also where it is to be unrolled: a kernel's code is read from memory at each launch."""
    fixed = len(values) - len(eqn.outvars)
    step = lambda _, carry: _replay(*inner, [*values[:fixed], *carry], known)
    return jax.lax.fori_loop(0, eqn.params["length"], step, values[fixed:])


def _constants(jaxpr: Any, consts: Sequence[Any]) -> list[Any]:
    found = [x for x in consts if np.ndim(x)]
    for eqn in jaxpr.eqns:
        found += [v.val for v in eqn.invars if isinstance(v, Literal) and np.ndim(v.val)]
        if inner := _inner(eqn):
            found += _constants(*inner)
    return found


def _refusal(jaxpr: Any) -> str:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if inner := _inner(eqn):
            if name == "scan" and not _only_carries(eqn, inner[0]):
                return "no `scan` over arrays in a kernel"
            if reason := _refusal(inner[0]):
                return reason
            continue
        if name not in PLAIN and name not in RULES:
            return f"no `{name}` in a kernel"
        for v in (*eqn.invars, *eqn.outvars):
            if any(n & (n - 1) or not n for n in v.aval.shape):
                return f"an array of {list(v.aval.shape)}: its axes are no powers of two"
            if math.prod(v.aval.shape) > LARGEST:
                return f"an array of {list(v.aval.shape)} is too large for a program"
        if name in RULES and not _fits(eqn):
            return f"no `{name}` of this form in a kernel"
    return ""


def _only_carries(eqn: Any, body: Any) -> bool:
    """Whether a loop neither takes slices of arrays nor stacks any."""
    shapes = lambda variables: [v.aval.shape for v in variables]
    pairs = (eqn.invars, body.invars), (eqn.outvars, body.outvars)
    return all(shapes(x) == shapes(y) for x, y in pairs)


def _fits(eqn: Any) -> bool:
    p, shapes = eqn.params, [v.aval.shape for v in eqn.invars]
    match eqn.primitive.name:
        case "round":
            return p["rounding_method"] is lax.RoundingMethod.TO_NEAREST_EVEN
        case "pad":
            return not any(any(c) for c in p["padding_config"])
        case "concatenate":
            return p["dimension"] == len(shapes[0]) - 1 and len(set(shapes)) == 1
        case "dot_general":
            (left, right), batch = p["dimension_numbers"]
            one_row = math.prod(shapes[0]) == shapes[0][-1]
            last = tuple(left) == (len(shapes[0]) - 1,) and tuple(right) == (0,)
            return batch == ((), ()) and len(shapes[1]) == 2 and last and one_row
    return True


def _replay(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], known: Any) -> list[Any]:
    env: dict[Any, Any] = {}
    given = lambda x: known.get(id(x), x)
    number = lambda v: jnp.int32(v.val) if _is_byte(v) and not np.ndim(v.val) else given(v.val)
    read = lambda v: number(v) if isinstance(v, Literal) else env[v]
    env.update(zip(jaxpr.constvars, map(given, consts)))
    env.update(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if inner := _inner(eqn):
            loop = eqn.primitive.name == "scan"
            out = _loop(inner, eqn, values, known) if loop else _replay(*inner, values, known)
        elif rule := RULES.get(eqn.primitive.name):
            out = [rule(eqn, *values)]
        else:
            params = eqn.params
            if any(map(_is_byte, (*eqn.invars, *eqn.outvars))):
                values, params = _on_bytes(eqn, values)
            out = eqn.primitive.bind(*values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out))
    return [read(v) for v in jaxpr.outvars]


def _round(eqn: Any, x: jax.Array) -> jax.Array:
    """To the nearest integer, ties to even: adding a number whose last digit is 1 rounds."""
    shift = jnp.where(x < 0, -1.0, 1.0) * jnp.float32(2**23)
    return jnp.where(jnp.abs(x) < 2**23, (x + shift) - shift, x)


def _concatenate(eqn: Any, *pieces: jax.Array) -> jax.Array:
    """Equal pieces of the last axis."""
    shape = (*pieces[0].shape[:-1], len(pieces), pieces[0].shape[-1])
    place = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    spread = [
        jnp.where(place == i, jnp.broadcast_to(x[..., None, :], shape), jnp.zeros((), x.dtype))
        for i, x in enumerate(pieces)
    ]
    return functools.reduce(operator.or_ if _is_int(pieces[0]) else operator.add, spread).reshape(
        eqn.outvars[0].aval.shape
    )


def _is_int(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _dot(eqn: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of one row."""
    aval = eqn.outvars[0].aval
    both = x.reshape(-1, 1).astype(jnp.float32) * y.astype(jnp.float32)
    return both.sum(0).astype(aval.dtype).reshape(aval.shape)


def _bitcast(eqn: Any, x: jax.Array) -> jax.Array:
    bits = x.astype(eqn.invars[0].aval.dtype)
    return _wide(lax.bitcast_convert_type(bits, eqn.params["new_dtype"]))


RULES: dict[str, Callable[..., jax.Array]] = {
    "bitcast_convert_type": _bitcast,
    "round": _round,
    "pad": lambda eqn, x, _: x,
    "concatenate": _concatenate,
    "dot_general": _dot,
}
