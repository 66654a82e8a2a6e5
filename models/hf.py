"""Config and weights of a Hugging Face directory: ``config.json`` and safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from .llama import LlamaConfig, llama3_rope_factors
from .safetensors_file import SafetensorsFile

_TYPES = ("llama", "mistral", "qwen2")
INDEX_FILE = "model.safetensors.index.json"


def read_config(path: Path, dtype: Any) -> LlamaConfig:
    """The model's config.

    Raises:
      ValueError: a setting that the model here doesn't have; names it.
      FileNotFoundError: there is no ``config.json``.
    """
    file = path / "config.json"
    values = _Json(file)
    kind = values.get("model_type", str)
    if kind not in _TYPES:
        raise values.error(f"model_type {kind!r} is not supported; {_TYPES} are")
    _refuse_unsupported(values, kind)
    dim, heads = values.get("hidden_size", int), values.get("num_attention_heads", int)
    head_dim = values.get("head_dim", int, dim // max(heads, 1))
    theta, factors = _rope(values, head_dim)
    try:
        return LlamaConfig(
            vocab_size=values.get("vocab_size", int),
            dim=dim,
            layers=values.get("num_hidden_layers", int),
            heads=heads,
            kv_heads=values.get("num_key_value_heads", int, heads),
            head_dim=head_dim,
            ffn_dim=values.get("intermediate_size", int),
            rope_theta=theta,
            rope_factors=factors,
            norm_eps=values.get("rms_norm_eps", (int, float), 1e-6),
            tied=values.get("tie_word_embeddings", bool, False),
            attention_bias=values.get("attention_bias", bool, kind == "qwen2"),
            context_length=values.get("max_position_embeddings", int, 2048),
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Directory:
    """The safetensors of a directory as one `weights.Source`."""

    label: str
    files: dict[str, SafetensorsFile]  # tensor name -> file that holds it

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.tensors[name].shape for name, file in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        return self.files[name].read(name)


def open_weights(path: Path) -> Directory:
    """Opens ``model.safetensors`` or the shards that the index lists.

    Raises:
      ValueError: a corrupt file, or an index that disagrees with its shards.
      FileNotFoundError: neither is there, or a shard is missing.
    """
    index = path / INDEX_FILE
    if not index.exists():
        file = SafetensorsFile(path / "model.safetensors")
        return Directory(str(file.path), dict.fromkeys(file.tensors, file))
    values = _Json(index)
    where = values.get("weight_map", dict)
    shards = {}
    for shard in sorted({str(s) for s in where.values()}):
        if Path(shard).name != shard or shard in ("", "..", "."):
            raise values.error(f"shard {shard!r} is not a file name in this directory")
        shards[shard] = SafetensorsFile(path / shard)
    files = {name: file for file in shards.values() for name in file.tensors}
    wrong = [n for n, s in where.items() if n not in shards[str(s)].tensors]
    wrong += [n for n in files if n not in where]
    if wrong or sum(len(f.tensors) for f in shards.values()) != len(files):
        raise values.error(f"index and shards disagree about {', '.join(wrong[:10]) or 'names'}")
    return Directory(str(path), files)


def harmless(source: Directory, config: LlamaConfig) -> set[str]:
    """Tensors that checkpoints carry and the model doesn't need."""
    names = {n for n in source.files if n.endswith(".rotary_emb.inv_freq")}
    return names | {"lm_head.weight"} if config.tied else names


class _Json:
    """Typed reads of a JSON object."""

    def __init__(self, path: Path, values: Any = None):
        self.path = path
        try:
            self.values = json.loads(path.read_text("utf-8")) if values is None else values
        except (ValueError, RecursionError) as error:
            raise self.error(f"not JSON ({error})") from error
        if not isinstance(self.values, dict):
            raise self.error("expected a JSON object")

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}.")

    def get(self, key: str, kind, default: Any = None) -> Any:
        """`key`, or `default` where it is absent or null; an error where there is neither."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{key!r} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key!r} has an unexpected type, got {value!r:.80}")
        return value


def _refuse_unsupported(values: _Json, kind: str):
    wanted = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "use_sliding_window": False,
        "quantization_config": None,
    }
    for key, only in wanted.items():
        value = values.values.get(key)
        if value is not None and value != only:
            raise values.error(f"{key}={value!r:.80} is not supported")
    if kind == "mistral" and values.values.get("sliding_window") is not None:
        raise values.error("sliding-window attention is not supported; set sliding_window to null")


def _rope(values: _Json, head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """Base and frequency divisors, from ``rope_parameters`` or the older ``rope_scaling``."""
    number = (int, float)
    scaling = _Json(values.path, values.get("rope_parameters", dict, {}))
    scaling = (
        scaling if scaling.values else _Json(values.path, values.get("rope_scaling", dict, {}))
    )
    theta = float(scaling.get("rope_theta", number, values.get("rope_theta", number, 10_000.0)))
    kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, (float(scaling.get("factor", number)),) * (head_dim // 2)
    if kind != "llama3":
        raise values.error(f"rotary scaling {kind!r} is not supported")
    return theta, llama3_rope_factors(
        head_dim,
        theta,
        factor=scaling.get("factor", number),
        low_freq_factor=scaling.get("low_freq_factor", number),
        high_freq_factor=scaling.get("high_freq_factor", number),
        original_context=scaling.get("original_max_position_embeddings", int),
    )
