"""Weight-only low-bit matmul for TPU: packed rows are decoded in VMEM, a tile at a time, straight into the MXU.

What is multiplied are bare levels (codes, unscaled); scales come on the float32 partial sum of each group. Three
things follow from the order of `codecs.packing` and from that:

* A byte column holds one code of each of `pieces` equal pieces of the row. A piece is a shift and a mask of those
  bytes, and it meets its own columns of `x`: nothing is unshuffled.
* Where a group is narrower than a tile of `LANES` columns, the rows of `x` come once for each group that the tile
  touches, zero outside of it. The MXU, which is bound by loading the weight, takes those rows for free while they
  are few.
* A zero point never touches a weight: ``sum((code - zero) * scale * x)`` is ``scale * sum(code * x)`` less
  ``scale * zero * sum(x)``, one small matmul of a block's scales with the sums of `x` over groups.

Letters: ``M`` rows of `x`, ``K`` the contracted axis, ``N`` rows of the weight, ``G`` groups of a row, ``B`` the
batch, ``P`` pieces of a row, ``R`` groups that a tile of columns touches at most. A piece is padded to whole tiles,
``D`` columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs import NF4, Fp8, Int, Packed
from ..codecs.nf4 import LEVELS
from ..codecs.packing import PLANES
from ..tpu import LANES, VMEM_BYTES, as_float32, four_bytes, loadable
from .layout import is_stored_as_shown
from .precision import is_exact

UNROLL = 8  # pieces of tiles that are scheduled together
ROW_BLOCK = 512  # rows of the weight in a block
X_ROWS = 512  # rows of `x` in a block at most, its copies for narrow groups counted
X_BYTES = 16 * 2**20  # of `x` in a block, at most
CODE_BYTES = 8 * 2**20  # of the codes in a block, at most
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def matmul(
    x: jax.Array,
    w: Packed,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """``[*B, M, K] x [*B, N, K] -> [*B, M, N]``, the weight read once, as it is stored.

    Args:
      x: bfloat16, float16 or float32.
      w: stored by `Int`, `NF4` or `Fp8` (E4M3), encoded along K.
      precision: as in `jax.lax.dot_general`. By default `x` is rounded to bfloat16, as TPU matmuls are; HIGH and
        HIGHEST multiply in float32. Sums are float32 in any case.
      preferred_element_type: of the result; by default what `x` and `w` promote to.
      interpret: False, True or `pltpu.InterpretParams()`, as in `pl.pallas_call`.

    Returns:
      The product, without a derivative: differentiate the XLA path. The weight is not rounded to its own dtype on
      the way: only nf4's levels are rounded, to bfloat16, by default precision.

    Raises:
      NotImplementedError: with what `refusal` says.
    """
    if reason := refusal(x, w):
        raise NotImplementedError(f"`w`: {reason}; use implementation='xla'")
    dtype = jnp.float32 if is_exact(precision) else jnp.bfloat16
    *batch, m, _ = x.shape
    cut = plan(x, w, dtype)
    flat = lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :])
    parts = {k: flat(jnp.broadcast_to(v, (*w.shape[:-1], v.shape[-1]))) for k, v in w.parts.items()}
    y = _call(cut, flat(x).astype(dtype), parts, interpret)
    y = y.reshape(*batch, m, w.shape[-2])
    return y.astype(preferred_element_type or jnp.result_type(x.dtype, w.dtype))


def refusal(x: jax.Array, w: Packed) -> str:
    """Why this kernel cannot take `x` and `w`; empty if it can."""
    codec, length = w.codec, w.view.length
    if not isinstance(codec, Int | NF4) and not (
        isinstance(codec, Fp8) and codec.element == "e4m3"
    ):
        return f"the codec {codec.name} is not one of int1 to int8, nf4, fp8_e4m3"
    if not is_stored_as_shown(w):
        return "its axes are not stored in the order [*B, N, K]"
    if x.dtype not in FLOATS:
        return f"`x` is {x.dtype.name}, not bfloat16, float16 or float32"
    planes = PLANES[codec.bits]
    multiple = LANES * 8 // min(planes)
    if len(planes) > 1 and length % multiple:
        return f"K is {length}; the planes of {codec.name} start at whole tiles for multiples of {multiple}"
    return ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call; letters as above.

    Attributes:
      codec: of the weight.
      length: K.
      width: columns of a piece, as packed.
      pieces: P.
      tiles: tiles of a piece; D is ``tiles * LANES``.
      group: columns under one scale.
      groups: G.
      touched: R.
      rows: of `x` in a block.
      row_block: of the weight in a block.
    """

    codec: Any
    length: int
    width: int
    pieces: int
    tiles: int
    group: int
    touched: int
    rows: int
    row_block: int

    @property
    def groups(self) -> int:
        return math.ceil(self.length / self.group)

    @property
    def columns(self) -> int:
        return self.pieces * self.tiles * LANES

    @property
    def code_bytes(self) -> int:
        """Of a row: a single plane is seen as padded to whole tiles, several are whole tiles."""
        return sum(p // min(self.planes) for p in self.planes) * self.tiles * LANES

    @property
    def planes(self) -> tuple[int, ...]:
        return PLANES[self.codec.bits]

    @property
    def unroll(self) -> int:
        """Steps of the loop over tiles in one; it divides them, or the compiler crashes."""
        most = max(1, UNROLL // self.pieces)
        return next(steps for steps in range(most, 0, -1) if self.tiles % steps == 0)

    @property
    def per_channel(self) -> bool:
        return self.groups == 1

    def first_group(self, piece: Any, tile: Any) -> Any:
        """Of the tile's columns."""
        return (piece * self.width + tile * LANES) // self.group


def plan(x: Any, w: Packed, dtype: Any = jnp.bfloat16) -> Plan:
    """How ``x[*B, M, K]`` and `w` are cut, multiplied as `dtype`; both may be shapes."""
    m, length = x.shape[-2], w.view.length
    codec: Any = w.codec
    pieces = 8 // min(PLANES[codec.bits])
    width = math.ceil(length / pieces)
    tiles = math.ceil(width / LANES)
    group = codec.group_size(length)
    starts = [p * width + t * LANES for p in range(pieces) for t in range(tiles)]
    touched = max(
        (min(s + LANES, length) - 1) // group - s // group + 1 for s in starts if s < length
    )
    itemsize = jnp.dtype(dtype).itemsize
    limit = X_BYTES // (pieces * tiles * LANES * itemsize * touched)
    rows = min(_up(m, 16), max(16, min(limit, X_ROWS // touched) // 16 * 16))
    row_bytes = w.parts["codes"].shape[-1]
    row_block = min(ROW_BLOCK, _up(w.shape[-2], LANES), CODE_BYTES // row_bytes // LANES * LANES)
    return Plan(codec, length, width, pieces, tiles, group, touched, rows, max(LANES, row_block))


def _up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


@functools.partial(jax.jit, static_argnums=(0, 3))
def _call(plan: Plan, x: jax.Array, parts: dict[str, jax.Array], interpret: Any) -> jax.Array:
    """``x[B, M, K]`` times the decoded ``[B, N, K]`` as float32 ``[B, M, N]``."""
    (b, m, _), n = x.shape, parts["codes"].shape[1]
    x = jnp.pad(x, ((0, 0), (0, -m % 16), (0, 0)))
    operands = [_spread(plan, x), parts["codes"], _by_group(parts["scale"])]
    params = pl.BlockSpec((None, plan.groups, plan.row_block), lambda b, i, j: (b, 0, j))
    specs = [
        pl.BlockSpec((None, plan.touched, plan.rows, plan.columns), lambda b, i, j: (b, 0, i, 0)),
        pl.BlockSpec((None, plan.row_block, plan.code_bytes), lambda b, i, j: (b, j, 0)),
        params,
    ]
    if isinstance(plan.codec, Int):
        sums = _group_sums(plan, x)
        operands.append(sums)
        specs.append(pl.BlockSpec((None, plan.rows, sums.shape[-1]), lambda b, i, j: (b, i, 0)))
    if "zero" in parts:
        operands.append(_by_group(parts["zero"]))
        specs.append(params)
    y = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(b, pl.cdiv(x.shape[1], plan.rows), pl.cdiv(n, plan.row_block)),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, plan.rows, plan.row_block), lambda b, i, j: (b, i, j)),
        out_shape=jax.ShapeDtypeStruct((b, x.shape[1], n), jnp.float32),
        scratch_shapes=[pltpu.VMEM((plan.groups, plan.row_block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        name="low_bit_matmul",
        interpret=interpret,
    )(*operands)
    return y[:, :m]


def _spread(plan: Plan, x: jax.Array) -> jax.Array:
    """``x[B, M, K]`` as ``[B, R, M, P * D]``: pieces padded to whole tiles, a copy for each group of a tile."""
    b, m, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.pieces * plan.width - plan.length)))
    x = x.reshape(b, m, plan.pieces, plan.width)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, plan.tiles * LANES - plan.width),))
    x = x.reshape(b, 1, m, plan.columns)
    if plan.touched == 1:
        return x
    piece = np.arange(plan.columns) // (plan.tiles * LANES)
    at = np.arange(plan.columns) % (plan.tiles * LANES)
    group = (piece * plan.width + at) // plan.group - plan.first_group(piece, at // LANES)
    own = group == np.arange(plan.touched)[:, None, None]
    return jnp.where(own, x, 0)


