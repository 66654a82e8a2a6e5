"""Programs whose memory the planner predicts: language models, images, experts, other people's modules.

A program is a function, the shapes of its arguments, and which of them are donated. `PROGRAMS` is a table; half of it
was looked at while the planner's rules were made (``tuned=True``), the other half only when they were done.

Letters: ``B`` batch, ``T`` length, ``D`` width, ``V`` vocabulary, ``E`` experts, ``C`` rows of one expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from penzai import pz
from penzai.models.transformer.variants import llamalike_common as pz_llama

from stowax.models import llama

Loss = Callable[..., jax.Array]
Built = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]

_POLICIES = jax.checkpoint_policies


@dataclasses.dataclass(frozen=True)
class Program:
    """One row of the table.

    Attributes:
      build: gives the function, its arguments as shapes, and the numbers of the donated ones.
      tuned: whether the planner's rules were made with this program in view.
    """

    build: Callable[[], Built]
    tuned: bool


def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def training_step(loss: Loss, params: Any, *batch: Any, optimizer: Any = None) -> Built:
    """``(params, state, *batch) -> (params, state, loss)``, the first two donated."""
    optimizer = optimizer or optax.adam(1e-3)

    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (params, jax.eval_shape(optimizer.init, params), *batch), (0, 1)


# Llama


def config(dim: int, layers: int, *, heads: int, kv_heads: int, ffn: int, vocab: int = 32_000):
    return llama.LlamaConfig(
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim // heads,
        ffn_dim=ffn,
        dtype=jnp.bfloat16,
    )


def llama_loss(c: llama.LlamaConfig, scan: bool, policy: str | None) -> Loss:
    """The model's loss, each layer under `jax.checkpoint` unless `policy` is None."""
    if policy is None:
        nll = llama.functions(c, scan=scan).nll
        return lambda params, tokens: nll(params, tokens).mean()
    wrap = functools.partial(jax.checkpoint, policy=remat_policy(policy), prevent_cse=not scan)

    def loss(params, tokens):
        model = llama.module_of(c, params, scan=scan)
        rope = llama.rope_angles(c, jnp.int32(0), tokens.shape[1] - 1)
        x = model.embed(tokens[:, :-1])

        @wrap
        def layer(x, block):
            x = checkpoint_name(x, "carry")
            return block(x, rope, jnp.int32(0))[0]

        if scan:
            graphdef, weights = nnx.split(model.layers)
            run = lambda x, weights: (layer(x, nnx.merge(graphdef, weights)), None)
            x, _ = jax.lax.scan(run, x, weights)
        else:
            for i in range(c.layers):
                x = layer(x, model.layers[str(i)])
        return nll_of(model.logits(model.final_norm(x)), tokens[:, 1:])

    return loss


def nll_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats; whole logits ``[B, T, V]`` exist."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def remat_policy(name: str) -> Any:
    offload = functools.partial(_POLICIES.save_and_offload_only_these_names, offload_src="device")
    return {
        "full": None,
        "dots": _POLICIES.dots_saveable,
        "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
        "offload_carry": offload(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["carry"],
            offload_dst="pinned_host",
        ),
        "offload_dots": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[name]


def llama_train(c, batch: int, length: int, *, scan: bool = True, policy: str | None = None):
    tokens = shaped((batch, length + 1), jnp.int32)
    return training_step(llama_loss(c, scan, policy), llama.param_shapes(c, scan=scan), tokens)


def llama_step(c, batch: int, tokens: int, length: int, *, scan: bool = True) -> Built:
    """Prefill or decode of bfloat16 weights with a donated cache of `length` tokens."""
    functions = llama.functions(c, scan=scan)
    cast = lambda p: shaped(p.shape, jnp.bfloat16)
    params = jax.tree.map(cast, llama.param_shapes(c, scan=scan))
    cache = jax.eval_shape(lambda: functions.init_cache(batch, length))
    return functions.step, (params, shaped((batch, tokens), jnp.int32), cache), (2,)


# Images


class ConvNet(nn.Module):
    """Residual blocks of two 3 x 3 convolutions, halved in size between stages."""

    widths: tuple[int, ...]
    blocks: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype, use_bias=False)
        for stage, width in enumerate(self.widths):
            stride = 1 if stage == 0 else 2
            x = conv(width, strides=(stride, stride))(x)
            for _ in range(self.blocks):
                y = conv(width)(nn.relu(nn.GroupNorm(16, dtype=self.dtype)(x)))
                x = x + conv(width)(nn.relu(nn.GroupNorm(16, dtype=self.dtype)(y)))
        return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)))


