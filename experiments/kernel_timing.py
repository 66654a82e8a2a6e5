"""Times of GPU kernels: by the profiler, over operands that do not fit in the cache, and chained in a program."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

ROTATE_BYTES = 250e6  # of operands, in turn: five times the L2 cache of an H100


def copies(nbytes: int) -> int:
    """How many sets of operands of `nbytes` to rotate over."""
    return max(2, int(ROTATE_BYTES / nbytes) + 1)


def kernel_us(f: Callable[..., Any], x: Any, sets: Sequence[Any], iterations: int = 3) -> float:
    """Microseconds on the device of ``f(x, s)``: `kernels_us`, added up."""
    return sum(kernels_us(f, x, sets, iterations).values())


def kernels_us(
    f: Callable[..., Any], x: Any, sets: Sequence[Any], iterations: int = 3
) -> dict[str, float]:
    """Microseconds on the device of ``f(x, s)`` by kernel: the median over `sets`, times how often a call runs it.

    Raises:
      RuntimeError: where there is no NVIDIA GPU to be asked.
    """
    from jax.experimental.mosaic.gpu import profiler

    f = jax.jit(f)
    alone = profiler.measure(f, aggregate=False, iterations=iterations)(x, sets[0])[1]
    if not alone:
        raise RuntimeError("the profiler saw no kernel: this needs an NVIDIA GPU")
    every = jax.jit(lambda x, sets: [f(x, s) for s in sets])
    found = profiler.measure(every, aggregate=False, iterations=iterations)(x, list(sets))[1]
    by_name = lambda runs: _grouped([pair for run in runs for pair in run])
    rotated, once = by_name(found), by_name(alone)
    # a kernel that only the first call needs (a cast of x) is the same for all sets
    return {
        name: 1e3 * len(times) / iterations * statistics.median(rotated.get(name, times))
        for name, times in once.items()
    }


def _grouped(pairs: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """Milliseconds by kernel; what XLA numbers is one kernel."""
    out: dict[str, list[float]] = {}
    for name, ms in pairs:
        out.setdefault(name.rstrip("0123456789_"), []).append(ms)
    return out


def chained_us(
    link: Callable[[Any, Any], Any],
    x: Any,
    sets: Sequence[Any],
    links: int = 32,
    runs: tuple[int, int] = (5, 25),
) -> float:
    """Microseconds of a link in a chain ``x = link(x, s)``, launches included.

    By the clock, of a program of so many links: the slope between two numbers of runs that follow each other without a
    wait, medians of 7. (The slope between two lengths of a chain, each waited for, moves by 4 us.)
    """

    def chain(x: Any, sets: Any) -> Any:
        for i in range(links):
            x = link(x, sets[i % len(sets)])
        return x

    run = jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": 1})

    def last_of(n: int) -> Any:
        for _ in range(n - 1):
            run(x, sets)
        return run(x, sets)

    few, many = (median_seconds(functools.partial(last_of, n), 7, warm=1) for n in runs)
    return 1e6 * (many - few) / (runs[1] - runs[0]) / links


def median_seconds(run: Callable[[], Any], repeats: int, *, warm: int = 2) -> float:
    """The median of `repeats` runs by the clock, each waited for, after `warm` others."""
    times = []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])
