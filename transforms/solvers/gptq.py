"""GPTQ: rounds one column after another and lets the later columns make up for each error.

With inputs of second moment `H`, a change `E` of the weight costs `tr(E H E^T)`. Factor the damped
hessian as `H = R R^T` with `R` upper triangular; then the cost is a sum over columns `i` of

    R_ii^2 * || w_i + sum_{j<i} (w_j - q_j) R_ji / R_ii - q_i ||^2

so going from the first column to the last, the best choice for column `i` is to round the bracket.
This is GPTQ's update (whose Cholesky factor of the inverse hessian is `R^-1`) in the form of
QuIP's LDLQ: the same codes, one factorisation, no inverse. Columns are processed in blocks: the
errors of all earlier blocks enter by one matmul, those of the same block by a product of a row and
a matrix for each column.

References: GPTQ, https://arxiv.org/abs/2210.17323; QuIP, https://arxiv.org/abs/2307.13304.

Differs from GPTQ's own code in: 1. inputs that are always zero are rounded like any other, where it
sets their weights to zero (an expert that calibration never reached would be erased); 2. damping is
doubled when the factorisation fails, and rounding takes over only when 1.0 fails too; 3. rounding
also takes over where it has the smaller output error. The last two are reported in `info`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stowax.pallas_kernels.codecs import Codec, GroupCodec, Params, Parts

from .base import Solved, Solver, check_inputs, encode, energy, errors, require_groups
from .clip import ClipSearch, fit_clipped, group_weights

CLIP = ClipSearch(steps=16, p=2.0, refit=10)


@dataclasses.dataclass(frozen=True)
class GPTQ(Solver):
    """See `gptq`."""

    calibration: Sequence[tuple[Any, ...]] = dataclasses.field(
        default=(), compare=False, repr=False
    )
    act_order: bool = True
    damping: float = 0.05
    block: int = 128
    clip: ClipSearch | None = CLIP

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self):
        if not 0 < self.damping <= 1:
            raise ValueError(f"`damping` must lie in (0, 1]; got {self.damping}.")
        if self.block < 1:
            raise ValueError(f"`block` must be 1 or more columns; got {self.block}.")

    def solve(self, w: jax.Array, codec: Codec, *, hessian: jax.Array | None = None) -> Solved:
        codec = require_groups(self.name, codec)
        w, hessian = check_inputs(w, hessian)
        if hessian is None:
            raise ValueError(
                "`hessian` is None, and GPTQ cannot work without the second moment of the layer's "
                'inputs; pass it, or use a solver that needs no data: "round", "clip" or "hqq".'
            )
        rounded = encode(w, codec=codec)
        output = energy(w, hessian)
        rounded_info = errors(w, codec, rounded, hessian, output=output)
        info = {"rounding_output_error": rounded_info["output_error"]}
        info["dead"] = float(jnp.sum(jnp.diagonal(hessian) <= 0))

        factor, damping = self._factor(hessian)
        info["damping"] = damping
        if factor is None:
            reason = "no damping up to 1 made the hessian positive definite"
            return Solved(rounded, rounded_info | info | {"fallback": "round", "reason": reason})

        parts = _solve(
            w,
            hessian,
            *factor,
            damping,
            codec=codec,
            act_order=self.act_order,
            block=self.block,
            clip=self.clip,
        )
        info |= errors(w, codec, parts, hessian, output=output)
        if not float(info["output_error"]) <= float(rounded_info["output_error"]):
            reason = "rounding has the smaller output error"
            return Solved(rounded, info | rounded_info | {"fallback": "round", "reason": reason})
        return Solved(parts, info)

    def _factor(self, hessian: jax.Array) -> tuple[tuple[jax.Array, jax.Array] | None, float]:
        """The order of the columns and their couplings, with the damping that made them finite."""
        damping = self.damping
        while True:
            order, couplings = _factorise(hessian, damping, act_order=self.act_order)
            if bool(jnp.all(jnp.isfinite(couplings))):
                return (order, couplings), damping
            if damping >= 1:
                return None, damping
            damping = min(2 * damping, 1.0)


def gptq(
    calibration: Sequence[tuple[Any, ...]] = (),
    *,
    act_order: bool = True,
    damping: float = 0.05,
    block: int = 128,
    clip: ClipSearch | None = CLIP,
) -> GPTQ:
    """Rounds with the help of calibration data, so that the layer's output changes least.

    Args:
      calibration: tuples of arguments to run the function on; who runs it hands `solve` the
        hessian.
      act_order: columns with the largest inputs first, with all groups fitted on the given weight;
        False goes from left to right and fits each group when it comes to it, on weights that
        already make up for earlier errors (for codecs with one scale for more than a group of a
        row that is not possible, and groups are fitted on the given weight).
      damping: added to the hessian's diagonal, as a fraction of its mean; in (0, 1].
      block: columns that are processed together; changes speed only.
      clip: how each group's range is searched, weighted by `diag(H)`; None fits the full range.
    """
    return GPTQ(tuple(calibration), act_order, damping, block, clip)


@functools.partial(jax.jit, static_argnames="act_order")
def _factorise(
    hessian: jax.Array, damping: float, *, act_order: bool
) -> tuple[jax.Array, jax.Array]:
    """The order of the columns and `couplings[i, j] = R_ji / R_ii` for `j < i`, 0 elsewhere."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    hessian = hessian + jnp.diag(jnp.where(dead, mean, damping * mean))

    order = jnp.argsort(-diagonal) if act_order else jnp.arange(len(diagonal))
    # Cholesky gives a lower factor; of the reversed matrix it is the upper one, reversed.
    reverse = order[::-1]
    lower = jnp.linalg.cholesky(hessian[reverse][:, reverse])
    couplings = (lower / jnp.diagonal(lower)).T[::-1, ::-1]
    return order, jnp.tril(couplings, -1)


