"""A warpgroup's ring of tiles in shared memory, filled by bulk copies that one thread starts.

Mosaic's own copies have each of the 128 threads arrive at a barrier for each copy; here one arrives for all of a tile,
which matters where a tile is few bytes from many arrays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from . import asm
from .layout import ROWS, SCALAR, sync, tiled


def ring_barriers(arrays: int, rings: int, stages: int, interpret: bool) -> Any:
    """Scratch for the barriers of `rings` rings that are filled from so many arrays."""
    if interpret:
        return plgpu.Barrier(num_arrivals=arrays, num_barriers=rings * stages)
    return plgpu.SMEM((2 * rings * stages,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of warpgroup `index`.

    Attributes:
      slots: for each array ``[rings, stages, *tiles]``; tiles are flat, or `tiled` rows, 64 of each.
      barriers: of all rings.
      tiles: that are copied together.
    """

    slots: list[Any]
    barriers: Any
    index: Any
    stages: int
    interpret: bool
    tiles: int = 1

    def start(self) -> None:
        """Before anything else."""
        if self.interpret:
            return

        @asm.inline(arg_types=(plgpu.RefType(), SCALAR))
        def run(ctx, barriers, index):
            first = arith.muli(asm.scalar(index), asm.const(self.stages))
            with mgpu.utils.when(_one_thread()):
                for i in range(self.stages):
                    barrier = _barrier(barriers, arith.addi(first, asm.const(i)))
                    nvvm.mbarrier_init(barrier.get_ptr(), asm.const(1))
                nvvm.fence_mbarrier_init()

        run(self.barriers, self.index)
        sync(self.interpret)

    def slot(self, i: Any) -> list[Any]:
        """What the i-th copy of each array fills."""
        slot = lax.rem(i, self.stages)
        return [ref.at[self.index, slot] for ref in self.slots]

    def fetch(self, i: Any, arrays: list[Any], tile: Any, wanted: Any) -> None:
        """Starts the i-th copies: from tile `tile` of every array on, if `wanted`."""
        if self.interpret:
            pl.when(wanted)(lambda: self._fetch_plainly(i, arrays, tile))
            return
        to = self.slot(i)
        nbytes = sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in to)
        kinds = [plgpu.RefType(_transforms(t)) for t in to]

        @asm.inline(
            arg_types=([plgpu.RefType()] * len(to), kinds, plgpu.RefType(), SCALAR, SCALAR, SCALAR)
        )
        def run(ctx, arrays, to, barriers, place, tile, wanted):
            wanted = arith.cmpi(arith.CmpIPredicate.ne, asm.scalar(wanted), asm.const(0))
            with mgpu.utils.when(arith.andi(wanted, _one_thread())):
                barrier = _barrier(barriers, asm.scalar(place))
                barrier.arrive_expect_tx(nbytes)
                for array, ref in zip(arrays, to):
                    self._copy(ctx, array, ref, asm.scalar(tile), barrier)

        run(arrays, to, self.barriers, self._place(i), tile, wanted.astype(jnp.int32))

    def wait(self, i: Any) -> None:
        """Until the i-th copies are there."""
        if self.interpret:
            plgpu.barrier_wait(self.barriers.at[self._place(i)])
            return

        @asm.inline(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def run(ctx, barriers, place, parity):
            odd = arith.cmpi(arith.CmpIPredicate.ne, asm.scalar(parity), asm.const(0))
            _barrier(barriers, asm.scalar(place)).wait_parity(odd)

        run(self.barriers, self._place(i), lax.rem(lax.div(i, self.stages), 2))

    def _place(self, i: Any) -> Any:
        return self.index * self.stages + lax.rem(i, self.stages)

    def _fetch_plainly(self, i: Any, arrays: list[Any], tile: Any) -> None:
        for array, to in zip(arrays, self.slot(i)):
            n = to.shape[0]
            source = array.at[pl.ds(tile * (n // self.tiles), n)]
            plgpu.copy_gmem_to_smem(source, to, self.barriers.at[self._place(i)])

    def _copy(self, ctx: Any, array: Any, to: Any, tile: Any, barrier: Any) -> None:
        shape, index = ir.MemRefType(to.type).shape, ir.IndexType.get()
        at = lambda n: arith.index_cast(index, arith.muli(tile, asm.const(n // self.tiles)))
        options: dict[str, Any] = {"src_ref": array, "dst_ref": to, "barrier": barrier}
        options |= {"arrive": False, "predicate": None}
        if len(shape) == 1:
            options["oob_mode"] = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            ctx.async_copy(gmem_slice=(mgpu.ds(at(shape[0]), shape[0]),), **options)
            return
        rows, row_bytes = ROWS * self.tiles, shape[-1]
        ctx.async_copy(
            gmem_slice=(mgpu.ds(at(rows), rows), slice(None)), swizzle=row_bytes,
            gmem_transform=mgpu.TileTransform((8, row_bytes)), **options,
        )  # fmt: skip


def _transforms(tile: Any) -> tuple[Any, ...]:
    return () if len(tile.shape) == 1 else tiled(tile.dtype, tile.shape[1])


def _one_thread() -> Any:
    return mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARPGROUP)


def _barrier(barriers: Any, i: Any) -> Any:
    pointer = asm.at(asm.pointer(barriers), i, asm.i64())
    return mgpu.utils.BarrierRef(pointer, asm.const(0), None, 1)  # pyright: ignore
