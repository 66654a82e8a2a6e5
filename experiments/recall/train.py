"""Trains the small model of the recall tasks from nothing and writes its weights.

  python -m stowax.experiments.recall.train

A Llama of 0.6 million parameters (`model.CONFIG`), about 10 minutes on 2 CPU cores. Prints a table of accuracies at a
context of 256 tokens, through prefill and decoding, of the weights as they were written.

Induction heads form within 300 steps on short sequences of few symbols, and not in 1,000 on longer ones of many, so the
lessons begin with 32 tokens of 32 symbols. Heads that form so go on to confuse just these symbols; no task has them.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from stowax import models
from stowax.transforms.report import text_table

from . import model, scoring, tasks

OUT = flags.DEFINE_string("out", str(model.SHIPPED), "File for the weights.")
SEED = flags.DEFINE_integer("seed", 0, "Of the first weights and of the lessons.")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A stretch of training on sequences of one length.

    Attributes:
      steps: optimizer steps.
      rows, tokens: size of a batch.
      context: longest context of a task, in tokens; the shortest is `SHORTEST`. 0 where there are only drills.
      drills: share of rows that are a drill.
      symbols: the drills use the first so many of `SYMBOLS`.
    """

    steps: int
    rows: int
    tokens: int
    context: int
    drills: float
    symbols: int


SHORTEST = 40
SYMBOLS = np.concatenate([tasks.SPARE, tasks.KEYS, tasks.VALUES, tasks.WORDS])
LESSONS = (
    Lesson(300, 32, 32, 0, 1.0, tasks.SPARE.size),
    Lesson(500, 32, 64, 40, 0.5, SYMBOLS.size),
    Lesson(500, 16, 128, 80, 0.2, SYMBOLS.size),
    Lesson(300, 8, 256, 200, 0.1, SYMBOLS.size),
    Lesson(300, 8, 320, 288, 0.1, SYMBOLS.size),
)
STEPS = sum(lesson.steps for lesson in LESSONS)
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, STEPS, 6e-5), b2=0.98, weight_decay=0.01
    ),
)
LAYERS = [str(i) for i in range(model.CONFIG.layers)]
# Unrolled layers train faster than scanned ones on a CPU; the file holds them stacked.
FUNCTIONS = models.functions(model.CONFIG, scan=False)


def train(seed: int) -> models.llama.Params:
    """Parameters in float32, layers stacked."""
    rng = np.random.default_rng(seed)
    params = first_params(seed)
    state = (params, OPTIMIZER.init(params))
    with tqdm(total=STEPS, unit="step") as bar:
        for lesson in LESSONS:
            for _ in range(lesson.steps):
                state, loss = train_step(state, *lesson_batch(rng, lesson))
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_description(f"{lesson.tokens} tokens, loss {float(loss):.3f}")
    params = dict(state[0])
    layers = [params["layers"][name] for name in LAYERS]
    return params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def first_params(seed: int) -> models.llama.Params:
    """Random parameters whose blocks add little at first, so that tokens stay visible through all layers."""
    params = models.init_params(model.CONFIG, seed, scan=False)
    for name in LAYERS:
        for part, last in (("attn", "o"), ("mlp", "down")):
            params["layers"][name][part][last]["weight"] *= 0.1
    return params


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, tokens: jax.Array, weights: jax.Array):
    """One step on ``tokens int32[B, T]``; ``weights f32[B, T]`` says how much each counts as a target."""

    def loss(params):
        nll = FUNCTIONS.nll(params, tokens, chunk=tokens.shape[1])
        return (nll * weights[:, 1:]).sum() / weights[:, 1:].sum()

    params, moments = state
    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = OPTIMIZER.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), value


def lesson_batch(rng: np.random.Generator, lesson: Lesson) -> tuple[np.ndarray, np.ndarray]:
    """``tokens int32[B, T]`` and ``weights f32[B, T]``."""
    rows = [
        (drill if rng.random() < lesson.drills else asked)(rng, lesson) for _ in range(lesson.rows)
    ]
    tokens, weights = zip(*rows)
    return np.stack(tokens).astype(np.int32), np.stack(weights).astype(np.float32)


def drill(rng: np.random.Generator, lesson: Lesson) -> tuple[np.ndarray, np.ndarray]:
    """Different symbols in random order, over and over; all that come again are targets."""
    period = rng.integers(4, min(lesson.tokens // 2, lesson.symbols) + 1)
    tokens = rng.choice(SYMBOLS[: lesson.symbols], period, replace=False)
    return np.resize(tokens, lesson.tokens), _weights(np.arange(lesson.tokens) > period)


def asked(rng: np.random.Generator, lesson: Lesson) -> tuple[np.ndarray, np.ndarray]:
    """A context of a random task, its question, then as many others about it as there is room for."""
    task = list(tasks.TASKS.values())[rng.integers(len(tasks.TASKS))]
    example = task(rng, int(rng.integers(SHORTEST, lesson.context + 1)), rng.random())
    others = [pair for i in rng.permutation(len(example.more)) for pair in example.more[i]]
    parts = [example.prompt, example.answer, *others]
    targets = np.concatenate([np.full(part.size, i % 2) for i, part in enumerate(parts)])
    short = (0, max(0, lesson.tokens - targets.size))
    tokens = np.pad(np.concatenate(parts), short)[: lesson.tokens]
    return tokens, _weights(np.pad(targets, short)[: lesson.tokens])


def _weights(targets: np.ndarray) -> np.ndarray:
    """A row with many targets counts more than one with few, but not in proportion."""
    return targets / np.sqrt(max(1, targets.sum()))


def main(_: list[str]) -> None:
    start = time.perf_counter()
    model.save(OUT.value, model.CONFIG, train(SEED.value))
    seconds = time.perf_counter() - start
    config, params, functions = model.load(OUT.value)
    scores = scoring.score_all(functions.step, params, functions.init_cache, count=256, seed=1)
    rows = [(name, f"{s.token:.1%}", f"{s.exact:.1%}") for name, s in scores.items()]
    print(text_table(("task", "tokens right", "answers right"), rows))
    print(f"\n{seconds:.0f} s for {STEPS} steps; {config.layers} layers, weights: {OUT.value}")


if __name__ == "__main__":
    app.run(main)
