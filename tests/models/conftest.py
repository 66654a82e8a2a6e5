"""A tiny random model as a GGUF file, as a Hugging Face directory, and the real SmolLM2."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stowax.models import find_smollm2
from stowax.models.llama import LlamaConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY = LlamaConfig(
    vocab_size=3 + 256 + len(MERGES),
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    rope_theta=500.0,
    norm_eps=2.0**-16,
    context_length=64,
)


def tiny_vocab() -> list[str]:
    """Special tokens, the 256 byte tokens, then what the merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return SPECIAL + alphabet + [m.replace(" ", "") for m in MERGES]


def write_tiny_gguf(path, config=TINY, *, arch="llama", tokenizer=True, types=None):
    """Writes a random model with Q4_1 weights (or `types[name]`) and a Q8_0 embedding."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tiny_vocab())
        writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {"token_embd.weight": (c.vocab_size, c.dim), "output_norm.weight": (c.dim,)}
    if not c.tied:
        shapes["output.weight"] = (c.vocab_size, c.dim)
    for i in range(c.layers):
        layer = {
            "attn_norm.weight": (c.dim,),
            "attn_q.weight": (q, c.dim),
            "attn_k.weight": (kv, c.dim),
            "attn_v.weight": (kv, c.dim),
            "attn_output.weight": (c.dim, q),
            "ffn_norm.weight": (c.dim,),
            "ffn_gate.weight": (c.ffn_dim, c.dim),
            "ffn_up.weight": (c.ffn_dim, c.dim),
            "ffn_down.weight": (c.dim, c.ffn_dim),
        }
        if c.attention_bias:
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        kind = (types or {}).get(name, T.Q8_0 if name == "token_embd.weight" else T.Q4_1)
        values = rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5
        if len(shape) == 1:
            writer.add_tensor(name, 1 + 0.1 * rng.normal(size=shape).astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_hf_tensors(config=TINY, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights with Hugging Face names."""
    rng = np.random.default_rng(1)
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.dim), "model.norm.weight": (c.dim,)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.dim)
    for i in range(c.layers):
        layer = {
            "input_layernorm.weight": (c.dim,),
            "self_attn.q_proj.weight": (q, c.dim),
            "self_attn.k_proj.weight": (kv, c.dim),
            "self_attn.v_proj.weight": (kv, c.dim),
            "self_attn.o_proj.weight": (c.dim, q),
            "post_attention_layernorm.weight": (c.dim,),
            "mlp.gate_proj.weight": (c.ffn_dim, c.dim),
            "mlp.up_proj.weight": (c.ffn_dim, c.dim),
            "mlp.down_proj.weight": (c.dim, c.ffn_dim),
        }
        if c.attention_bias:
            names = ("q_proj", "k_proj", "v_proj")
            layer |= {f"self_attn.{n}.bias": (s,) for n, s in zip(names, (q, kv, kv))}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {n: (rng.normal(size=s) * s[-1] ** -0.5).astype(dtype) for n, s in shapes.items()}


def write_tiny_hf(path, config=TINY, *, dtype=np.float32, model_type="llama", **settings):
    """Writes config.json, model.safetensors and tokenizer.json; `settings` go into the config."""
    path.mkdir(exist_ok=True)
    values = {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(values | settings))
    safetensors.numpy.save_file(tiny_hf_tensors(config, dtype), path / "model.safetensors")
    vocab = {token: i for i, token in enumerate(tiny_vocab())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in MERGES]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.save(str(path / "tokenizer.json"))
    extra = {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[2]}}
    (path / "tokenizer_config.json").write_text(json.dumps(extra | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    return write_tiny_hf(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def smollm2_path():
    try:
        return find_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path, load_once):
    return load_once(smollm2_path)
