import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from stowax.models import hf, llama, load

from .conftest import TINY, tiny_hf_tensors, write_tiny_hf


def test_loads_what_was_written(tiny_hf):
    model, tensors = load(tiny_hf), tiny_hf_tensors()
    assert model.config == TINY
    np.testing.assert_array_equal(
        model.params["embed"]["weight"], tensors["model.embed_tokens.weight"]
    )
    for i in range(2):
        np.testing.assert_array_equal(
            model.params["layers"]["attn"]["q"]["weight"][i],
            tensors[f"model.layers.{i}.self_attn.q_proj.weight"],
        )
    assert model.tokenizer.decode(model.tokenizer.encode("hello world")) == "hello world"
    assert dict(model.blocks) == {}


@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_has_a_tensor(tmp_path, scan):
    config = dataclasses.replace(TINY, tied=False, attention_bias=True)
    path = write_tiny_hf(tmp_path / "q", config, model_type="qwen2")
    model = load(path, scan=scan)
    assert model.config == config
    shapes = jax.tree.map(lambda x: x.shape, llama.param_shapes(config, scan=scan))
    assert jax.tree.map(lambda x: x.shape, model.params) == shapes


def test_bf16(tmp_path):
    path = write_tiny_hf(tmp_path / "b", dtype=ml_dtypes.bfloat16)
    model = load(path, dtype="bfloat16")
    expected = tiny_hf_tensors(dtype=ml_dtypes.bfloat16)["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(model.params["layers"]["mlp"]["up"]["weight"][1], expected)
    assert model.config.dtype == ml_dtypes.bfloat16


def shard(path):
    """Splits model.safetensors into two shards with an index."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, half in halves.items():
        safetensors.numpy.save_file({n: tensors[n] for n in half}, path / name)
    where = {n: name for name, half in halves.items() for n in half}
    (path / hf.INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    return where


def test_shards(tmp_path, tiny_hf):
    path = write_tiny_hf(tmp_path / "s")
    shard(path)
    same = jax.tree.map(np.array_equal, load(path).params, load(tiny_hf).params)
    assert jax.tree.all(same)


def test_bad_index(tmp_path):
    path = write_tiny_hf(tmp_path / "s")
    where = shard(path)
    index = path / hf.INDEX_FILE
    index.write_text(json.dumps({"weight_map": where | {"ghost": "a.safetensors"}}))
    with pytest.raises(ValueError, match="disagree about ghost"):
        load(path)
    index.write_text(json.dumps({"weight_map": where | {"x": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="not a file name in this directory"):
        load(path)
    index.write_text(json.dumps({"weight_map": where | {"x": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load(path)


def test_all_problems_at_once(tmp_path):
    path = write_tiny_hf(tmp_path / "p")
    tensors = tiny_hf_tensors()
    del tensors["model.norm.weight"]
    tensors["surprise"] = np.zeros(3, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 6), np.float32)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(path)
    message = str(caught.value)
    assert "3 tensors" in message
    assert "missing: model.norm.weight [64]" in message
    assert "unexpected: surprise [3]" in message
    assert "wrong shape: model.layers.0.mlp.up_proj.weight is [5, 6]" in message
    assert "[96, 64]" in message


def test_harmless_extras(tmp_path):
    path, tensors = write_tiny_hf(tmp_path / "e"), tiny_hf_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    assert load(path).config.tied


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "64"}, "'hidden_size' has an unexpected type"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' has an unexpected type"),
        ({"num_hidden_layers": 10**6}, "1000000 layers but only"),
        ({"num_key_value_heads": 3}, "`kv_heads` 3 must divide"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": 8}, "'rope_scaling' has an unexpected type"),
        ({"intermediate_size": 100}, "wrong shape: model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_bad_config(tmp_path, settings, match):
    path = write_tiny_hf(tmp_path / "c")
    values = json.loads((path / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=match):
        load(path)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_config_is_not_json(tmp_path, content):
    path = write_tiny_hf(tmp_path / "c")
    (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (not JSON|expected)"):
        load(path)


def test_rope_settings(tmp_path):
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    llama3 |= {"rope_type": "llama3", "original_max_position_embeddings": 32}
    old = write_tiny_hf(tmp_path / "old", rope_scaling=llama3, rope_theta=1000.0)
    new = write_tiny_hf(tmp_path / "new", rope_parameters=llama3 | {"rope_theta": 1000.0})
    a, b = hf.read_config(old, "float32"), hf.read_config(new, "float32")
    assert a == b
    assert a.rope_theta == 1000.0
    assert a.rope_factors[-1] == 8.0
    linear = {"type": "linear", "factor": 2}
    c = hf.read_config(write_tiny_hf(tmp_path / "c", rope_scaling=linear), "float32")
    assert c.rope_factors == (2.0,) * 8


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
    path = write_tiny_hf(tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(path)
