"""A training step with Adam whose state is in host memory: milliseconds and bytes, against the state on the device.

  python -m stowax.experiments.bench_optimizer --layers=24 --budgets=8GiB,6GiB
  python -m stowax.experiments.bench_optimizer --layers=22 --dim=4096 --batch=1 --budgets=72GiB --nocheck

The model is that of bench_remat: float32 parameters and moments, bfloat16 inside, scanned, nothing rematerialized
unless a plan says so. Modes: `device` is the step as it is; `offload` is `sx.offload(step, optimizer="host")`;
`naive` fetches the whole state with `device_put` and puts it back; each of `--budgets` is a plan with `--host`
memory. The floor is the bytes of what is on the host over the measured rates of one large copy each way. `--check`
compares the gradients of the first step, as Adam's first moments have them, with those of the first mode: the norm of
the difference over theirs. (Parameters would not do: the first steps of Adam go by signs of gradients, and where one
is next to 0 its sign is that of a rounding.) With `--dtype=float32` only rounding of its last bits is left. The
second command is a model of 6 billion parameters:
parameters, gradients and state take 97 GB. Writes out/bench_optimizer.json. One H100: 5 minutes each;
what to expect is in docs/plans.md.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.experiments import sizes
from stowax.experiments.kernel_timing import median_seconds
from stowax.experiments.results import write_json
from stowax.transforms.report import text_table

LAYERS = flags.DEFINE_integer("layers", 24, "Layers.")
DIM = flags.DEFINE_integer("dim", 1024, "Width; the feed-forward is 4 times as wide.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.")
MODES = flags.DEFINE_list("modes", ["device", "offload", "naive"], "What is timed.")
BUDGETS = flags.DEFINE_list("budgets", [], "Plans for so much device memory.")
HOST = flags.DEFINE_string("host", "100GiB", "Host memory for plans.")
DEVICE = flags.DEFINE_string("device", "h100", "The device's name for the planner.")
CHECK = flags.DEFINE_bool("check", True, "Compare the gradients with those of the first mode.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "What is computed in.")
STEPS = flags.DEFINE_integer("steps", 5, "Steps that are timed.")
OUT = flags.DEFINE_string("out", "out/bench_optimizer.json", "Results.")

HEADER = (
    "step",
    "budget",
    "predicted, MiB",
    "XLA, MiB",
    "host, MiB",
    "ms",
    "planned ms",
    "floor, ms",
    "differs by",
)
SPACE = jax.memory.Space


def problem() -> tuple[Callable[..., Any], Any, Any]:
    """The training step, and the shapes of parameters and state."""
    config = dataclasses.replace(
        sizes.transformer(LAYERS.value, DIM.value), dtype=jnp.dtype(DTYPE.value)
    )
    loss, optimizer = sizes.loss(config), optax.adamw(1e-3)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.eval_shape(lambda: models.init_params(config))
    return step, params, jax.eval_shape(optimizer.init, params)


def drawn(shapes: Any) -> Any:
    draw = lambda s: 0.02 * jax.random.normal(jax.random.key(s.size % 97), s.shape, s.dtype)
    return jax.tree.map(draw, shapes)


def zeros(shapes: Any) -> Any:
    """Of numpy, so that they need not pass through the device."""
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def naive(step: Callable[..., Any]) -> Callable[..., Any]:
    def fn(params: Any, state: Any, tokens: jax.Array) -> Any:
        here = jax.tree.map(lambda x: jax.device_put(x, SPACE.Device), state)
        params, new, value = step(params, here, tokens)
        back = lambda x, old: jax.device_put(x, jax.typeof(old).memory_space)
        return params, jax.tree.map(back, new, state), value

    return fn


def link_seconds(nbytes: int) -> float:
    """Of `nbytes` to the host and as many from it, by one large copy each way."""
    x = jnp.ones((1 << 30,), jnp.uint8)
    y = jax.device_put(x, SPACE.Host)
    down = jax.jit(lambda x: jax.device_put(x + jnp.uint8(0), SPACE.Host))
    up = jax.jit(lambda x: jax.device_put(x, SPACE.Device) + jnp.uint8(0))
    both = (lambda: down(x)), (lambda: up(y))
    return nbytes / 2**30 * sum(median_seconds(run, STEPS.value) for run in both)


def measure(
    fn: Callable[..., Any], params: Any, state: Any, tokens: jax.Array
) -> tuple[dict[str, Any], list[Any]]:
    """Figures, and the first moments after one step, in host memory. The arguments are donated."""
    moved = memory_planner.tree_nbytes(
        [x for x in jax.tree.leaves(state) if jax.typeof(x).memory_space == SPACE.Host]
    )
    compiled = jax.jit(fn, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    times, early = [], []
    for i in range(2 + STEPS.value):
        start = time.perf_counter()
        params, state, value = compiled(params, state, tokens)
        jax.block_until_ready((params, state, value))
        times.append(time.perf_counter() - start)
        if i == 0 and CHECK.value:
            # by way of the device: a view of host memory would keep it from being donated
            moments = jax.device_put(optax.tree.get(state, "mu"), SPACE.Device)
            early = [np.asarray(x) for x in jax.tree.leaves(moments)]
    report = memory_planner.memory_report(compiled)
    ms = 1e3 * statistics.median(times[2:])
    return {"xla": report.peak, "host": moved, "ms": ms}, early


def difference(got: list[Any], want: list[Any]) -> float | None:
    """The norm of the difference of two lists of arrays over that of the second."""
    if not got or not want:
        return None
    norm = lambda arrays: sum(float(np.vdot(x, x)) for x in arrays) ** 0.5
    return norm([a - b for a, b in zip(got, want)]) / norm(want)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    mib = lambda n: "" if n is None else f"{n / 2**20:,.0f}"
    share = "" if row["differs"] is None else f"{row['differs']:.1e}"
    planned = "" if row["planned_ms"] is None else f"{row['planned_ms']:.1f}"
    figures = mib(row["predicted"]), mib(row["xla"]), mib(row["host"])
    times = f"{row['ms']:.1f}", planned, f"{row['floor_ms']:.1f}"
    return (row["name"], row["budget"], *figures, *times, share)


def main(_: list[str]) -> None:
    step, *shapes = problem()
    tokens = sizes.random_tokens(
        sizes.transformer(LAYERS.value, DIM.value), BATCH.value, LENGTH.value
    )
    link = link_seconds(2**30)
    rows: list[dict[str, Any]] = []
    reference: list[Any] = []
    params, state = shapes
    print(f"parameters {memory_planner.format_bytes(memory_planner.tree_nbytes(params))}, state "
          f"{memory_planner.format_bytes(memory_planner.tree_nbytes(state))}")  # fmt: skip

    def add(name: str, fn: Any, place: Callable[[Any], Any], plan: sx.Plan | None = None) -> None:
        try:
            found, early = measure(
                fn, drawn(params), jax.block_until_ready(place(zeros(state))), tokens
            )
        except Exception as error:  # out of memory: the others go on
            print(f"{name}: {str(error)[:400]}", flush=True)
            return
        if not rows:
            reference.extend(early)
        floor = 1e3 * link * found["host"] / 2**30
        row = {
            "name": name,
            "budget": "",
            "predicted": None,
            "planned_ms": None,
            "floor_ms": floor,
        } | found
        if plan is not None:
            row |= {"budget": memory_planner.format_bytes(plan.budget or 0)}
            row |= {"predicted": plan.after, "planned_ms": 1e3 * plan.step_after}
        rows.append(row | {"differs": difference(early, reference)})
        print("  ".join(cells(rows[-1])), flush=True)

    streamed = sx.offload(step, optimizer="host")
    whole = lambda tree: jax.tree.map(jnp.asarray, tree)
    ways = {
        "device": (step, whole),
        "offload": (streamed, streamed.place),
        "naive": (naive(step), streamed.place),
    }
    for mode in MODES.value:
        add(mode, *ways[mode])
    for budget in BUDGETS.value:
        try:
            plan = sx.plan(
                step,
                params,
                state,
                tokens,
                hbm=budget,
                host=HOST.value,
                device=DEVICE.value,
                donate=(0, 1),
            )
        except ValueError as error:
            print(f"plan of {budget}: {error}", flush=True)
            continue
        place = lambda tree, plan=plan: jax.tree.map(
            jnp.asarray, plan.place(params, tree, tokens)[1]
        )
        add("plan", plan.apply(step), place, plan)
    print(text_table(HEADER, list(map(cells, rows))))
    settings = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": DTYPE.value,
        "layers": LAYERS.value,
    }
    settings |= {"dim": DIM.value, "batch": BATCH.value, "length": LENGTH.value}
    write_json(Path(OUT.value), settings | {"link_s_per_gib_both_ways": link, "rows": rows})


if __name__ == "__main__":
    app.run(main)