class ViT(nn.Module):
    """A vision transformer whose layers are one `nn.scan`, each under `nn.remat` if asked."""

    dim: int
    heads: int
    layers: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (16, 16), (16, 16), dtype=jnp.bfloat16)(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        layer = nn.remat(ViTLayer, prevent_cse=False) if self.remat else ViTLayer
        scan = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scan(self.dim, self.heads)(x, None)
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


class ViTLayer(nn.Module):
    dim: int
    heads: int

    @nn.compact
    def __call__(self, x, _):
        norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=jnp.bfloat16)(norm()(x))
        y = nn.gelu(nn.Dense(4 * self.dim, dtype=jnp.bfloat16)(norm()(x)))
        return x + nn.Dense(self.dim, dtype=jnp.bfloat16)(y), None


def linen_train(module: nn.Module, batch: int, size: int, optimizer: Any = None) -> Built:
    images, labels = shaped((batch, size, size, 3), jnp.bfloat16), shaped((batch,), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)

    def loss(params, images, labels):
        logits: Any = module.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return training_step(loss, params, images, labels, optimizer=optimizer)


# Experts


def moe_train(batch: int, length: int, dim: int, ffn: int, experts: int, layers: int) -> Built:
    """Top-1 routing with a fixed capacity: tokens are gathered to ``[E, C, D]`` and scattered back."""
    params = {
        "router": shaped((layers, dim, experts)),
        "up": shaped((layers, experts, dim, ffn)),
        "down": shaped((layers, experts, ffn, dim)),
        "out": shaped((dim, 1024)),
    }
    capacity = batch * length // experts

    def layer(x, w):
        rows = x.reshape(-1, dim)
        gates = jax.nn.softmax(rows @ w["router"].astype(x.dtype))
        score, expert = gates.max(-1), gates.argmax(-1)
        slot = jnp.cumsum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
        slot = jnp.take_along_axis(slot, expert[:, None], axis=1)[:, 0] - 1
        inputs = jnp.zeros((experts, capacity, dim), x.dtype)
        inputs = inputs.at[expert, slot].set(rows, mode="drop")
        hidden = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", inputs, w["up"].astype(x.dtype)))
        outputs = jnp.einsum("ecf,efd->ecd", hidden, w["down"].astype(x.dtype))
        picked = outputs.at[expert, slot].get(mode="fill", fill_value=0)
        return x + (score[:, None] * picked).reshape(x.shape), None

    def loss(params, x, labels):
        stacks = {name: params[name] for name in ("router", "up", "down")}
        x, _ = jax.lax.scan(layer, x, stacks)
        return nll_of((x @ params["out"].astype(x.dtype)).astype(jnp.float32), labels)

    x = shaped((batch, length, dim), jnp.bfloat16)
    return training_step(loss, params, x, shaped((batch, length), jnp.int32))


def soft_moe_train(batch: int, length: int, dim: int, ffn: int, experts: int, layers: int) -> Built:
    """Every expert sees every token, one expert after another in a scan; layers are unrolled."""
    layer = {"router": (dim, experts), "up": (experts, dim, ffn), "down": (experts, ffn, dim)}
    shapes = {name: shaped(shape) for name, shape in layer.items()}
    params = {"layers": [shapes] * layers, "out": shaped((dim, 1024))}

    def experts_of(x, w):
        gates = jax.nn.softmax(x @ w["router"].astype(x.dtype))

        @jax.checkpoint
        def one(total, expert):
            up, down, gate = expert
            y = jax.nn.silu(x @ up.astype(x.dtype)) @ down.astype(x.dtype)
            return total + gate[..., None] * y, None

        stacks = (w["up"], w["down"], jnp.moveaxis(gates, -1, 0))
        return jax.lax.scan(one, jnp.zeros_like(x), stacks)[0]

    def loss(params, x, labels):
        for w in params["layers"]:
            x = x + experts_of(x, w)
        return nll_of((x @ params["out"].astype(x.dtype)).astype(jnp.float32), labels)

    x = shaped((batch, length, dim), jnp.bfloat16)
    return training_step(loss, params, x, shaped((batch, length), jnp.int32))


