"""Decoders of outside packages, small and with random weights, as forms of the same kind as `kv_forms`.

Each function imports its package inside and raises ImportError where it is missing. Seen to run with (`pip install
--no-deps`): penzai 0.2.5 and ordered-set 4.1.0; google-tunix 0.1.7; gemma 2.0.8; transformers 4.57.1 and regex.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.transforms.kv_forms import CALLS, B, D, Form, H, K, L, N, S

VOCABULARY, HIDDEN = 40, 48


def token_ids() -> list[jax.Array]:
    """Tokens of each call, without 0, which some take for padding."""
    ids = np.random.default_rng(5).integers(1, VOCABULARY, (B, sum(CALLS)), np.int32)
    return [jnp.asarray(x) for x in np.split(ids, np.cumsum(CALLS)[:-1], axis=1)]


def outside(name: str, step: Any, params: Any, cache: Any, note: str) -> Form:
    return Form(name, step, params, cache, token_ids(), found=True, kind="outside", note=note)


def layer_caches() -> dict[str, Any]:
    """The cache of Gemma and Tunix: a dict for each layer, with an index for each row."""
    kv = lambda: jnp.zeros((B, S, K, H))
    layer = lambda: {"k": kv(), "v": kv(), "end_index": jnp.zeros(B, jnp.int32)}
    return {f"layer_{i}": layer() for i in range(L)}


def places(tokens: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions `[B, T]` and the causal mask `[B, T, S]`."""
    positions = jnp.broadcast_to(index + jnp.arange(tokens.shape[1]), tokens.shape)
    return positions, jnp.arange(S) <= positions[..., None]


# penzai: named axes, effects as state variables


def penzai_llama(stacked: bool = False, soft_cap: float | None = None) -> Form:
    """Named arrays; `stacked`: layers in a scan, with the caches among its xs and ys."""
    from penzai import pz
    from penzai.models.transformer import sampling_mode
    from penzai.models.transformer.variants import llamalike_common as llama

    config = llama.LlamalikeTransformerConfig(
        num_kv_heads=K,
        query_head_multiplier=N // K,
        embedding_dim=D,
        projection_dim=H,
        mlp_hidden_dim=HIDDEN,
        num_decoder_blocks=L,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        attn_logits_soft_cap=soft_cap,
        use_layer_stack=stacked,
    )
    model = llama.build_llamalike_transformer(config, jax.random.key(0))
    model = sampling_mode.KVCachingTransformerLM.from_uncached(model, S, {"batch": B})
    slots, values = pz.unbind_variables(model, freeze=True)
    is_state = lambda v: isinstance(v, pz.StateVariableValue)
    params = [v for v in values if not is_state(v)]
    cache = jax.tree.map(jnp.asarray, [v for v in values if is_state(v)])

    def step(params, tokens, cache):
        states = [v.unfreeze_as_copy() for v in cache]
        bound = pz.bind_variables(slots, [*params, *states])
        out = bound(pz.nx.wrap(tokens).tag("batch", "seq"))
        return out.unwrap("batch", "seq", "vocabulary"), [v.freeze() for v in states]

    # The order of named axes is settled by the first call.
    settled = jax.eval_shape(step, params, token_ids()[0], cache)[1]
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), settled)
    name = f"penzai Llama{', stacked' * stacked}{', soft cap' * (soft_cap is not None)}"
    return outside(
        name, step, params, cache, "axes by name: b, k, h, s; masks from a buffer of tokens"
    )


# Tunix: nnx, ring indices, masks from outside


def tunix_module(family: str) -> types.ModuleType:
    """`tunix.models.<family>.model` without running `tunix/__init__`, which imports trainers."""
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None:
            raise ImportError("no package `tunix`: pip install --no-deps google-tunix")
        sys.modules["tunix"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"tunix.models.{family}.model")


def tunix_form(name: str, model: nnx.Module, note: str) -> Form:
    graph, params = nnx.split(model)

    def step(params, tokens, cache):
        positions, mask = places(tokens, cache["layer_0"]["end_index"][0])
        return nnx.merge(graph, params)(tokens, positions, cache, mask)

    return outside(name, step, params, layer_caches(), note)


