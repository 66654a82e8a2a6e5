"""Quality of KV methods over bytes of cache.

  python -m stowax.experiments.kv_quality --methods=int8,kv4,kv3,kv2,h2o:0.25
  python -m stowax.experiments.kv_quality --recall --methods=snapkv:64,streaming:64,random:64,kv2

Without --recall: SmolLM2's perplexity in decode mode, every token scored through the compressed cache. With it:
accuracy of the small model in ``experiments/recall`` on tasks with known answers. Writes ``report.json`` and
``report.html`` (a table and one plot, quality over bytes a token) under --out; run again, it goes on where it stopped.

Expected: int8 equal to the full cache; kv4 within 0.2 %, kv3 within 1 %, kv2 within 3 %.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from tqdm import tqdm

from stowax.transforms.report import text_table

from . import kv_measure, kv_methods, kv_recall, pictures, sweep, texts
from .results import Results

DEFAULT = ["int8", "int4-g32", "hadamard-int4-g32", "kivi4", "kivi2", "kv4", "kv3", "kv2"]

MODEL = flags.DEFINE_string("model", "smollm2", "GGUF file, Hugging Face directory, or smollm2.")
METHODS = flags.DEFINE_list("methods", DEFAULT, "See `kv_methods`.")
TEXT = flags.DEFINE_string("text", "technical", "technical, novel, or a file.")
WINDOWS = flags.DEFINE_integer("windows", 4, "Windows of text, scored as one batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1025, "Tokens in a window, or in a task.", lower_bound=2)
RECALL = flags.DEFINE_bool("recall", False, "The recall tasks instead of a text.")
COUNT = flags.DEFINE_integer("count", 64, "Examples of each recall task.", lower_bound=1)
OUT = flags.DEFINE_string("out", "out/kv_quality", "Folder for the results.")
RESUME = flags.DEFINE_bool("resume", True, "Keep the methods that --out already has.")

HEADER = ("method", "bytes/token", "of full", "perplexity", "change", "ms/step")


def main(_: list[str]) -> None:
    names = list(dict.fromkeys([kv_methods.BASELINE, *METHODS.value]))
    for name in names:
        kv_methods.get(name)
    out = Path(OUT.value)
    if RECALL.value:
        kv_recall.run(names, out, length=LENGTH.value, count=COUNT.value, resume=RESUME.value)
    else:
        text(names, out)


def text(names: list[str], out: Path) -> None:
    """Perplexity of each method; the table, the files."""
    model = sweep.load(MODEL.value)
    windows = kv_measure.cut(texts.tokens(model, TEXT.value), WINDOWS.value, LENGTH.value)
    settings = {
        "model": model.name, "text": TEXT.value, "windows": WINDOWS.value, "length": LENGTH.value,
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    results = Results(out / "report.json", settings, resume=RESUME.value)
    with tqdm([n for n in names if not results.has(n)], unit="method") as bar:
        for name in bar:
            bar.set_description(name)
            results.add(dataclasses.asdict(kv_measure.measure(model, name, windows)))
    rows = cells(results.variants)
    lead = (
        f"{model.name}, {WINDOWS.value} x {LENGTH.value:,} tokens of {TEXT.value} text, one decode step a token; "
        f"jax {jax.__version__} on {settings['device']}."
    )
    plot = pictures.kv_over_bytes(results.variants, kv_methods.BASELINE, "perplexity")
    page = pictures.page(
        "KV caches in fewer bytes",
        lead,
        [
            ("Figures", pictures.table(HEADER, rows, kv_methods.BASELINE)),
            ("Quality over bytes", plot),
        ],
    )
    (out / "report.html").write_text(page)
    print(text_table(HEADER, rows))


def cells(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table, changes against the full cache."""
    base = next(v for v in found if v["name"] == kv_methods.BASELINE)
    return [
        (
            v["name"],
            f"{v['bytes_per_token']:,.0f}",
            f"{100 * v['cache_bytes'] / base['cache_bytes']:.1f}%",
            f"{v['perplexity']:.3f}",
            f"{100 * (v['perplexity'] / base['perplexity'] - 1):+.2f}%",
            f"{v['step_ms']:.1f}",
        )
        for v in found
    ]


if __name__ == "__main__":
    app.run(main)