def _group_sums(plan: Plan, x: jax.Array) -> jax.Array:
    """Sums of `x` over each group, ``f32[B, M, G]``."""
    x = jnp.pad(
        x.astype(jnp.float32), ((0, 0), (0, 0), (0, plan.groups * plan.group - plan.length))
    )
    return x.reshape(*x.shape[:2], plan.groups, plan.group).sum(-1)


def _by_group(param: jax.Array) -> jax.Array:
    """``[B, N, G]`` as ``[B, G, N]``, which is how XLA lays it out."""
    return jnp.swapaxes(loadable(param), 1, 2)


def _kernel(plan: Plan, x_ref, codes_ref, scale_ref, *refs) -> None:
    """A block of the result: ``out[rows, row_block]``."""
    sum_ref = refs[0] if isinstance(plan.codec, Int) else None
    zero_ref = refs[1] if len(refs) == 4 else None
    out_ref, scales = refs[-2:]
    table = _table(plan)
    scales[...] = as_float32(scale_ref[...]) * (16.0 if isinstance(plan.codec, Fp8) else 1.0)
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.loop(0, plan.tiles, unroll=plan.unroll)
    def _(tile):
        total = jnp.zeros(out_ref.shape, jnp.float32)
        for piece in range(plan.pieces):
            w = _levels(plan, _codes(plan, codes_ref, piece, tile), table, x_ref.dtype)
            column = pl.multiple_of((piece * plan.tiles + tile) * LANES, LANES)
            x = x_ref[:, :, pl.ds(column, LANES)].reshape(-1, LANES)
            sums = _dot(x, w, ((1,), (1,)))
            if plan.per_channel:
                total += sums
                continue
            first = plan.first_group(piece, tile)
            for i in range(plan.touched):
                group = jnp.minimum(first + i, plan.groups - 1)
                total += sums[i * plan.rows : (i + 1) * plan.rows] * scales[pl.ds(group, 1), :]
        out_ref[...] += total

    zero = _zero(plan, zero_ref)
    if plan.per_channel:
        x_sum = sum_ref[:, :1] * zero if sum_ref is not None else 0.0
        out_ref[...] = (out_ref[...] - x_sum) * scales[...]
    elif sum_ref is not None:
        out_ref[...] -= _dot(sum_ref[...], scales[...] * zero, ((1,), (0,)))


