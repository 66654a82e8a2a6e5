"""Bytes of a compiled program, and true bytes of a pytree.

XLA knows what a compiled program needs before it runs. `memory_report` puts its figures into one
record, `tree_nbytes` counts what the buffers of a pytree hold, with sub-byte types packed.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory of one compiled program, on one device, in bytes.

    Attributes:
      arguments: buffers that the caller passes in.
      outputs: buffers that the program returns; those that reuse an argument are counted here too.
      aliased: the part of `outputs` that lies in donated arguments.
      temporaries: buffers that live only while the program runs.
      host: what lies in host memory instead: arguments + outputs - aliased + temporaries there.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    host: int

    @property
    def peak(self) -> int:
        """Device bytes needed at once: arguments + outputs - aliased + temporaries.

        Temporaries are XLA's arena after buffers with disjoint lifespans share space, so this is
        the size of what is allocated. XLA's own `peak_memory_in_bytes` isn't used: on the CPU it
        can be smaller than the temporaries alone.
        """
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def __str__(self) -> str:
        rows = dataclasses.asdict(self) | {"peak": self.peak}
        width = max(len(format_bytes(value)) for value in rows.values())
        return "\n".join(
            f"{name:<11}  {format_bytes(value):>{width}}" for name, value in rows.items()
        )


def memory_report(compiled: jax.stages.Compiled) -> MemoryReport:
    """Reads XLA's memory analysis of a compiled program.

    Args:
      compiled: what `jax.jit(fn).lower(*args).compile()` returns.

    Returns:
      The bytes by kind. For a program over several devices they are those of one device.

    Raises:
      ValueError: `compiled` isn't a compiled program, or its backend gives no analysis.
    """
    if not hasattr(compiled, "memory_analysis"):
        raise ValueError(
            f"`compiled` is a {type(compiled).__name__}, expected a compiled program: "
            "pass `jax.jit(fn).lower(*args).compile()`."
        )
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("`compiled` has no memory analysis: its backend doesn't offer one.")
    return MemoryReport(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=_temporaries(stats),
        host=stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes,
    )


def live_peak(compiled: jax.stages.Compiled) -> int:
    """The most device bytes that XLA has alive at once, arguments and outputs included.

    `MemoryReport.peak` is what it allocates: this and the gaps that its packing leaves. Compilers that don't say it
    are taken to leave none.

    Args:
      compiled: what `jax.jit(fn).lower(*args).compile()` returns.
    """
    report = memory_report(compiled)
    stats: Any = compiled.memory_analysis()
    given = report.peak - report.temporaries
    alive = getattr(stats, "peak_memory_in_bytes", 0)
    return alive if given < alive <= report.peak else report.peak


def _temporaries(stats: Any) -> int:
    """What is allocated beyond arguments, outputs and code.

    The TPU compiler's `temp_size_in_bytes` is more than that: programs compile whose arguments and `temp` together
    exceed the memory of the chip.
    """
    temporaries = stats.temp_size_in_bytes
    if total := getattr(stats, "total_allocation_bytes", 0):
        beyond = total - stats.indefinite_allocations - stats.generated_code_size_in_bytes
        temporaries = min(temporaries, max(beyond, 0))
    return temporaries


def tree_nbytes(tree: Any) -> int:
    """True bytes of the arrays in a pytree, each leaf rounded up to whole bytes.

    Sub-byte types count packed: 10 elements of int4 are 5 bytes, where `jax.Array.nbytes` says 10.
    A buffer that occurs twice in the tree counts twice. Random keys count as their data.

    Args:
      tree: pytree of arrays (jax, numpy) or `jax.ShapeDtypeStruct`s; a Python number counts as the
        array that jax would make of it.

    Raises:
      ValueError: leaves that have no shape and dtype, all named by their path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    odd = [
        f"{jax.tree_util.keystr(path) or 'the tree itself'}: {type(leaf).__name__}"
        for path, leaf in leaves
        if not _is_array(leaf)
    ]
    if odd:
        raise ValueError(
            f"`tree` has leaves that aren't arrays ({'; '.join(odd)}); expected arrays or "
            "jax.ShapeDtypeStruct: take the other leaves out first."
        )
    return sum(_nbytes(leaf) for _, leaf in leaves)


def format_bytes(count: int) -> str:
    """`count` bytes in the largest unit that keeps it at 1 or above: `1536` -> `1.50 KiB`."""
    power = min(max(abs(count).bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count} B" if power == 0 else f"{count / 1024**power:,.2f} {_UNITS[power]}"


def parse_bytes(size: int | str, name: str) -> int:
    """Bytes of a size: a number, or a text such as "8GiB", "512 MB", "1.5TiB".

    Args:
      name: of the argument, for the error.

    Raises:
      ValueError: it is neither, or negative.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*", size)
        if isinstance(size, str)
        else None
    )
    if match is None:
        raise ValueError(
            f'`{name}` is {size!r}; expected bytes, as a number or as "8GiB" or "512MB"'
        )
    number, prefix, binary = match.groups()
    power = "kMGT".index(prefix.replace("K", "k")) + 1 if prefix else 0
    return round(float(number) * (1024 if binary else 1000) ** power)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def _nbytes(leaf: Any) -> int:
    shape, dtype = jnp.shape(leaf), getattr(leaf, "dtype", None)
    if dtype is None:
        dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return math.prod(shape) * dtype.itemsize
    return -(-math.prod(shape) * _bits(dtype) // 8)


def _bits(dtype: Any) -> int:
    """Bits of one element as it is stored: a bool takes a whole byte."""
    if dtype == jnp.bool_:
        return 8
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * jnp.dtype(dtype).itemsize
