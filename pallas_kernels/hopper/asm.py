"""A few words of MLIR and PTX, for the bodies of `inline_mgpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector

Value = Any  # an ir.Value
ONES = 0x01010101  # a byte in each of four


def inline(
    arg_types: Any = (), return_type: Any = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`inline_mgpu`: the decorated function's first argument, the launch context, is not given by the caller."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def const(x: int) -> Value:
    """A 32-bit constant; bits above are cut off."""
    x &= 0xFFFFFFFF
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), x if x < 2**31 else x - 2**32))


def const64(x: int) -> Value:
    return arith.constant(i64(), ir.IntegerAttr.get(i64(), x))


def both(x: int) -> int:
    """A 16-bit pattern in both halves of a word."""
    return x | x << 16


def thread() -> Value:
    return gpu.thread_id(gpu.Dimension.x)


def lanes() -> tuple[Value, Value, Value]:
    """A thread's warp in its warpgroup, its row of a core matrix, and its place in the quad."""
    t = arith.index_cast(i32(), thread())
    warp = arith.andi(arith.shrui(t, const(5)), const(3))
    return warp, arith.andi(arith.shrui(t, const(2)), const(7)), arith.andi(t, const(3))


def first_row(warp: Value, g: Value) -> Value:
    """The first of a thread's two rows of a ``[64, n]`` tile; the second is 8 below."""
    return arith.addi(arith.muli(warp, const(16)), g)


def word(code: str, *args: Value) -> Value:
    """The 32-bit result of one line of PTX."""
    return mgpu.utils.inline_ptx(code, *args, result_types=i32())


def at(pointer: Value, offset: Value, element: ir.Type) -> Value:
    dynamic = [-(2**31)]
    return llvm.getelementptr(
        pointer.type, pointer, [offset], dynamic, element, llvm.GEPNoWrapFlags.none
    )


def pointer(ref: Value) -> Value:
    return mgpu.utils.memref_ptr(ref)


def element(ref: Value) -> ir.Type:
    return ir.MemRefType(ref.type).element_type


def scalar(x: Any) -> Value:
    """The register of an array without axes."""
    (register,) = x.registers.flat
    return register


def bits(x: Value, kind: ir.Type) -> Value:
    return mgpu.utils.bitcast(x, kind)


def doubled(x: Value, i: int = 0) -> Value:
    """Element `i` of a vector of 16-bit floats, in both halves of a word."""
    return bits(vector.shuffle(x, x, [i, i]), i32())


def array(
    registers: Any, layout: Any, shape: tuple[int, ...], is_signed: bool | None = None
) -> mgpu.FragmentedArray:
    """`is_signed`: of integers."""
    layout = layout.to_mgpu()
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def is_signed(dtype: Any) -> bool | None:
    """What `array` is told."""
    return jnp.issubdtype(dtype, jnp.signedinteger) if jnp.issubdtype(dtype, jnp.integer) else None


def extract(x: Value, i: int) -> Value:
    return vector.extract(x, dynamic_position=[], static_position=[i])


def vector_of(kind: ir.Type, values: list[Value]) -> Value:
    return vector.from_elements(kind, values)


def either(
    condition: Value,
    kinds: list[ir.Type],
    yes: Callable[[], list[Value]],
    no: Callable[[], list[Value]],
) -> list[Value]:
    """What `yes` makes where a condition holds that all threads of a warp share, else what `no` makes."""
    branch = scf.IfOp(condition, kinds, has_else=True)
    for block, make in ((branch.then_block, yes), (branch.else_block, no)):
        assert block is not None
        with ir.InsertionPoint(block):
            scf.yield_(make())
    return list(branch.results)
