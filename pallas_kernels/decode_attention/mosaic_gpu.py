"""Decode attention on Hopper over rows that are packed token by token.

A block takes one head of the cache and a part of its tokens; its warpgroups take tiles of 64 tokens in turn. Scores are
``keys @ q.T`` with the keys as the register operand (`hopper.expand`), so a column is a query head, and the heads that
share a cache are read for once. Weights go through shared memory, and ``values.T @ weights`` has the values as the
register operand, transposed on the way in (`hopper.expand_transposed`). Blocks give a partial output, maximum and sum,
which XLA joins, with the attention to rows that are kept in full.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..codecs import PerToken
from ..codecs.integer import Int
from ..codecs.rows import hadamard
from ..hopper import ROWS
from . import full as rest
from .reference import by_head
from .rows import FullRows, Rows

LOG2E = math.log2(math.e)
NEVER = -1e30  # a score that is not seen


@dataclasses.dataclass(frozen=True)
class Config:
    """How an attention is cut into blocks.

    Attributes:
      warpgroups: of a block; each has a ring of its own.
      stages: tiles in flight.
      blocks: at least so many, where there are tokens enough.
    """

    warpgroups: int = 2
    stages: int = 2
    blocks: int = 264


def refusal(q: Any, keys: Rows, values: Rows) -> str:
    """Why this kernel can't take them; "" where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if keys.tokens % ROWS:
        return f"S = {keys.tokens} is no multiple of {ROWS}"
    if q.shape[1] // keys.heads > 64:
        return f"{q.shape[1] // keys.heads} query heads share a head of the cache"
    for name, rows in (("keys", keys), ("values", values)):
        if reason := _refusal(rows):
            return f"{name}: {reason}"
    return ""


def _refusal(rows: Rows) -> str:
    codec = rows.codec
    if not isinstance(codec, PerToken) or not isinstance(codec.codec, Int):
        return f"no kernel for {codec.name}"
    plan = hopper.plan_of(codec.codec) if codec.codec.bits > 1 else None
    row_bytes = rows.width * codec.codec.bits // 8
    if plan is None or plan.streams > 1 or row_bytes not in (64, 128):
        return f"rows of {rows.width} elements in {codec.name} are {row_bytes} bytes, not 64 or 128"
    return hopper.refusal(codec.codec, rows.width)


