"""SmolLM2-135M against an independent implementation in numpy, and sanity of what it says."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax.models import generate, perplexity

TEXT = (
    "The old lighthouse stood at the end of the pier, and every evening the keeper climbed its"
    " 212 steps to light the lamp. He had done so for thirty years, in summer heat and in winter"
    " storms, and he no longer counted the steps or noticed the smell of oil. What he did notice,"
    " each time, was the moment when the beam first swept across the water and the boats, one"
    " after another, turned towards the harbour."
)


class NumpyLlama:
    """Llama as ggml runs it: rotary positions on neighbouring pairs, rows in the file's order."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.w = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}

        def get(key):
            return reader.get_field(f"llama.{key}").contents()

        self.layers = get("block_count")
        self.heads, self.kv_heads = get("attention.head_count"), get("attention.head_count_kv")
        self.eps, self.theta = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base")

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rope(self, x):
        """x [heads, T, H]: pairs (2i, 2i + 1) as complex numbers."""
        n = x.shape[-1]
        angle = np.outer(np.arange(x.shape[1]), self.theta ** (-np.arange(0, n, 2) / n))
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape).astype(np.float32)

    def attention(self, x, blk):
        def heads(name, n):
            return (x @ self.w[blk + name].T).reshape(len(x), n, -1).swapaxes(0, 1)

        q = self.rope(heads("attn_q.weight", self.heads))
        k = self.rope(heads("attn_k.weight", self.kv_heads))
        v = heads("attn_v.weight", self.kv_heads)
        out = []
        for h in range(self.heads):
            g = h * self.kv_heads // self.heads
            scores = q[h] @ k[g].T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(p / p.sum(-1, keepdims=True) @ v[g])
        return np.concatenate(out, -1) @ self.w[blk + "attn_output.weight"].T

    def forward(self, tokens):
        x = self.w["token_embd.weight"][tokens]
        for i in range(self.layers):
            blk = f"blk.{i}."
            x = x + self.attention(self.norm(x, blk + "attn_norm.weight"), blk)
            h = self.norm(x, blk + "ffn_norm.weight")
            gate, up = h @ self.w[blk + "ffn_gate.weight"].T, h @ self.w[blk + "ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[blk + "ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ self.w["token_embd.weight"].T


@pytest.fixture(scope="module")
def tokens(smollm2):
    return np.asarray(smollm2.tokenizer.encode(TEXT), np.int32)


@pytest.fixture(scope="module")
def logits(smollm2, tokens):
    return np.asarray(jax.jit(smollm2.forward)(smollm2.params, tokens[None, :24])[0])


def test_logits_equal_the_numpy_implementation(smollm2_path, tokens, logits):
    expected = NumpyLlama(smollm2_path).forward(tokens[:24])
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


def test_steps_equal_one_shot(smollm2, tokens, logits):
    step, cache = jax.jit(smollm2.step), smollm2.init_cache(1, 32)
    out = []
    for part in (tokens[:22], tokens[22:23], tokens[23:24]):
        y, cache = step(smollm2.params, jnp.asarray(part[None]), cache)
        out.append(y[0])
    np.testing.assert_allclose(np.concatenate(out), logits, rtol=0, atol=2e-3)


def test_perplexity_of_english(smollm2, tokens):
    assert 8 < perplexity(smollm2.nll, smollm2.params, tokens, window=128) < 40


def test_answers(smollm2):
    text = smollm2.tokenizer
    prompt = text.apply_chat([{"role": "user", "content": "What is the capital of France?"}])
    result = generate(
        smollm2.step,
        smollm2.params,
        smollm2.init_cache(1, 64),
        text.encode(prompt),
        max_tokens=16,
        eos_ids=text.eos_ids,
    )
    assert text.decode(result.tokens[0]) == "The capital of France is Paris."


def test_blocks_are_the_bytes_of_the_file(smollm2):
    stored = {path: block.nbytes for path, block in smollm2.blocks.items()}
    assert sum(stored.values()) == 96_576_768
    assert smollm2.blocks["layers/mlp/up/weight"].type == "q4_1"
    assert smollm2.blocks["embed/weight"].type == "q8_0"