def _zero(plan: Plan, zero_ref) -> Any:
    """What is to be taken from integer levels."""
    if not isinstance(plan.codec, Int):
        return 0.0
    zero = plan.codec.middle if zero_ref is None else as_float32(zero_ref[...])
    return zero - (128 if plan.codec.bits == 8 else 0)


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _codes(plan: Plan, codes_ref, piece: int, tile: Any) -> jax.Array:
    """The codes of a tile of columns, four to a word: bytes ``[row_block, LANES]`` seen as int32."""
    planes = plan.planes
    codes, start, bits = None, 0, plan.codec.bits
    for plane in planes:
        bits -= plane
        segments = plane // min(planes)
        above, segment = divmod(piece, segments)
        column = start + segment * plan.width + tile * LANES
        words = pltpu.bitcast(codes_ref[:, pl.ds(pl.multiple_of(column, LANES), LANES)], jnp.int32)
        if plane < 8:
            words = (words >> (plane * above)) & four_bytes(2**plane - 1)
        codes = words << bits if codes is None else codes | words << bits
        start += segments * plan.width
    assert codes is not None
    return codes


def _levels(plan: Plan, words: jax.Array, table: Any, dtype: Any) -> jax.Array:
    """The level of each code; E4M3 over 16, 8-bit integers less 128. In bfloat16 only nf4 is rounded."""
    if isinstance(plan.codec, Fp8):
        return _e4m3(words).astype(dtype)
    if plan.codec.bits == 8:
        words ^= four_bytes(0x80)
    codes = pltpu.bitcast(words, jnp.int8)
    if isinstance(plan.codec, NF4):
        picked = jnp.take_along_axis(table, codes.astype(jnp.int32), 1, mode="promise_in_bounds")
        return picked.astype(dtype)
    return codes.astype(dtype)


def _table(plan: Plan) -> Any:
    """The levels of nf4, one a lane, for a lookup within a row."""
    if not isinstance(plan.codec, NF4):
        return None
    lane = lax.broadcasted_iota(jnp.int32, (plan.row_block, LANES), 1)
    return functools.reduce(
        lambda t, i: jnp.where(lane == i, LEVELS[i], t), range(16), jnp.zeros(lane.shape)
    )


def _e4m3(words: jax.Array) -> jax.Array:
    """Over 16: TPUs unpack the E4M3 of bias 11, whose one NaN is our -0."""
    size = words & four_bytes(0x7F)
    not_zero = (size + four_bytes(0x7F)) & four_bytes(0x80)
    return pltpu.bitcast(size | words & not_zero, jnp.float8_e4m3b11fnuz)
