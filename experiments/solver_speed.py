"""How long a solver takes for one layer, compilation left out.

  python -m stowax.experiments.solver_speed

Expected on 2 cores: GPTQ of a 1024 x 1024 layer in well under a second (the closest peer in JAX takes 201 s).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from absl import app, flags

from stowax.pallas_kernels import codecs
from stowax.transforms import solvers
from stowax.transforms.report import text_table

CODEC = flags.DEFINE_string("codec", "int4-g64", "How the weight is stored.")
SIZES = flags.DEFINE_list("sizes", ["256", "1024"], "Rows and columns of the square layers.")

HEADER = ("solver", "layer", "first s", "then s", "output error", "of rounding's")


def measure(name: str, size: int, codec: str, repeats: int = 3) -> tuple[str, ...]:
    """A row of the table; inputs are correlated as neighbours in an AR(1) process are."""
    solver = solvers.gptq() if name == "gptq" else solvers.get(name)
    w = jax.random.normal(jax.random.key(0), (size, size))
    distance = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size))
    hessian = 0.9**distance
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        solved = solver.solve(w, codecs.get(codec), hessian=hessian)
        jax.block_until_ready(solved.parts)
        seconds.append(time.perf_counter() - start)
    error = float(solved.info["output_error"])
    rounding = float(
        solvers.rounding().solve(w, codecs.get(codec), hessian=hessian).info["output_error"]
    )
    first, then = seconds[0], min(seconds[1:])
    return (
        name,
        f"{size}x{size}",
        f"{first:.2f}",
        f"{then:.3f}",
        f"{error:.2e}",
        f"{error / rounding:.2f}",
    )


def main(_: list[str]) -> None:
    names = ("round", "clip", "hqq", "gptq")
    rows = [measure(n, int(size), CODEC.value) for size in SIZES.value for n in names]
    print(text_table(HEADER, rows))


if __name__ == "__main__":
    app.run(main)
