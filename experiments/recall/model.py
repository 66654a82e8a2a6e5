"""The small Llama that is trained on the recall tasks, and its file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from stowax import models
from stowax.models.llama import Functions, param_shapes

from .tasks import VOCABULARY

SHIPPED = Path(__file__).parents[1] / "data" / "recall.safetensors"
CONFIG = models.LlamaConfig(
    vocab_size=VOCABULARY,
    dim=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn_dim=256,
    context_length=320,
)


class Recall(NamedTuple):
    """A trained model: its config, its parameters in float32, its functions (layers scanned)."""

    config: models.LlamaConfig
    params: dict[str, Any]
    functions: Functions


def load(path: str | os.PathLike[str] = SHIPPED) -> Recall:
    """The model that is shipped, or one that `save` has written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a file of `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` is {path}: there is no such file; python -m stowax.experiments.recall.train"
            " --out=FILE writes one."
        )
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            config = _config(file.metadata())
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` is {path}: expected safetensors with a Llama's config in the metadata; {error!r}"
        ) from error
    expected = {n: s.shape for n, s in _flat(param_shapes(config)).items()}
    found = {name: values.shape for name, values in flat.items()}
    if found != expected:
        raise ValueError(f"`path` is {path}: tensors {found} are not those of {expected}.")
    flat = {name: jnp.asarray(values, jnp.float32) for name, values in flat.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    return Recall(config, params, models.functions(config))


def save(path: str | os.PathLike[str], config: models.LlamaConfig, params: dict[str, Any]) -> None:
    """Writes parameters (layers stacked) in float16, the config as JSON in the metadata."""
    flat = {name: np.asarray(x, np.float16) for name, x in _flat(params).items()}
    fields = dataclasses.asdict(config) | {"dtype": str(config.dtype)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, str(path), {"config": json.dumps(fields)})


def _config(metadata: dict[str, str] | None) -> models.LlamaConfig:
    fields = json.loads((metadata or {})["config"])
    factors = fields["rope_factors"]
    fields["rope_factors"] = factors and tuple(factors)
    return models.LlamaConfig(**fields)


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
