"""The Llama family as a Flax NNX module, and as plain functions on a pytree of parameters.

The modules below are the only implementation. ``functions(config)`` wraps them as functions of a
nested dict of arrays, so that a function transform sees ordinary JAX: weights are arguments.

Letters: ``B`` batch, ``T`` query length, ``S`` cache length, ``N`` query heads, ``K`` kv heads,
``H`` head dim, ``D`` model width, ``F`` feed-forward width, ``V`` vocabulary, ``L`` layers.

Every weight is ``[out, in]``, as Hugging Face and GGUF files store it. With ``scan=True`` the
weights of all layers are stacked, ``layers/attn/q/weight [L, N*H, D]``, and one ``lax.scan`` runs
them; with ``scan=False`` each layer has its own entry, ``layers/0/attn/q/weight``.

References:
  LLaMA (https://arxiv.org/abs/2302.13971), RoFormer (https://arxiv.org/abs/2104.09864),
  GQA (https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]
Cache = dict[str, Any]

_MAX_SIZE = 2**24  # of any axis; larger ones only come from corrupt files


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of one model.

    Attributes:
      vocab_size: tokens in the vocabulary, V.
      dim: model width, D.
      layers: number of layers, L.
      heads: query heads, N.
      kv_heads: key and value heads, K; divides `heads`.
      head_dim: width of a head, H; even.
      ffn_dim: feed-forward width, F.
      rope_theta: base of the rotary frequencies.
      rope_factors: what each of the H/2 rotary frequencies is divided by (long-context scaling);
        None for no scaling.
      norm_eps: added to the mean square in RMSNorm.
      tied: the output projection is the token embedding.
      attention_bias: q, k and v projections have a bias (Qwen2).
      context_length: longest sequence the model was trained on, in tokens.
      dtype: what the model computes in; weights of another dtype are cast where they are used.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    attention_bias: bool = False
    context_length: int = 2048
    dtype: Any = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or not 0 < value <= _MAX_SIZE:
                raise ValueError(f"`{field}` must be an int from 1 to 2**24, got {value!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"`kv_heads` {self.kv_heads} must divide `heads` {self.heads}.")
        if self.heads * self.head_dim > _MAX_SIZE:
            raise ValueError(f"`heads` {self.heads} times `head_dim` {self.head_dim} is too large.")
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for rotary positions, got {self.head_dim}.")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{field}` must be a positive finite number, got {value!r}.")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"`dtype` must be a float dtype, got {self.dtype}.")
        self._check_rope_factors()

    def _check_rope_factors(self):
        if self.rope_factors is None:
            return
        if len(self.rope_factors) != self.head_dim // 2:
            raise ValueError(
                f"`rope_factors` has {len(self.rope_factors)} entries; one for each of the"
                f" {self.head_dim // 2} rotary frequencies is expected."
            )
        if not all(math.isfinite(f) and f > 0 for f in self.rope_factors):
            raise ValueError("`rope_factors` must be positive finite numbers.")


def llama3_rope_factors(
    config_head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """Frequency divisors of Llama 3.1: 1 for short wavelengths, `factor` for long ones.

    Wavelengths between ``original_context / high_freq_factor`` and ``original_context /
    low_freq_factor`` tokens get an interpolated frequency.
    """
    frequency = theta ** (-np.arange(0, config_head_dim, 2) / config_head_dim)
    turns = original_context * frequency / (2 * np.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return tuple(float(f) for f in 1.0 / ((1 - smooth) / factor + smooth))


class Linear(nnx.Module):
    """``y = x @ weight.T + bias``."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (out_dim, in_dim), in_dim**-0.5))
        self.bias = nnx.Param(jnp.zeros(out_dim)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embed(nnx.Module):
    """Token embedding ``weight [V, D]``; `attend` is the output projection of a tied model.

    Token ids outside the vocabulary are clipped to it (callers that read user input check them).
    """

    def __init__(self, vocab_size: int, dim: int, *, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (vocab_size, dim), dim**-0.5))
        self.dtype = dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        rows = self.weight[...].at[tokens].get(mode="clip", wrap_negative_indices=False)
        return rows.astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits in float32, ``[..., V]``."""
        weight = self.weight[...].astype(self.dtype)
        return jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight``, in float32."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions and an optional KV cache."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c, bias = config, config.attention_bias
        self.q = Linear(c.dim, c.heads * c.head_dim, bias=bias, dtype=c.dtype, rngs=rngs)
        self.k = Linear(c.dim, c.kv_heads * c.head_dim, bias=bias, dtype=c.dtype, rngs=rngs)
        self.v = Linear(c.dim, c.kv_heads * c.head_dim, bias=bias, dtype=c.dtype, rngs=rngs)
        self.o = Linear(c.heads * c.head_dim, c.dim, dtype=c.dtype, rngs=rngs)
        self.head_dim = c.head_dim

    def __call__(self, x, rope, index, cache=None):
        q, k, v = (_split_heads(w(x), self.head_dim) for w in (self.q, self.k, self.v))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache = {"k": _write(cache["k"], k, index), "v": _write(cache["v"], v, index)}
            k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
        out = attend(q, k, v, index)
        return self.o(out.reshape(*out.shape[:2], -1)), cache


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = Linear(config.dim, config.ffn_dim, dtype=config.dtype, rngs=rngs)
        self.up = Linear(config.dim, config.ffn_dim, dtype=config.dtype, rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate(x)
        return self.down(gate * jax.nn.sigmoid(gate) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, rope, index, cache=None):
        attended, cache = self.attn(self.attn_norm(x), rope, index, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A Llama-family language model.

    Args:
      config: sizes and constants.
      scan: stack the layers' weights and run them by one ``lax.scan``; otherwise unroll.
      rngs: where the random initial weights come from.
    """

    def __init__(self, config: LlamaConfig, *, scan: bool = True, rngs: nnx.Rngs):
        self.config, self.scan = config, scan
        self.embed = Embed(config.vocab_size, config.dim, dtype=config.dtype, rngs=rngs)
        if scan:
            stack = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
            self.layers: Any = nnx.split_rngs(splits=config.layers)(stack)(rngs)
        else:
            blocks = {str(i): Block(config, rngs=rngs) for i in range(config.layers)}
            self.layers = nnx.Dict(blocks)
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        head = None if config.tied else Embed
        self.lm_head = head and head(config.vocab_size, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``f32[B, T, V]`` of ``tokens int[B, T]``; each position sees those before it."""
        return self.logits(self.hidden(tokens)[0])

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Continues a sequence: prefill and decode.

        Args:
          tokens: ``int[B, T]``, at positions ``cache["index"]`` and on. The caller sees to it that
            ``index + T`` does not exceed the cache length (JAX would clamp the write).
          cache: from `init_cache` or an earlier step.

        Returns:
          Logits ``f32[B, T, V]`` and the cache with the tokens appended.
        """
        length = jax.tree.leaves(cache["layers"])[0].shape[-3]
        if tokens.shape[1] > length:
            raise ValueError(
                f"`tokens` has {tokens.shape[1]} positions but `cache` holds {length}; make a"
                " longer cache with init_cache(batch, length)."
            )
        x, after = self.hidden(tokens, cache)
        assert after is not None
        return self.logits(x), after

    def hidden(self, tokens: jax.Array, cache: Cache | None = None):
        """What the output projection reads, ``[B, T, D]``, and the new cache (None without one)."""
        _check_tokens(tokens)
        index = jnp.int32(0) if cache is None else cache["index"]
        rope = rope_angles(self.config, index, tokens.shape[1])
        state = None if cache is None else cache["layers"]
        run = self._run_scanned if self.scan else self._run_unrolled
        x, state = run(self.embed(tokens), rope, index, state)
        if cache is not None:
            cache = {"index": index + jnp.int32(tokens.shape[1]), "layers": state}
        return self.final_norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits ``f32[..., V]`` of what `hidden` returned."""
        return (self.lm_head or self.embed).attend(x)

    def _run_scanned(self, x, rope, index, state):
        graphdef, weights = nnx.split(self.layers)

        def body(x, layer):
            weights, state = layer
            return nnx.merge(graphdef, weights)(x, rope, index, state)

        return jax.lax.scan(body, x, (weights, state))

    def _run_unrolled(self, x, rope, index, state):
        states = {}
        for i in range(self.config.layers):
            layer_state = None if state is None else state[str(i)]
            x, states[str(i)] = self.layers[str(i)](x, rope, index, layer_state)
        return x, states


def rope_angles(config: LlamaConfig, index: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``f32[T, H/2]`` of positions ``index .. index + length - 1``."""
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_factors is not None:
        frequency = frequency / np.asarray(config.rope_factors)
    positions = (index + jnp.arange(length, dtype=jnp.int32)).astype(jnp.float32)
    angles = positions[:, None] * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs ``(x[h], x[h + H/2])`` of ``x [B, T, heads, H]`` by the given angles."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array) -> jax.Array:
    """Causal attention of ``q [B, T, N, H]`` over ``k, v [B, S, K, H]``.

    Query ``t`` sits at position ``index + t`` and sees the kv positions up to its own.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bktgs", q, k, preferred_element_type=jnp.float32)
    q_position = index + jax.lax.broadcasted_iota(jnp.int32, (length, 1, k.shape[1]), 0)
    kv_position = jax.lax.broadcasted_iota(jnp.int32, (length, 1, k.shape[1]), 2)
    scores = scores * (head_dim**-0.5)
    scores = jnp.where(kv_position <= q_position, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bktgs,bskh->btkgh", weights, v)
    return out.reshape(batch, length, heads, head_dim)


class Functions(NamedTuple):
    """A model as plain functions of ``params``, a nested dict of arrays.

    Attributes:
      forward: ``(params, tokens[B, T]) -> logits f32[B, T, V]``, the whole sequence, no cache.
      step: ``(params, tokens[B, T], cache) -> (logits f32[B, T, V], cache)``, prefill and decode.
      init_cache: ``(batch, length, dtype=None) -> cache``, empty, room for `length` tokens.
      nll: ``(params, tokens[B, T], chunk=256) -> f32[B, T-1]``, negative log-likelihood in nats of
        each token after the first. Logits of `chunk` positions exist at a time.
    """

    forward: Callable[..., jax.Array]
    step: Callable[..., tuple[jax.Array, Cache]]
    init_cache: Callable[..., Cache]
    nll: Callable[..., jax.Array]


@functools.lru_cache(maxsize=32)
def functions(config: LlamaConfig, *, scan: bool = True) -> Functions:
    """The model of `config` as plain functions; equal arguments give the same function objects."""
    graphdef = nnx.split(_abstract(config, scan))[0]

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens)

    def step(params: Params, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graphdef, params).step(tokens, cache)

    def nll(params: Params, tokens: jax.Array, chunk: int = 256) -> jax.Array:
        return next_token_loss(nnx.merge(graphdef, params), tokens, chunk)

    return Functions(forward, step, functools.partial(init_cache, config, scan=scan), nll)


def init_cache(
    config: LlamaConfig, batch: int, length: int, dtype=None, *, scan: bool = True
) -> Cache:
    """An empty KV cache with room for `length` tokens.

    Returns:
      ``{"index": int32[], "layers": {"k": [L, B, S, K, H], "v": ...}}``, or with ``scan=False`` one
      ``{"k": [B, S, K, H], "v": ...}`` for each layer name.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"`batch` and `length` must be at least 1, got {batch} and {length}.")
    shape = (batch, length, config.kv_heads, config.head_dim)
    dtype = config.dtype if dtype is None else dtype

    def empty(lead=()):
        return {name: jnp.zeros((*lead, *shape), dtype) for name in ("k", "v")}

    layers = empty((config.layers,)) if scan else {str(i): empty() for i in range(config.layers)}
    return {"index": jnp.int32(0), "layers": layers}


