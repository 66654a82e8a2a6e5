"""New rows of a cache: encoded, and written where they belong, in place.

Letters: ``B`` batch, ``K`` heads of the cache, ``S`` tokens that it has room for, ``T`` new tokens, ``H`` elements of a
row, ``R`` newest rows that are kept in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..checks import check_implementation
from . import dispatch
from .dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from .dispatch import append_kernel as append_kernel
from .kept import Kept as Kept
from .xla import entry_of as entry_of
from .xla import entry_put as entry_put
from .xla import write_recent as write_recent
from .xla import write_rows as write_rows
from .xla import write_sinks as write_sinks
from .xla import write_tokens as write_tokens


def append(
    streams: Sequence[Kept],
    new: Sequence[jax.Array],
    at: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    *,
    length: int | None = None,
    how: str = "any",
    entry: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[tuple[Kept, ...], jax.Array, jax.Array]:
    """The cache after new rows: quantized and appended, on a GPU one token's by one kernel, for all heads and streams.

    Rows are written through: into the packed ones (of a codec that encodes tokens in blocks, the block that a row
    belongs to is encoded again, with what is there in full in its place), into the sinks where they are such, and into
    the ring of recent ones. Under `jax.jit` with the cache donated, buffers are written in place.

    Args:
      streams: what is kept, keys and values for example. All have the same B, K, S and R.
      new: rows for each stream, ``[B, K, T, H]``, of the dtype of `recent`.
      at: their positions, ``int32[B, T]``; S or more for rows to drop.
      labels: positions of the recent rows, ``int32[B, R]``, -1 where there is none.
      count: rows that came before, ``int32[B]``; the next is written to slot ``count % R`` of the ring.
      length: positions that there are, where S is rounded up to whole blocks; None for S.
      how: "run" for consecutive positions within `length`, else "any".
      entry: where the buffers of `streams` are a stack (layers), with an axis more in front: the one that the rows are
        for, ``int32[]``, clipped to the stack. The others stay, and nothing of them is read. `labels` and `count` are
        of that one.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has for these shapes.

    Returns:
      `streams`, `labels` and `count` afterwards.

    Raises:
      ValueError: for shapes that do not fit, or an unknown `how` or `implementation`.
      NotImplementedError: where the named implementation can't take these operands, with the reason.
    """
    if len(streams) != len(new) or not streams:
        raise ValueError(
            f"`streams` are {len(streams)} and `new` {len(new)}; expected one or more of each"
        )
    one = streams if entry is None else jax.eval_shape(entry_of, streams, entry)
    b, k, s, _ = one[0].rows.shape
    if at.ndim != 2 or at.shape[0] != b:
        raise ValueError(f"`at` is {at.dtype}{list(at.shape)}; expected int32[{b}, T]")
    if labels.ndim != 2 or labels.shape[0] != b or count.shape != (b,):
        raise ValueError(
            f"`labels` is {list(labels.shape)} and `count` {list(count.shape)}; expected [{b}, R] and [{b}]"
        )
    for i, (stream, x) in enumerate(zip(one, new)):
        h, t, r = stream.rows.width, at.shape[1], labels.shape[1]
        want = (b, k, s, h), (b, k, stream.sinks.shape[2], h), (b, k, r, h), (b, k, t, h)
        have = stream.rows.shape, stream.sinks.shape, stream.recent.shape, x.shape
        if have != want:
            raise ValueError(f"stream {i}: rows, sinks, recent and new are {have}; expected {want}")
    if how not in ("run", "any"):
        raise ValueError(f"`how` is {how!r}; expected 'run' or 'any'")
    check_implementation(implementation, IMPLEMENTATIONS)
    at, labels, count = (x.astype(jnp.int32) for x in (at, labels, count))
    options = {"length": s if length is None else length, "how": how}
    operands = tuple(streams), tuple(new), at, labels, count, entry
    return dispatch.run(operands, options, implementation)