# Long contexts


def chunked_attention(q, k, v, chunk: int) -> jax.Array:
    """Attention of ``[B, T, N, H]``, `chunk` queries at a time, each chunk recomputed backwards."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(q):
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(q.dtype)
        return jnp.einsum("bnqk,bknh->bqnh", weights, v)

    chunks = jnp.moveaxis(q.reshape(q.shape[0], -1, chunk, *q.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(one, chunks), 0, 1).reshape(q.shape)


def long_context_train(length: int, dim: int, heads: int, layers: int, chunk: int) -> Built:
    """One long sequence: attention in chunks, every layer of the scan under `jax.checkpoint`."""
    shapes = {"qkv": (dim, 3 * dim), "o": (dim, dim), "up": (dim, 4 * dim), "down": (4 * dim, dim)}
    stacks = {name: shaped((layers, *shape)) for name, shape in shapes.items()}
    params = {"layers": stacks, "out": shaped((dim, 4096))}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, w):
        w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), w)
        q, k, v = jnp.split((x @ w["qkv"]).reshape(*x.shape[:2], heads, -1), 3, axis=-1)
        x = x + chunked_attention(q, k, v, chunk).reshape(x.shape) @ w["o"]
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    def loss(params, x, labels):
        x, _ = jax.lax.scan(layer, x, params["layers"])
        return nll_of((x @ params["out"].astype(x.dtype)).astype(jnp.float32), labels)

    x = shaped((1, length, dim), jnp.bfloat16)
    return training_step(loss, params, x, shaped((1, length), jnp.int32))


# Other people's modules


def penzai_train(layers: int, batch: int, length: int) -> Built:
    """A Llama-like model of Penzai, unrolled, in float32."""
    c = pz_llama.LlamalikeTransformerConfig(
        num_kv_heads=8,
        query_head_multiplier=1,
        embedding_dim=1024,
        projection_dim=128,
        mlp_hidden_dim=4096,
        num_decoder_blocks=layers,
        vocab_size=8192,
        mlp_variant="swiglu",
        tie_embedder_and_logits=True,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    build = lambda: pz.unbind_params(
        pz_llama.build_llamalike_transformer(c, jax.random.key(0)), freeze=True
    )
    model, variables = jax.eval_shape(build)
    model = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model)  # a few scalars

    def loss(variables, tokens):
        bound = pz.bind_variables(model, variables)
        logits = bound(pz.nx.wrap(tokens[:, :-1], "batch", "seq"))
        return nll_of(logits.unwrap("batch", "seq", "vocabulary"), tokens[:, 1:])

    return training_step(loss, variables, shaped((batch, length + 1), jnp.int32))


def equinox_train(layers: int, batch: int, dim: int) -> Built:
    """A deep `equinox.nn.MLP` in float32 under `jax.vmap`."""
    model = eqx.filter_eval_shape(
        lambda: eqx.nn.MLP(dim, dim, 4 * dim, layers, jax.nn.gelu, key=jax.random.key(0))
    )
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def loss(params, x, y):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    return training_step(loss, params, shaped((batch, dim)), shaped((batch, dim)))


def haiku_train(batch: int, length: int, dim: int, layers: int) -> Built:
    """A Haiku transformer in float32, unrolled, with Haiku's own remat around each feed-forward."""

    def forward(x):
        for _ in range(layers):
            norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)
            attention = hk.MultiHeadAttention(
                dim // 128, 128, model_size=dim, w_init=hk.initializers.RandomNormal(0.02)
            )
            y = norm(x)
            x = x + attention(y, y, y)
            mlp = hk.Sequential([hk.Linear(4 * dim), jax.nn.gelu, hk.Linear(dim)])
            x = x + hk.remat(mlp)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))
        return hk.Linear(1024)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    x = shaped((batch, length, dim))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    loss = lambda params, x, labels: nll_of(model.apply(params, x), labels)
    return training_step(loss, params, x, shaped((batch, length), jnp.int32))