@functools.partial(jax.jit, static_argnames=("codec", "act_order", "block", "clip"))
def _solve(
    w: jax.Array,
    hessian: jax.Array,
    order: jax.Array,
    couplings: jax.Array,
    damping: float,
    *,
    codec: GroupCodec,
    act_order: bool,
    block: int,
    clip: ClipSearch | None,
) -> Parts:
    length = w.shape[-1]
    diagonal = jnp.diagonal(hessian)
    weights = group_weights(length, codec, diagonal + damping * jnp.mean(diagonal))
    if act_order or _is_shared(codec, length):
        params = _fit(codec.split(w), weights, codec, clip)
        codes = _round_static(w[:, order], couplings, order, params, codec, block)
        codes = jnp.zeros_like(codes).at[:, order].set(codes)
    else:
        codes, params = _round_in_order(w, couplings, weights, codec, clip)
    return codec.assemble(codes, params)


def _is_shared(codec: GroupCodec, length: int) -> bool:
    """Whether fitting one group of a row needs more than that group."""
    groups = jax.ShapeDtypeStruct((2, 2, codec.group_size(length)), jnp.float32)
    params = jax.eval_shape(codec.fit, groups).values()
    return any(1 in value.shape[:-1] for value in params)


def _fit(groups: jax.Array, weights: jax.Array, codec: GroupCodec, clip: ClipSearch | None):
    if clip is None:
        return codec.fit(groups)
    return fit_clipped(groups, weights, codec, clip)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)  # not the GPU's 10 bits


def _round_static(
    w: jax.Array,
    couplings: jax.Array,
    order: jax.Array,
    params: Params,
    codec: GroupCodec,
    block: int,
) -> jax.Array:
    """The codes of `w`, its columns (and `couplings`) in `order`; the groups are fitted already."""
    length = w.shape[-1]
    group_of = order // codec.group_size(length)

    def take_params(_given, _owed, _inside, group_of):
        # [rows or 1, n_groups or 1, 1] -> [block, rows or 1]
        columns = {
            name: p[:, jnp.minimum(group_of, p.shape[1] - 1), 0].T for name, p in params.items()
        }
        return columns, ()

    codes, _ = _round_blocks(w, couplings, group_of, take_params, codec, min(block, length))
    return codes


def _round_in_order(
    w: jax.Array,
    couplings: jax.Array,
    weights: jax.Array,
    codec: GroupCodec,
    clip: ClipSearch | None,
) -> tuple[jax.Array, Params]:
    """Codes and parameters; a block is a group, fitted on what its columns have become."""
    group = codec.group_size(w.shape[-1])

    def fit_block(given, owed, inside, weights):
        # What the columns would become if none of the group were rounded: each makes up for its
        # share of the earlier errors, and so leaves less to the columns right of it.
        shift = jax.scipy.linalg.solve_triangular(
            inside + jnp.eye(group), owed, lower=True, unit_diagonal=True
        )
        columns = given + shift
        params = _fit(columns.T[:, None, :], weights[None, None], codec, clip)
        spread = {n: jnp.broadcast_to(p[:, 0, 0], (group, len(p))) for n, p in params.items()}
        return spread, params

    codes, params = _round_blocks(w, couplings, weights.reshape(-1), fit_block, codec, group)
    return codes, jax.tree.map(lambda p: jnp.moveaxis(p, 0, 1)[:, :, 0], params)


def _round_blocks(w, couplings, extra, fit_block, codec: GroupCodec, block: int):
    """Rounds `w` block by block, each error passed on to the columns right of it.

    Works on columns as rows of the transposed weight, so that one column is contiguous.

    Args:
      w: `f32[rows, length]`.
      couplings: `f32[length, length]`, strictly lower: what column `i` takes of the error of `j`.
      extra: `[length]`, cut into blocks for `fit_block`.
      fit_block: from a block's given columns `f32[block, rows]`, what earlier blocks make them
        take over, the couplings inside the block and its `extra`: params `[block, rows]` each, and
        what to keep of the block.

    Returns:
      `uint8[rows, length]` codes, and `kept` of all blocks, stacked.
    """
    rows, length = w.shape
    pad = -length % block
    w = jnp.pad(w.T, ((0, pad), (0, 0)))
    couplings = jnp.pad(couplings, ((0, pad), (0, pad)))
    extra = jnp.pad(extra[:length], (0, pad))
    starts = jnp.arange(0, length + pad, block)

    def round_block(error, xs):
        start, given, couplings, extra = xs
        owed = _matmul(couplings, error)
        inside = jax.lax.dynamic_slice_in_dim(couplings, start, block, axis=1)
        params, kept = fit_block(given, owed, inside, extra)

        def round_column(error, xs):
            i, given, owed, coupling, params = xs
            codes = codec.codes(given + owed + _matmul(coupling, error), params)
            error = error.at[i].set(given - codec.values(codes, params))
            return error, codes

        xs = (jnp.arange(block), given, owed, inside, params)
        inner, codes = jax.lax.scan(round_column, jnp.zeros_like(given), xs)
        return jax.lax.dynamic_update_slice_in_dim(error, inner, start, axis=0), (codes, kept)

    xs = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (w, couplings, extra))
    _, (codes, kept) = jax.lax.scan(round_block, jnp.zeros_like(w), (starts, *xs))
    return codes.reshape(-1, rows)[:length].T, kept