def tunix_llama() -> Form:
    lib = tunix_module("llama3")
    config = lib.ModelConfig(
        num_layers=L,
        vocab_size=VOCABULARY,
        embed_dim=D,
        hidden_dim=HIDDEN,
        num_heads=N,
        head_dim=H,
        num_kv_heads=K,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = lib.Llama3(config, rngs=nnx.Rngs(0))
    return tunix_form("Tunix Llama", model, "scores reshaped between the dots; index % size")


def tunix_qwen() -> Form:
    lib = tunix_module("qwen3")
    config = lib.ModelConfig(
        num_layers=L,
        vocab_size=VOCABULARY,
        embed_dim=D,
        hidden_dim=HIDDEN,
        num_heads=N,
        head_dim=H,
        num_kv_heads=K,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return tunix_form(
        "Tunix Qwen", lib.Qwen3(config, rngs=nnx.Rngs(0)), "K normalised before the cache"
    )


def tunix_gemma() -> Form:
    lib = tunix_module("gemma3")
    config = lib.ModelConfig(
        num_layers=L,
        num_embed=VOCABULARY,
        embed_dim=D,
        hidden_dim=HIDDEN,
        num_heads=N,
        head_dim=H,
        num_kv_heads=K,
        sliding_window_size=4,
        param_dtype=jnp.float32,
    )
    return tunix_form("Tunix Gemma", lib.Gemma3(config, rngs=nnx.Rngs(0)), "both layers slide")


# google-deepmind/gemma 2: Linen


def gemma_linen() -> Form:
    """Soft cap, a sliding and a global layer; slots of the sliding mask by a cond."""
    from gemma import modules, transformer

    config = transformer.TransformerConfig(
        num_layers=L,
        num_embed=VOCABULARY,
        embed_dim=D,
        hidden_dim=HIDDEN,
        num_heads=N,
        head_dim=H,
        num_kv_heads=K,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL],
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
    )
    model = transformer.Transformer(config)
    cache = config.init_cache(B, jnp.float32, cache_length=S)
    tokens = token_ids()[0]
    variables = model.init(jax.random.key(0), tokens, *_gemma_inputs(tokens, cache))
    params = jax.tree.map(_noise, variables["params"])

    def step(params, tokens, cache):
        return model.apply({"params": params}, tokens, *_gemma_inputs(tokens, cache))

    return outside("gemma 2, Linen", step, params, cache, "soft cap, sliding window, index % size")


def _gemma_inputs(tokens, cache):
    positions, mask = places(tokens, cache["layer_0"]["end_index"][0])
    return positions, cache, mask


def _noise(w: jax.Array) -> jax.Array:
    """Its zeros are not zero, so that every layer does something."""
    return w + 0.1 * jnp.asarray(np.random.default_rng(w.size).standard_normal(w.shape, np.float32))


# transformers 4: Linen modules with a cache collection


def hugging_face_module(path: str) -> types.ModuleType:
    """A module of transformers 4, whatever versions of its other dependencies are installed."""
    check = "transformers.dependency_versions_check"
    if check not in sys.modules:
        stub = types.ModuleType(check)
        stub.dep_version_check = lambda *args, **kwargs: None
        sys.modules[check] = stub
    return importlib.import_module(f"transformers.models.{path}")


def hugging_face_form(name: str, model: Any, note: str) -> Form:
    cache = {"layers": model.init_cache(B, S), "index": jnp.int32(0)}

    def step(params, tokens, cache):
        positions, _ = places(tokens, cache["index"])
        variables = {"params": params, "cache": cache["layers"]}
        ones = jnp.ones((B, S), jnp.int32)
        out, new = model.module.apply(variables, tokens, ones, positions, mutable=["cache"])
        return out.logits, {"layers": new["cache"], "index": cache["index"] + tokens.shape[1]}

    return outside(name, step, model.params, cache, note)


def hugging_face_gpt2() -> Form:
    lib = hugging_face_module("gpt2.modeling_flax_gpt2")
    config = lib.GPT2Config(
        vocab_size=VOCABULARY, n_positions=S, n_embd=D, n_layer=L, n_head=N, n_inner=HIDDEN
    )
    model = lib.FlaxGPT2LMHeadModel(config, seed=0)
    return hugging_face_form("transformers GPT-2", model, "multi-head, bias from a combined mask")


def hugging_face_llama() -> Form:
    lib = hugging_face_module("llama.modeling_flax_llama")
    config = lib.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=HIDDEN,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        max_position_embeddings=S,
    )
    model = lib.FlaxLlamaForCausalLM(config, seed=0)
    return hugging_face_form("transformers Llama", model, "repeated after the cache")


def penzai_llama_stacked() -> Form:
    return penzai_llama(stacked=True)


def penzai_llama_capped() -> Form:
    return penzai_llama(soft_cap=20.0)


OUTSIDE = [
    penzai_llama,
    penzai_llama_stacked,
    penzai_llama_capped,
    tunix_llama,
    tunix_qwen,
    tunix_gemma,
    gemma_linen,
    hugging_face_gpt2,
    hugging_face_llama,
]