def next_token_loss(model: Llama, tokens: jax.Array, chunk: int = 256) -> jax.Array:
    """Negative log-likelihood (nats) ``f32[B, T-1]`` of each of ``tokens[:, 1:]``.

    Logits are made for `chunk` positions at a time, so that ``[B, T, V]`` never exists.
    """
    _check_tokens(tokens)
    if tokens.shape[1] < 2 or chunk < 1:
        raise ValueError(
            f"`tokens` must have at least 2 positions and `chunk` be at least 1, got shape"
            f" {tokens.shape} and {chunk}."
        )
    x, targets = model.hidden(tokens[:, :-1])[0], tokens[:, 1:]
    length = targets.shape[1]
    if length <= chunk:
        return _nll(model.logits(x), targets)
    padding = -length % chunk
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    starts = jnp.arange(0, length, chunk, dtype=jnp.int32)

    def one_chunk(start):
        part = (jax.lax.dynamic_slice_in_dim(y, start, chunk, axis=1) for y in (x, targets))
        hidden, target = part
        return _nll(model.logits(hidden), target)

    losses = jax.lax.map(one_chunk, starts)
    return jnp.moveaxis(losses, 0, 1).reshape(tokens.shape[0], -1)[:, :length]


def init_params(config: LlamaConfig, seed: int = 0, *, scan: bool = True) -> Params:
    """Random parameters as a plain nested dict."""
    return params_of(Llama(config, scan=scan, rngs=nnx.Rngs(seed)))


def params_of(module: nnx.Module) -> Params:
    """The parameters of an NNX module as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def param_shapes(config: LlamaConfig, *, scan: bool = True) -> Params:
    """The pytree of `init_params` as ``jax.ShapeDtypeStruct``; nothing is computed."""
    return params_of(_abstract(config, scan))


def module_of(config: LlamaConfig, params: Params, *, scan: bool = True) -> Llama:
    """An NNX module that holds `params`, for training or for module transforms."""
    return nnx.merge(nnx.split(_abstract(config, scan))[0], params)


def _abstract(config: LlamaConfig, scan: bool) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, scan=scan, rngs=nnx.Rngs(0)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(rngs.params(), shape)


def _split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, head_dim)


def _write(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(
        cache, x.astype(cache.dtype), (zero, index, zero, zero), allow_negative_indices=False
    )


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _check_tokens(tokens: jax.Array):
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`tokens` must be integers of shape [batch, length], got {tokens.dtype}"
            f"{list(tokens.shape)}."
        )