# The table

_SMALL = config(1024, 8, heads=16, kv_heads=8, ffn=2816)
_SHALLOW = config(1024, 4, heads=16, kv_heads=8, ffn=2816)
_WIDE = config(2048, 4, heads=16, kv_heads=4, ffn=5632)
_DEEP = config(768, 12, heads=12, kv_heads=12, ffn=2048, vocab=49_152)
_LARGE = config(2048, 16, heads=16, kv_heads=8, ffn=8192, vocab=128_256)


def _row(tuned: bool, build: Callable[..., Built], *args: Any, **options: Any) -> Program:
    return Program(functools.partial(build, *args, **options), tuned)


tuned = functools.partial(_row, True)
held_out = functools.partial(_row, False)

PROGRAMS: Mapping[str, Program] = {
    "llama-train": tuned(llama_train, _SMALL, 4, 1024),
    "llama-train-unrolled": tuned(llama_train, _SHALLOW, 8, 1024, scan=False),
    "llama-train-full-remat": tuned(llama_train, _SMALL, 8, 1024, policy="full"),
    "llama-train-offload-carry": tuned(llama_train, _SMALL, 8, 1024, policy="offload_carry"),
    "llama-decode": tuned(llama_step, _LARGE, 16, 1, 4096),
    "llama-prefill": tuned(llama_step, _LARGE, 1, 4096, 4096),
    "llama-prefill-short": tuned(llama_step, _SMALL, 16, 512, 2048),
    "convnet-train": tuned(linen_train, ConvNet((128, 256), 1), 256, 64),
    "moe-train": tuned(moe_train, 8, 2048, 1024, 4096, 8, 4),
    "equinox-mlp-train": tuned(equinox_train, 6, 16_384, 1024),
    "long-context-train": tuned(long_context_train, 32_768, 1024, 8, 4, 512),
    "llama-train-wide": tuned(llama_train, _WIDE, 4, 2048, policy="dots_no_batch"),
    "llama-train-wide-full-remat": tuned(llama_train, _WIDE, 4, 2048, policy="full"),
    "llama-train-wide-dots": tuned(llama_train, _WIDE, 4, 2048, policy="dots"),
    "llama-train-no-batch-dots": held_out(llama_train, _SMALL, 8, 1024, policy="dots_no_batch"),
    "llama-train-dots": held_out(llama_train, _SMALL, 8, 1024, policy="dots"),
    "llama-train-deep-dots": held_out(llama_train, _DEEP, 4, 1024, policy="dots"),
    "llama-train-unrolled-remat": held_out(
        llama_train, _SHALLOW, 8, 1024, scan=False, policy="full"
    ),
    "llama-train-offload-dots": held_out(llama_train, _WIDE, 4, 1024, policy="offload_dots"),
    "llama-decode-unrolled": tuned(llama_step, _SMALL, 64, 1, 4096, scan=False),
    "soft-moe-train": held_out(soft_moe_train, 8, 1024, 1024, 2816, 8, 2),
    "vit-linen-train": held_out(linen_train, ViT(1024, 16, 8), 64, 256),
    "vit-linen-remat": held_out(linen_train, ViT(1024, 16, 8, remat=True), 128, 256),
    "haiku-train": held_out(haiku_train, 8, 1024, 1024, 4),
    "penzai-train": held_out(penzai_train, 4, 8, 1024),
    "haiku-train-long": held_out(haiku_train, 4, 2048, 1024, 2),
    "llama-train-short": held_out(llama_train, _DEEP, 16, 512),
    "vit-linen-small": held_out(linen_train, ViT(768, 12, 12), 64, 224),
    "soft-moe-deep": held_out(soft_moe_train, 16, 1024, 1024, 2816, 4, 4),
}

# A program, and others that differ from it in what is recomputed.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "llama-train-full-remat": (
        "llama-train-no-batch-dots",
        "llama-train-dots",
        "llama-train-offload-carry",
    ),
    "llama-train-wide": ("llama-train-wide-full-remat", "llama-train-wide-dots"),
    "vit-linen-remat": ("vit-linen-train",),
}
