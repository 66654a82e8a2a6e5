"""Decoders of outside packages, small and with random weights, as forms of the same kind as `kv_forms`.

Each function imports its package inside and raises ImportError where it is missing: penzai 0.2.5, and gemma 2.0.8
without its dependencies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.transforms.kv_forms import CALLS, B, D, Form, H, K, L, N, S

VOCABULARY, HIDDEN = 40, 48


def token_ids() -> list[jax.Array]:
    """Tokens of each call, without 0, which some take for padding."""
    ids = np.random.default_rng(5).integers(1, VOCABULARY, (B, sum(CALLS)), np.int32)
    return [jnp.asarray(x) for x in np.split(ids, np.cumsum(CALLS)[:-1], axis=1)]


def outside(name: str, step: Any, params: Any, cache: Any, note: str) -> Form:
    return Form(name, step, params, cache, token_ids(), found=True, kind="outside", note=note)


def layer_caches() -> dict[str, Any]:
    """The cache of Gemma: a dict for each layer, with an index for each row."""
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


# gemma: Linen, a dict for each layer


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
    tokens = token_ids()[0]
    variables = model.init(jax.random.key(0), tokens, *_gemma_inputs(tokens, layer_caches()))
    params = jax.tree.map(_noise, variables["params"])

    def step(params, tokens, cache):
        return model.apply({"params": params}, tokens, *_gemma_inputs(tokens, cache))

    note = "soft cap, sliding window, index % size"
    return outside("gemma 2, Linen", step, params, layer_caches(), note)


def _gemma_inputs(tokens, cache):
    cache = jax.tree.map(lambda x: x, cache)  # the module writes into the dict that it is given
    positions, mask = places(tokens, cache["layer_0"]["end_index"][0])
    return positions, cache, mask


def _noise(w: jax.Array) -> jax.Array:
    """Its zeros are not zero, so that every layer does something."""
    return w + 0.1 * jnp.asarray(np.random.default_rng(w.size).standard_normal(w.shape, np.float32))


def penzai_llama_stacked() -> Form:
    return penzai_llama(stacked=True)


def penzai_llama_capped() -> Form:
    return penzai_llama(soft_cap=20.0)


OUTSIDE = [penzai_llama, penzai_llama_stacked, penzai_llama_capped, gemma_linen]