def decode_attention(
    q: jax.Array,
    keys: Rows,
    values: Rows,
    lengths: jax.Array,
    seen: jax.Array | None = None,
    full: FullRows | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `decode_attention`."""
    b, n, h = q.shape
    heads, tokens = keys.heads, keys.tokens
    group = n // heads
    dtype = jnp.dtype(jnp.bfloat16) if q.dtype == jnp.float32 else q.dtype
    k, v = _Stream.of(keys), _Stream.of(values)
    x = q.astype(jnp.float32)
    x = hadamard(x) if keys.codec.rotate else x  # pyright: ignore
    x = x.reshape(b * heads, group, h) * (scale * (1 if soft_cap else LOG2E))
    width = -(-group // 8) * 8
    x = jnp.pad(x, ((0, 0), (0, width - group), (0, 0))).astype(dtype)
    x = x.reshape(b * heads, width, k.plan.pieces, -1).swapaxes(1, 2)
    x = hopper.permute_columns(x).reshape(b * heads * k.plan.pieces, width, -1)
    problem = _Problem(
        config or Config(), k, v, heads, tokens, group, width, dtype, soft_cap,
        0 if seen is None else by_head(seen).shape[1], interpret,
    )  # fmt: skip
    first, stop = _bounds(lengths, tokens, window, seen)
    bounds = jnp.stack(jnp.broadcast_arrays(first, stop), axis=-1)
    bounds = jnp.broadcast_to(bounds, (b, heads, 2)).reshape(-1, 2)
    masks = [] if seen is None else [_words(by_head(seen))]
    parts, logs = problem(x, bounds, masks, k.arrays(keys), v.arrays(values))
    parts = parts.swapaxes(1, 2).reshape(b, heads, group, -1, h)
    logs = jnp.where(logs <= NEVER, -jnp.inf, logs / LOG2E).reshape(b, heads, group, -1)
    out, total = rest.join(parts, logs)
    out = hadamard(out) if values.codec.rotate else out  # pyright: ignore
    if full is not None:
        more = rest.attend(q, full, scale=scale, soft_cap=soft_cap)
        out, total = rest.join(jnp.stack([out, more[0]], -2), jnp.stack([total, more[1]], -1))
    return out.reshape(b, n, h).astype(q.dtype), total.reshape(b, n)


def _bounds(
    lengths: jax.Array, tokens: int, window: int | None, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The first token that is seen and the end of those: ``int32[B, 1 or K]``."""
    stop = jnp.clip(lengths.astype(jnp.int32), 0, tokens)[:, None]
    first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
    if seen is None:
        return first, stop
    at = jnp.arange(tokens, dtype=jnp.int32)
    seen = by_head(seen)
    last = jnp.where(seen, at + 1, 0).max(-1)
    return jnp.maximum(first, jnp.where(seen, at, tokens).min(-1)), jnp.minimum(stop, last)


def _words(seen: jax.Array) -> jax.Array:
    """``bool[B, K, S]`` as bits: ``int32[B K, S / 32]``, the first token lowest."""
    b, k, s = seen.shape
    bits = seen.reshape(b * k, s // 32, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
    return bits.sum(-1, dtype=jnp.uint32).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Keys or values: how their rows are taken apart, and sizes.

    Attributes:
      row_bytes: of codes.
      group, groups: elements that a scale covers, and scales of a row.
      width: elements of a row.
    """

    plan: hopper.Plan
    row_bytes: int
    group: int
    groups: int
    width: int

    @classmethod
    def of(cls, rows: Rows) -> _Stream:
        codec: Any = rows.codec.codec  # pyright: ignore[reportAttributeAccessIssue]
        groups = rows.parts["scale"].shape[-1]
        row_bytes = rows.parts["codes"].shape[-1]
        return cls(hopper.plan_of(codec), row_bytes, codec.group or rows.width, groups, rows.width)

    @property
    def tiles(self) -> int:
        """64 elements of a row each."""
        return self.width // ROWS

    @property
    def piece(self) -> int:
        return self.width // self.plan.pieces

    def arrays(self, rows: Rows) -> list[jax.Array]:
        """Codes ``[B K S, row_bytes]`` and flat tables."""
        codes = rows.parts["codes"].reshape(-1, self.row_bytes)
        return [codes, *(rows.parts[name].reshape(-1) for name in self.plan.tables)]

    def scratch(self, ring: tuple[int, int], dtypes: list[Any]) -> list[Any]:
        tile = plgpu.SMEM(
            (*ring, ROWS, self.row_bytes),
            jnp.uint8,
            transforms=hopper.tiled(jnp.uint8, self.row_bytes),
        )
        return [tile, *(plgpu.SMEM((*ring, ROWS * self.groups), d) for d in dtypes)]


@dataclasses.dataclass(frozen=True)
class _Problem:
    config: Config
    keys: _Stream
    values: _Stream
    heads: int
    tokens: int
    group: int
    width: int
    dtype: Any
    soft_cap: float | None
    masks: int
    interpret: bool

    def parts(self, rows: int) -> int:
        """Blocks that share the tokens of a head, where there are `rows` heads."""
        tiles = self.tokens // ROWS
        wanted = -(-self.config.blocks // rows)
        return max(1, min(wanted, tiles // self.config.warpgroups))

    def __call__(
        self,
        q: jax.Array,
        bounds: jax.Array,
        masks: list[jax.Array],
        keys: list[jax.Array],
        values: list[jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        c, rows = self.config, bounds.shape[0]
        parts = self.parts(rows)
        ring = (c.warpgroups, c.stages)
        dtypes = lambda arrays: [x.dtype for x in arrays[1:]]
        count = len(keys) + len(values)
        wg = c.warpgroups
        scratch: dict[str, Any] = {
            "q": plgpu.SMEM(
                (self.keys.plan.pieces, self.width, self.keys.piece),
                self.dtype,
                transforms=hopper.tiled(self.dtype),
            ),
            "keys": self.keys.scratch(ring, dtypes(keys)),
            "values": self.values.scratch(ring, dtypes(values)),
            "weights": plgpu.SMEM(
                (wg, self.width, ROWS), self.dtype, transforms=hopper.tiled(self.dtype)
            ),
            "scales": plgpu.SMEM((wg, self.values.groups * ROWS), self.dtype),
            "warps": plgpu.SMEM((wg, 4, self.width), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=count, num_barriers=wg * c.stages),
            "ready": plgpu.Barrier(num_arrivals=1),
        }
        if self.interpret:
            scratch["staged"] = plgpu.SMEM((wg, ROWS, ROWS), self.dtype)
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        n = parts * wg
        kernel = plgpu.kernel(
            _Body(self, parts, len(masks), len(keys)),
            out_type=[f32(rows * n * self.group, self.values.width), f32(rows * self.group, n)],
            grid=(rows, parts),
            grid_names=("head", "part"),
            num_threads=wg,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )  # fmt: skip
        x, logs = kernel(q, bounds, *masks, *keys, *values)
        return x.reshape(rows, n, self.group, -1), logs.reshape(rows, self.group, n)


class _Body:
    """The kernel's body, for one warpgroup."""

    def __init__(self, problem: _Problem, parts: int, masks: int, keys: int):
        self.problem, self.parts, self.masks, self.keys = problem, parts, masks, keys

    def __call__(self, *refs: Any, **scratch: Any) -> None:
        p, c, interpret = self.problem, self.problem.config, self.problem.interpret
        q, bounds, *arrays, out, logs = refs
        masks, arrays = arrays[: self.masks], arrays[self.masks :]
        keys, values = arrays[: self.keys], arrays[self.keys :]
        wg, head, part = (lax.axis_index(a) for a in ("wg", "head", "part"))
        k, v = p.keys, p.values
        low, high = bounds[head, 0], bounds[head, 1]
        first, last = lax.div(low, ROWS), lax.div(high + ROWS - 1, ROWS)
        share = lax.div(last - first + self.parts - 1, self.parts)
        start = first + part * share  # tiles of this block
        stop = jnp.minimum(start + share, last)
        mine = jnp.maximum(0, lax.div(stop - start - wg + c.warpgroups - 1, c.warpgroups))
        tile = lambda i: start + wg + i * c.warpgroups

        @pl.when(wg == 0)
        def _() -> None:
            pieces = pl.ds(head * k.plan.pieces, k.plan.pieces)
            plgpu.copy_gmem_to_smem(q.at[pieces], scratch["q"], scratch["ready"])

        def fetch(i: Any) -> None:
            slot = lax.rem(i, c.stages)
            row = head * p.tokens + tile(i) * ROWS
            full = scratch["full"].at[wg * c.stages + slot]
            for stream, from_, to in ((k, keys, "keys"), (v, values, "values")):
                codes, *tables = from_
                plgpu.copy_gmem_to_smem(
                    codes.at[pl.ds(row, ROWS), :], scratch[to][0].at[wg, slot], full
                )
                for j, table in enumerate(tables):
                    plgpu.copy_gmem_to_smem(
                        table.at[pl.ds(row * stream.groups, ROWS * stream.groups)],
                        scratch[to][1 + j].at[wg, slot],
                        full,
                    )

        for i in range(c.stages):
            pl.when(i < mine)(lambda i=i: fetch(jnp.int32(i)))
        plgpu.barrier_wait(scratch["ready"])
        shape = (ROWS, p.width)
        constant = lambda x: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), hopper.WGMMA)

        staged = scratch["staged"].at[wg] if interpret else None

        def scores(i: Any, slot: Any) -> jax.Array:
            codes, *tables = (ref.at[wg, slot] for ref in scratch["keys"])
            whole = hopper.is_whole(k.group, k.piece, k.row_bytes, k.groups)
            terms = []
            for piece in range(k.plan.pieces):
                load = lambda t, at=piece * k.piece: hopper.load_table(
                    t, k.groups, jnp.int32(0), jnp.int32(at), k.group, whole, interpret
                )
                terms.append(hopper.terms_of(k.plan, [load(t) for t in tables], p.dtype))

            def scope(acc: Any) -> jax.Array:
                for half in range(k.row_bytes // 64):
                    made = hopper.expand(
                        [codes], half, terms, k.plan,
                        dtype=p.dtype, row_bytes=k.row_bytes, interpret=interpret,
                    )  # fmt: skip
                    for piece, a in enumerate(made):
                        hopper.mma(
                            acc, a, scratch["q"].at[piece, :, pl.ds(64 * half, 64)].T, staged
                        )
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

        def weights(i: Any, slot: Any, top: jax.Array) -> tuple[jax.Array, ...]:
            x = scores(i, slot)
            if p.soft_cap is not None:
                x = (p.soft_cap * LOG2E) * jnp.tanh(x * (1 / p.soft_cap))
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=hopper.WGMMA)
            token = tile(i) * ROWS + row
            inside = (token >= low) & (token < high)
            for mask in masks:
                of = head if p.masks == p.heads else lax.div(head, p.heads)
                words = [mask[of, 2 * tile(i) + half] for half in range(2)]
                word = jnp.where(row < 32, words[0], words[1])
                inside &= ((word >> (row & 31)) & 1) != 0
            x = jnp.where(inside, x, NEVER)
            found = hopper.over_rows("max", x, scratch["warps"].at[wg], interpret)
            best = jnp.maximum(top, found)
            y = jnp.exp2(x - best).astype(p.dtype).astype(jnp.float32)
            return best, jnp.exp2(top - best), y

        def zeros(slot: Any) -> list[jax.Array]:
            """Scale times zero of each group of the tile's values."""
            scale, zero = (ref.at[wg, slot] for ref in scratch["values"][1:])
            shift = hopper.zero_shift(v.plan, p.dtype)
            out = []
            for group in range(v.groups):
                s, z = (
                    hopper.load_table(
                        t, v.groups, jnp.int32(0), jnp.int32(group * v.group), v.group, True, interpret
                    ).astype(jnp.float32)
                    for t in (scale, zero)
                )  # fmt: skip
                out.append(s * (z - shift))
            return out

        def rezeroed(outs: list[jax.Array], rests: list[jax.Array]) -> list[jax.Array]:
            """Results less what the zeros of the values' groups add up to."""
            if not rests:
                return outs
            warp = lax.div(
                plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=hopper.WGMMA), jnp.int32(16)
            )
            found = []
            for j, x in enumerate(outs):
                start = (j % v.plan.pieces) * v.piece + 64 * (j // v.plan.pieces)
                owners = [(start + 16 * w) // v.group for w in range(4)]
                for group in sorted(set(owners)):
                    mine = [w for w in range(4) if owners[w] == group]
                    own = (warp >= mine[0]) & (warp <= mine[-1])
                    x = x - (rests[group] if len(mine) == 4 else jnp.where(own, rests[group], 0.0))
                found.append(x)
            return found

        def step(i: Any, carry: Any) -> Any:
            top, total, outs, rests = carry
            slot = lax.rem(i, c.stages)
            plgpu.barrier_wait(scratch["full"].at[wg * c.stages + slot])
            best, old, y = weights(i, slot, top)
            hopper.store_weights(scratch["weights"].at[wg], y, interpret)
            codes, table = (ref.at[wg, slot] for ref in scratch["values"][:2])
            hopper.spread_scales(scratch["scales"].at[wg], table, v.groups, interpret)
            if not interpret:
                plgpu.commit_smem()
            if v.plan.has_zero:
                rests = [
                    hopper.scale_rows(r * old, y, s, interpret) for r, s in zip(rests, zeros(slot))
                ]

            def scope(*accs: Any) -> list[jax.Array]:
                made = hopper.expand_transposed(
                    codes, scratch["scales"].at[wg], v.plan,
                    group=v.group, dtype=p.dtype, row_bytes=v.row_bytes, interpret=interpret,
                )  # fmt: skip
                for acc, a in zip(accs, made):
                    hopper.mma(acc, a, scratch["weights"].at[wg].T, staged)
                plgpu.wgmma_wait(0)
                return [acc[...] for acc in accs]

            found = pl.run_scoped(scope, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * v.tiles)
            hopper.sync(interpret)
            pl.when(i + c.stages < mine)(lambda: fetch(i + c.stages))
            outs = [o * old + x for o, x in zip(outs, found)]
            return best, total * old + y, outs, rests

        zero = [constant(0.0) for _ in range(v.tiles)]
        rests = [constant(0.0) for _ in range(v.groups if v.plan.has_zero else 0)]
        carry = (constant(NEVER), constant(0.0), zero, rests)
        top, total, outs, rests = lax.fori_loop(0, mine, step, carry)
        row = (head * self.parts + part) * c.warpgroups + wg
        sums = scratch["warps"].at[wg]

        def summed(x: jax.Array) -> jax.Array:
            hopper.sync(interpret)
            return hopper.over_rows("sum", x, sums, interpret)

        total = summed(total)
        share = jnp.where(total == 0, 0.0, 1 / total)
        for j, x in enumerate(rezeroed(outs, list(map(summed, rests)))):
            piece, chunk = j % v.plan.pieces, j // v.plan.pieces
            hopper.store_transposed(
                out, x * share, row * p.group, jnp.int32(piece * v.piece + 64 * chunk),
                row * p.group + p.group, interpret, paired=True, rows=p.group,
            )  # fmt: skip
        found = jnp.where(total == 0, NEVER, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
        part = lax.rem(row, self.parts * c.warpgroups)
        hopper.store_first(logs, found, head * p.group, part, p.group, interpret)
