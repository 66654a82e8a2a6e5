"""Quantizes a model and reports the error of every layer.

  python -m stowax.experiments.quantize --variant=int4-g64-gptq --save=out/smollm2-int4

Prints a row for each weight: bits, relative error of the weight and, where the solver saw data, of the layer's
output. With --save the packed weights go to an Orbax checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp
from absl import app, flags

from . import sweep, texts, variants
from .results import write_json

_DEFAULT = sweep.Config()

MODEL = flags.DEFINE_string(
    "model", _DEFAULT.model, "GGUF file, Hugging Face directory, or smollm2."
)
VARIANT = flags.DEFINE_string("variant", "int4-g64", "Codec, then solver.")
BATCHES = flags.DEFINE_integer("batches", _DEFAULT.batches, "Calibration windows.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", _DEFAULT.length, "Tokens in each.", lower_bound=2)
OUT = flags.DEFINE_string("out", "out/quantize/report.json", "A JSON file for the report.")
SAVE = flags.DEFINE_string("save", "", "A new folder for the packed weights.")


def main(_: list[str]) -> None:
    variants.check([VARIANT.value])
    model = sweep.load(MODEL.value)
    calibration = texts.batches(model, _DEFAULT.calibration, BATCHES.value, LENGTH.value)
    variant = variants.build(model, VARIANT.value, calibration)
    if variant.report is not None:
        print(variant.report)
        write_json(Path(OUT.value), {"variant": variant.name} | variant.report.to_dict())
    if SAVE.value:
        folder = Path(SAVE.value).absolute()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, variant.params)
        print(f"saved to {SAVE.value}")


if __name__ == "__main__":
    app.run(main)
