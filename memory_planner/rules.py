"""Constants of the fusion and buffer rules, by backend and by the version of jax that brings the compiler."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What `fusion` and `liveness` are told of a compiler.

    Attributes:
      source: what they were fitted on.
      median_error, worst_error: of peaks against the compiler's, as shares; None where they were not compared.
      duplicate_inputs: a value is computed again in every user while that reads at most so many large arrays.
      large_fraction: an operand counts as large from this fraction of the value's bytes on.
      softmax_row: rows up to so many elements are exponentiated and summed at once, the exponentials written.
      softmax_product_tile: where rows times the longest other axis take up to so many bytes, this is done together
        with the product before, which then is not written.
      rounds_products: what only matrix products read is written in their dtype, float32 as bfloat16.
      hoists_casts: casts of stacks that a scan slices are made before it, if they make them narrower.
      products_read: what a matrix product reads is written; nothing is fused into its operands.
      copies_slices: a slice of a stack that a product reads is copied, early in the body.
      fuses_norms: a reduction and what follows it elementwise are one kernel, which can't overwrite what it reads.
      reuses_outputs: temporaries lie in results that are not written yet.
      by_outputs: the program too runs in the order in which results need it, as bodies of loops do; products of
        loops, and everything beside transfers, strictly.
      joins_batches: an argument is copied where a product reads it whose batch axes are not next to each other.
      fuses: whether operations are fused at all, and buffers reused in place.
      reorders: whether an operation that frees memory runs as soon as it can.
    """

    source: str
    median_error: float | None = None
    worst_error: float | None = None
    duplicate_inputs: int = 0
    large_fraction: float = 0.25
    softmax_row: int = 0
    softmax_product_tile: int = 0
    rounds_products: bool = False
    hoists_casts: bool = True
    products_read: bool = False
    copies_slices: bool = False
    fuses_norms: bool = False
    reuses_outputs: bool = False
    by_outputs: bool = False
    joins_batches: bool = False
    fuses: bool = True
    reorders: bool = True

    @property
    def accuracy(self) -> str:
        """How far off predictions by these rules are, in words."""
        if self.median_error is None or self.worst_error is None:
            return "never compared with the compiler"
        return f"off by {self.median_error:.0%} in the median, {self.worst_error:.0%} at most"


# Plain liveness: every result is written where the program has it, and freed after its last use.
PLAIN = Rules(source="no compiler: every result is written, in program order", fuses=False, reorders=False)  # fmt: skip


def rules_for(backend: str, version: str = jax.__version__) -> Rules:
    """The constants of a backend: those of the newest known version that isn't newer than `version`.

    Args:
      backend: `tpu`, `gpu` or `cpu`.
      version: of jax.

    Raises:
      ValueError: there are none for this backend.
    """
    table = _table()
    if backend not in table:
        raise ValueError(f"`backend` is {backend!r}; there are rules for {', '.join(table)}.")
    known = sorted(table[backend], key=_numbers)
    fit = [v for v in known if _numbers(v) <= _numbers(version)] or known[:1]
    return Rules(**table[backend][fit[-1]])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@functools.cache
def _table() -> dict[str, dict[str, dict]]:
    return json.loads(resources.files(__package__).joinpath("rules.json").read_text())
