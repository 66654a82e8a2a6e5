"""Perplexity of variants of a model on a text.

  python -m stowax.experiments.perplexity --variants=int8,int4-g64,int4-g64-gptq --text=novel

Writes ``report.json`` under --out after every variant; run again, it goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from . import sweep

_DEFAULT = sweep.Config()

MODEL = flags.DEFINE_string(
    "model", _DEFAULT.model, "GGUF file, Hugging Face directory, or smollm2."
)
VARIANTS = flags.DEFINE_list("variants", ["int8", "int4-g64"], "Codec, then solver: int4-g64-gptq.")
TEXT = flags.DEFINE_string("text", _DEFAULT.text, "technical, novel, or a file.")
TOKENS = flags.DEFINE_integer("tokens", _DEFAULT.tokens, "Tokens of the text.", lower_bound=2)
WINDOW = flags.DEFINE_integer("window", _DEFAULT.window, "Tokens in a window.", lower_bound=2)
WORDS = flags.DEFINE_integer("words", _DEFAULT.words, "Tokens to generate.", lower_bound=2)
BATCHES = flags.DEFINE_integer("batches", _DEFAULT.batches, "Calibration windows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", _DEFAULT.length, "Tokens in each.", lower_bound=2)
OUT = flags.DEFINE_string("out", "out/perplexity", "Folder for the results.")
RESUME = flags.DEFINE_bool("resume", True, "Keep the variants that --out already has.")


def main(_: list[str]) -> None:
    config = sweep.Config(
        model=MODEL.value,
        names=tuple(VARIANTS.value),
        text=TEXT.value,
        tokens=TOKENS.value,
        window=WINDOW.value,
        words=WORDS.value,
        batches=BATCHES.value,
        length=LENGTH.value,
    )
    results = sweep.run(config, Path(OUT.value), resume=RESUME.value)
    print(sweep.table(results.variants))


if __name__ == "__main__":
    app.run(main)
