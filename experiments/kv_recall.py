"""KV methods on the recall tasks: accuracy over bytes a token, one curve a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import stowax as sx
from stowax import memory_planner
from stowax.transforms.report import text_table

from . import kv_methods, pictures, recall
from .results import Results


def run(names: Sequence[str], out: Path, *, length: int, count: int, resume: bool) -> None:
    """Scores every method on every task; the table, the files."""
    found = recall.load()
    settings = {
        "length": length, "count": count, "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    results = Results(out / "report.json", settings, resume=resume)
    with tqdm([n for n in names if not results.has(n)], unit="method") as bar:
        for name in bar:
            bar.set_description(name)
            results.add(measure(found, name, length, count))
    header = ("method", "bytes/token", *recall.TASKS, "mean")
    rows = [cells(v) for v in results.variants]
    plot = pictures.kv_over_bytes(results.variants, kv_methods.BASELINE, "accuracy")
    page = pictures.page(
        "Recall through compressed caches",
        f"Share of right answer tokens, {count} examples of {length} tokens for each task.",
        [
            ("Figures", pictures.table(header, rows, kv_methods.BASELINE)),
            ("Accuracy over bytes", plot),
        ],
    )
    (out / "report.html").write_text(page)
    print(text_table(header, rows))


def measure(found: Any, name: str, length: int, count: int) -> dict[str, Any]:
    """Accuracies of a method: the context is read in one call, then question and answer."""
    _config, params, functions = found
    fast = sx.compress_kv(kv_methods.get(name))(functions.step, params=0, cache=2)

    def init(batch: int, tokens: int) -> Any:
        shapes = jax.eval_shape(lambda: functions.init_cache(batch, tokens, jnp.float16))
        return fast.init_cache(shapes, params, jax.ShapeDtypeStruct((batch, 1), jnp.int32))

    scores = recall.score_all(fast, params, init, length=length, count=count)
    nbytes = memory_planner.tree_nbytes(jax.eval_shape(lambda: init(1, length)))
    tasks = {task: score.token for task, score in scores.items()}
    mean = sum(tasks.values()) / len(tasks)
    return {"name": name, "bytes_per_token": nbytes / length, "tasks": tasks, "accuracy": mean}


def cells(v: dict[str, Any]) -> tuple[str, ...]:
    accuracies = [f"{100 * a:.1f}" for a in (*v["tasks"].values(), v["accuracy"])]
    return (v["name"], f"{v['bytes_per_token']:,.0f}", *accuracies)
