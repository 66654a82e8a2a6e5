"""What a variant of a model says.

python -m stowax.experiments.generate --variant=int4-g64-gptq --prompt="What is a cache?" --temperature=0.7
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from stowax.models import Sampling, generate

from . import sweep, texts, variants
from .results import write_json

_DEFAULT = sweep.Config()

MODEL = flags.DEFINE_string(
    "model", _DEFAULT.model, "GGUF file, Hugging Face directory, or smollm2."
)
VARIANT = flags.DEFINE_string("variant", "int4-g64", "Codec, then solver; f16 for the baseline.")
PROMPT = flags.DEFINE_string("prompt", "What does a compiler do?", "What the user says.")
WORDS = flags.DEFINE_integer("words", 64, "Tokens to generate.", lower_bound=2)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the likeliest tokens; 0 for all.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only tokens that together have this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random choices.")
OUT = flags.DEFINE_string("out", "", "A JSON file for the result.")


def main(_: list[str]) -> None:
    variants.check([VARIANT.value])
    model = sweep.load(MODEL.value)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    calibration = texts.batches(model, _DEFAULT.calibration, _DEFAULT.batches, _DEFAULT.length)
    variant = variants.build(model, VARIANT.value, calibration)
    ids = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": PROMPT.value}]))
    out = generate(
        variant.transform(model.step),
        variant.params,
        model.init_cache(1, len(ids) + WORDS.value),
        ids,
        max_tokens=WORDS.value,
        eos_ids=tokenizer.eos_ids,
        sampling=Sampling(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value),
        seed=SEED.value,
        timing=True,
    )
    text, speed = tokenizer.decode(out.tokens[0]), out.decode_tokens_per_s or 0.0
    print(text)
    print(f"\n{variant.name}: {speed:.1f} tokens/s")
    if OUT.value:
        result = {
            "variant": variant.name,
            "prompt": PROMPT.value,
            "text": text,
            "tokens_per_s": speed,
        }
        write_json(Path(OUT.value), result)


if __name__ == "__main__":
    app.run(main)
