"""Plans the training memory of a model: writes the plan, its picture, and the check against the compiler here.

  python -m stowax.experiments.plan_memory --hbm=6GiB --device=h100
  python -m stowax.experiments.plan_memory --model=SmolLM2-135M --batch=4 --length=1024 --hbm=8GiB --measure

The model is a Llama of random weights of the sizes given, or of the shape of SmolLM2-135M. Writes plan.json, plan.svg
and report.txt to --out. On 2 cores: 10 s for the plan; `--measure` also compiles it. Expected: about a third of the
peak at 24 layers, predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import stowax as sx
from stowax import memory_planner, models
from stowax.experiments import sizes
from stowax.transforms.placement import BASELINES

MODEL = flags.DEFINE_enum("model", "llama", ["llama", "SmolLM2-135M"], "Whose shape.")
LAYERS = flags.DEFINE_integer("layers", 24, "Layers of `llama`.")
DIM = flags.DEFINE_integer("dim", 1024, "Width of `llama`.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.")
SCAN = flags.DEFINE_bool("scan", True, "Scan over the layers, or write them out.")
HBM = flags.DEFINE_string("hbm", "12GiB", "The budget of device memory.")
HOST = flags.DEFINE_string("host", "0B", "Host memory that may be used.")
ENCODE = flags.DEFINE_string("encode", "", "Codec that values may be kept in.")
DEVICE = flags.DEFINE_string("device", "h100", "For which device.")
MEASURE = flags.DEFINE_bool(
    "measure", False, "Compile here, and plan again until the compiler agrees."
)
OUT = flags.DEFINE_string("out", "out/plan_memory", "Folder for what is written.")


def config() -> models.LlamaConfig:
    if MODEL.value == "llama":
        return sizes.transformer(LAYERS.value, DIM.value)
    return models.LlamaConfig(
        vocab_size=49_152, dim=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn_dim=1536, dtype=jnp.bfloat16
    )  # fmt: skip


def gradient() -> tuple[Any, Any, Any]:
    """The function that is planned, and the shapes of its arguments."""
    c = config()
    params = jax.eval_shape(lambda: models.init_params(c, scan=SCAN.value))
    tokens = jax.ShapeDtypeStruct((BATCH.value, LENGTH.value + 1), jnp.int32)
    return jax.value_and_grad(sizes.loss(c, SCAN.value)), params, tokens


def main(_: list[str]) -> None:
    fn, *args = gradient()
    plan = sx.plan(
        fn, *args, hbm=HBM.value, host=HOST.value, device=DEVICE.value, encode=ENCODE.value, measure=MEASURE.value
    )  # fmt: skip
    lines = [str(plan), "", "named rules, predicted:"]
    for name in BASELINES:
        other = sx.plan(fn, *args, device=DEVICE.value, strategy=name)
        size = memory_planner.format_bytes(other.after)
        lines.append(f"  {name:20} {size:>12}  {1e3 * other.seconds:8.2f} ms kept and made again")
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan.to_json() + "\n")
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    plan.save_picture(folder / "plan.svg")
    plan.save_picture(folder / "plan.png")
    print("\n".join(lines), f"\nwritten to {folder}/")


if __name__ == "__main__":
    app.run(main)
