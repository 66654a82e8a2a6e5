"""Decode attention over packed rows: every implementation against plain attention, masks, lengths, bad input."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from stowax.pallas_kernels import FullRows, Rows, decode_attention, pack_rows
from stowax.pallas_kernels.codecs import per_channel, per_token
from stowax.pallas_kernels.decode_attention import join, joined, mosaic_gpu, xla
from stowax.pallas_kernels.decode_attention.mosaic_gpu import Config

CODECS = {
    "int8": per_token("int8"),
    "int4": per_token("int4-g32"),
    "rotated": per_token("int4-g32-sym", rotate=True),
    "int2": per_token("int2-g32"),
    "levels": per_token("lm2-g32", rotate=True),
    "per channel": per_channel("int2-asym", 32),
    "16 bits": per_token("bf16"),
}
MASKS = {
    "plain": {},
    "window": {"window": 40},
    "soft cap": {"soft_cap": 3.0, "scale": 0.3},
}


def operands(key, value, b=2, n=4, k=2, s=128, h=64, dtype="float32"):
    rng = np.random.default_rng(0)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows = (pack_rows(x(b, k, s, h), codec) for codec in (key, value))
    return x(b, n, h).astype(dtype), *rows


def masked_rows(b=2, k=2, s=128, h=64, rows=5, heads=True):
    """Which tokens are seen, some that are hidden, and rows in full."""
    rng = np.random.default_rng(1)
    lead = (b, k) if heads else (b,)
    flags = lambda n: jnp.asarray(rng.random((*lead, n)) < 0.6)
    x = lambda n: jnp.asarray(rng.standard_normal((b, k, n, h)), jnp.float32)
    full = tuple(FullRows(x(n), x(n), flags(n)) for n in (rows, 1))
    hidden = jnp.asarray(rng.integers(-1, s + 2, (b, 9)), jnp.int32)
    return {"seen": flags(s), "hidden": hidden, "full": full}


def plain(
    q,
    keys,
    values,
    lengths,
    scale=None,
    soft_cap=None,
    window=None,
    seen=None,
    hidden=None,
    full=(),
):
    """In numpy, query by query. The third result is the weights of all rows."""
    q, k, v = (
        np.asarray(x, np.float64)
        for x in (q, jax.jit(Rows.decode)(keys), jax.jit(Rows.decode)(values))
    )
    heads = full[0].keys.shape[1] if full else keys.heads
    sizes = sum((part.keys.shape[2] for part in full), keys.tokens)
    out, total = np.zeros(q.shape), np.full(q.shape[:2], -math.inf)
    weights, at = np.zeros((*q.shape[:2], sizes)), np.arange(keys.tokens)
    for b, n in np.ndindex(*q.shape[:2]):
        head = n // (q.shape[1] // heads)
        own, stop = head % keys.heads, int(lengths[b] if lengths.ndim == 1 else lengths[b, head])
        shown = (at < stop) & (at >= (0 if window is None else stop - window))
        if seen is not None:
            shown &= np.asarray(seen[b, head] if seen.ndim == 3 else seen[b])
            shown[[i for i in np.asarray(hidden[b]) if 0 <= i < len(shown)]] = False
        of_head = lambda x, b=b, head=head: x[b, head] if x.ndim == 3 else x[b]
        shown = np.concatenate([shown, *(of_head(part.seen) for part in full)])
        if not shown.any():
            continue
        rows = np.concatenate([k[b, own], *(part.keys[b, head] for part in full)])
        x = rows @ q[b, n] * (q.shape[-1] ** -0.5 if scale is None else scale)
        x = np.where(shown, soft_cap * np.tanh(x / soft_cap) if soft_cap else x, -math.inf)
        total[b, n] = np.logaddexp.reduce(x)
        weights[b, n] = np.exp(x - total[b, n])
        out[b, n] = weights[b, n] @ np.concatenate([v[b, own], *(p.values[b, head] for p in full)])
    return out, total, weights


def close(got, want, tolerance):
    assert float(jnp.linalg.norm(got[0] - want[0]) / jnp.linalg.norm(want[0])) < tolerance
    np.testing.assert_allclose(got[1], want[1], atol=10 * tolerance)
    for weights in got[2:]:  # where they were asked for
        both = (
            np.concatenate(x, axis=2) if isinstance(x, tuple) else x for x in (weights, want[2])
        )
        np.testing.assert_allclose(*both, atol=tolerance)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_codecs(codec, implementation):
    args = operands(CODECS[codec], CODECS["int8"])
    lengths = jnp.array([100, 1])
    run = functools.partial(decode_attention, implementation=implementation)
    close(jax.jit(run)(*args, lengths), plain(*args, lengths), 1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_masks_and_lengths(mask, implementation, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_BYTES", 8 * 2 * 2 * 64 * 32)  # blocks of 32 tokens
    args = operands(CODECS["int4"], CODECS["int4"])
    for lengths in ([0, 128], [[33, 64], [128, 7]]):
        run = functools.partial(decode_attention, implementation=implementation, **MASKS[mask])
        lengths = jnp.array(lengths)
        close(jax.jit(run)(*args, lengths), plain(*args, lengths, **MASKS[mask]), 1e-5)


@pytest.mark.parametrize("heads", ["one for all heads", "by head, a pool"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_holes_and_rows_in_full(heads, implementation, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK_BYTES", 8 * 2 * 2 * 64 * 32)
    args = operands(CODECS["int4"], CODECS["int4"], k=1 if "pool" in heads else 2)
    options = masked_rows(heads="by head" in heads) | {"window": 70, "soft_cap": 5.0}
    lengths = jnp.array([0, 100])
    run = functools.partial(decode_attention, implementation=implementation, weights=True)
    got = jax.jit(lambda options: run(*args, lengths, **options, window=70, soft_cap=5.0))(
        {name: options[name] for name in ("seen", "hidden", "full")}
    )
    close(got, plain(*args, lengths, **options), 1e-5)


def test_parts_join_by_their_logarithms():
    """Attention to two caches is attention to both, weighted by the denominators."""
    q, keys, values = operands(CODECS["int8"], CODECS["int8"])
    half = lambda rows, i: Rows(
        jax.tree.map(lambda x: x[:, :, 64 * i : 64 * i + 64], rows.parts), rows.codec, rows.width
    )
    full = jnp.array([64, 64])
    a, b = (decode_attention(q, half(keys, i), half(values, i), full) for i in range(2))
    share = jax.nn.sigmoid(a[1] - b[1])[..., None]
    whole = decode_attention(q, keys, values, 2 * full)
    np.testing.assert_allclose(a[0] * share + b[0] * (1 - share), whole[0], atol=1e-5)


def test_vmap_and_scan():
    q, keys, values = operands(CODECS["int4"], CODECS["int4"])
    lengths = jnp.array([100, 7])
    want = decode_attention(q, keys, values, lengths)[0]
    got = jax.vmap(lambda q: decode_attention(q, keys, values, lengths)[0])(jnp.stack([q, q]))
    np.testing.assert_allclose(got[1], want, atol=1e-6)
    step = lambda q, _: (decode_attention(q, keys, values, lengths)[0], None)
    got = jax.lax.scan(step, q, None, length=1)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


# The Hopper kernel, in the interpreter and lowered for CUDA

KV = {n: (per_channel(f"lm{n}", 32), per_token(f"lm{n}-g32", rotate=True)) for n in (2, 4)}


def kivi(bits, tokens=32):
    return per_channel(f"int{bits}-asym", tokens), per_token(f"int{bits}-g32-asym")


GPU = {
    "int4, zeros, soft cap": (
        "int4-g32",
        70,
        {"soft_cap": 3.0, "weights": True},
        Config(2, 1, 1),
        {},
    ),
}
GPU_SLOW = {
    "int4, window": ("int4-g64", 256, {"window": 70}, Config(1, 2, 2), {"s": 256}),
    "int4, an odd tile": ("int4-g64", 150, {"window": 70, "weights": True}, Config(1, 2, 1, 2), {"s": 192}),
    "int4, many queries": ("int4-g64", 150, {"holes": 1, "weights": True}, Config(2, 2, 1), {"s": 192, "n": 12}),
    "int4, heads of 64": ("int4-g32", 100, {}, Config(1, 2, 1), {"h": 64}),
    "int2, rows of 32 bytes": ("int2-g64-sym", 128, {}, Config(2, 2, 1, 2), {}),
    "int4, holes": ("int4-g64", 250, {"holes": 1, "weights": True}, Config(1, 2, 2), {"s": 256}),
    "int4, ragged heads": ("int4-g64", [250, 3], {"window": 70, "weights": True}, Config(1, 2, 2), {"s": 256, "k": 2}),
    "int4, a pool": ("int4-g64", 250, {"holes": 2, "weights": True}, Config(1, 2, 2), {"s": 256}),
    "int4, rotated": ("int4-g64-sym", 128, {}, Config(1, 1, 1), {"n": 20, "rotate": True}),
    "int8": ("int8", 100, {}, Config(1, 1, 1), {}),
    "int8, zeros, half rows": ("int8-g32-asym", 128, {}, Config(1, 1, 1), {"h": 64}),
    "int2": ("int2-g64", 128, {}, Config(1, 1, 1), {"h": 256}),
    "f32": ("int4-g32", 128, {}, Config(1, 1, 1), {"dtype": "float32"}),
    "f16": ("int4-g32", 128, {}, Config(1, 1, 1), {"dtype": "float16"}),
    "int8, f32 scales": ("int8-g64-f32", 128, {}, Config(1, 1, 1), {}),
    "levels": ("lm4-g32", 128, {}, Config(1, 1, 1), {"rotate": True}),
    "2-bit levels": ("lm2-g32", 128, {}, Config(1, 1, 1), {"h": 256}),
    "kv4": (KV[4], 250, {"holes": 1, "weights": True}, Config(2, 2, 1), {"s": 256}),
    "kv3": ((KV[4][0], KV[2][1]), 100, {}, Config(1, 1, 1), {}),
    "kv2": (KV[2], 250, {"window": 100}, Config(2, 2, 1, 2), {"s": 256}),
    "kivi2": (kivi(2), 150, {"holes": 1, "weights": True}, Config(1, 1, 1, 2), {"s": 192}),
    "kivi2, many queries": (kivi(2), 128, {"holes": 1, "weights": True}, Config(1, 1, 1), {"n": 9}),
    "kivi4": (kivi(4), 128, {"window": 90}, Config(1, 1, 1, 2), {}),
    "kivi4, heads of 64": (kivi(4), 128, {}, Config(1, 1, 1), {"h": 64}),
    "kivi4, blocks of 64": (kivi(4, 64), 128, {}, Config(1, 1, 1, 2), {}),
    "int8 per channel": ((per_channel("int8", 32), per_token("int8")), 128, {}, Config(1, 1, 1), {}),
}  # fmt: skip


def gpu_operands(codecs, rotate=False, n=2, k=1, s=128, h=128, dtype="bfloat16"):
    if isinstance(codecs, str):
        codecs = 2 * (per_token(codecs, rotate=rotate),)
    return operands(*codecs, b=1, n=n, k=k, s=s, h=h, dtype=dtype)


def check_on_gpu(codecs, length, mask, config, changes):
    args = (*gpu_operands(codecs, **changes), jnp.array([length]))
    options = {"scale": 0.09, "soft_cap": None, "window": None} | mask
    if heads := options.pop("holes", 0):
        options |= masked_rows(1, heads, args[1].tokens, args[0].shape[-1])
    run = functools.partial(mosaic_gpu.decode_attention, config=config, interpret=True, **options)
    got = jax.jit(run)(*args)
    want = decode_attention(*args, implementation="reference", **options)
    assert got[0].dtype == args[0].dtype
    close(*jax.tree.map(lambda x: x.astype(jnp.float32), (got, want)), 1e-2)


@pytest.mark.parametrize("name", GPU)
def test_kernel(name):
    check_on_gpu(*GPU[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_SLOW)
def test_kernel_of_every_form(name):
    check_on_gpu(*GPU_SLOW[name])


JOINS = {
    "many rows": (
        {"parts": 40, "h": 32, "rows": (3, 70, 1)},
        {"rotated": True, "soft_cap": None, "weights": True},
    ),
    "by head, capped": ({"heads": 2, "rows": (5,)}, {"rotated": False, "soft_cap": 3.0}),
    "more by matmuls": ({"rows": (3, 20)}, {"rotated": False, "soft_cap": None, "weights": True}),
}


@pytest.mark.parametrize("name", JOINS)
def test_joining_kernel(name, monkeypatch):
    """Also where no part has seen a row, and where tiles do not hold all."""
    shape, options = JOINS[name]
    monkeypatch.setattr(join, "TILE", 1024)
    monkeypatch.setattr(joined, "MANY", 16 if "matmuls" in name else 512)
    args = parts_and_rows(**shape)
    run = functools.partial(join.kernel, scale=0.2, **options, interpret=True)
    want = joined.join(*args, scale=0.2, **options)
    close(jax.jit(run)(*args), want, 1e-5)


def parts_and_rows(b=1, k=2, parts=6, g=2, h=64, rows=(), heads=1):
    rng = np.random.default_rng(0)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    flags = lambda n: jnp.asarray(rng.random((b, heads, n)) < 0.6)
    logs = 3 * x(b, k, parts, g)
    logs = jnp.where(jnp.asarray(rng.random(logs.shape)) < 0.3, joined.NEVER, logs)
    logs = logs.at[0, 0].set(joined.NEVER)
    full = tuple(FullRows(x(b, k, n, h), x(b, k, n, h), flags(n)) for n in rows)
    return (x(b, k, parts, g, h), logs), x(b, k * g, h), full


@pytest.mark.parametrize(
    "codecs",
    ["int8", "int4-g64-sym", "int4-g32", "int2-g64", KV[4], KV[2], kivi(2), kivi(4)],
    ids=str,
)
def test_an_exported_program_holds_the_kernel_for_cuda(codecs):
    shapes = jax.eval_shape(lambda: gpu_operands(codecs))
    leaves, tree = jax.tree.flatten((*shapes, jax.ShapeDtypeStruct((1,), jnp.int32)))
    weights = isinstance(codecs, tuple)
    flat = jax.jit(lambda *x: decode_attention(*jax.tree.unflatten(tree, x), weights=weights))
    exported = export.export(flat, platforms=("cpu", "cuda"))(*leaves)
    assert "mosaic_gpu" in exported.mlir_module()
    export.deserialize(exported.serialize())


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        (per_token("int4-g32"), {"dtype": "float8_e4m3fn"}, "q is float8_e4m3fn"),
        (per_token("int4-g32"), {"s": 96}, "S = 96"),
        (per_token("int4-g32"), {"h": 64, "n": 32}, "32 bytes, not 64 or 128"),
        (per_channel("int4-asym", 16), {}, "keys: int4 per channel of 16 tokens: a block has 32"),
        (per_channel("lm4-f32"), {}, "keys: lm4-f32 per channel of 32 tokens: scales are not float16"),
        (per_token("lm3-g32"), {}, "keys: no kernel for lm3"),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_goes_to_another_path(key, shape, reason):
    options = {"h": 128, "dtype": "bfloat16"} | shape
    args = jax.eval_shape(lambda: operands(key, per_token("int4-g32"), **options))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            functools.partial(decode_attention, implementation="mosaic_gpu"), *args, lengths
        )
    out, total = jax.eval_shape(decode_attention, *args, lengths)
    assert out.shape == args[0].shape
    assert total.shape == args[0].shape[:2]


def test_bad_input():
    q, keys, values = operands(CODECS["int8"], CODECS["int8"])
    lengths = jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"`q` \(2, 3, 64\)"):
        decode_attention(q[:, :3], keys, values, lengths)
    with pytest.raises(ValueError, match="`lengths` is float32"):
        decode_attention(q, keys, values, lengths.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"`seen` is int32\[2, 128\]"):
        decode_attention(q, keys, values, lengths, seen=jnp.ones((2, 128), jnp.int32))
    with pytest.raises(ValueError, match=r"`full` has keys \(2, 2, 5, 32\)"):
        decode_attention(q, keys, values, lengths, full=masked_rows(h=32)["full"])
    with pytest.raises(ValueError, match="`window` is 0"):
        decode_attention(q, keys, values, lengths, window=0)
    with pytest.raises(ValueError, match="`soft_cap` is -1"):
        decode_attention(q, keys, values, lengths, soft_cap=-1)
    with pytest.raises(ValueError, match="`implementation` is 'flash'"):
        decode_attention(q, keys, values, lengths, implementation="flash")
