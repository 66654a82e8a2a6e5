"""Ways of a weight to its use: layout ops, casts, slices, tables, experts, convolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import stowax as sx
from stowax.transforms.core import is_packed
from tests.transforms.check import (
    Case,
    by_name,
    check_case,
    decode,
    randn,
    relative_error,
    rewrite,
    weight,
)

N = 16
X = randn(100, 4, N)
IDS = jnp.array([[2, 0], [1, 1]])


def on(fn, *shape, args=(X,)):
    """A case of one weight of `shape`."""
    return lambda: (lambda p, *rest: fn(p["w"], *rest), {"w": weight(0, *shape)}, args)


def fused_qkv(w, x):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    return q + k * v


def sliced_qkv(w, x):
    return x @ w[:, :N] + x @ w[:, N : 2 * N] * (x @ w[:, 2 * N :])


def split_qkv(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return x @ q + (x @ k) * (x @ v)


def heads_qkv(w, x):
    """[embed, 3, heads, dim], as some models store it."""
    q, k, v = jnp.moveaxis(w, 1, 0)
    dot = lambda a: jnp.einsum("te,ehd->htd", x, a)
    return dot(q) + dot(k) * dot(v)


def chosen_experts(w, x, ids):
    """Whole experts are gathered, a product for each token."""
    return jnp.einsum("td,tkdf->tkf", x[:2], w[ids])


def dynamic(w, x, i):
    return x @ lax.dynamic_slice(w, (i, 0, 0), (1, N, N))[0]


def dynamic_columns(w, x, i):
    return x @ lax.dynamic_slice(w, (0, i), (N, 8))


def grouped(w, x):
    return lax.ragged_dot(x, w, jnp.array([1, 2, 1], jnp.int32))


def half(w, x):
    return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)


def to_half_and_back(w, x):
    return x @ w.astype(jnp.bfloat16).astype(jnp.float32)


def accumulate_wide(w, x):
    numbers = (((1,), (0,)), ((), ()))
    half = jnp.bfloat16
    return lax.dot_general(
        x.astype(half), w.astype(half), numbers, preferred_element_type=jnp.float32
    )


def image(channels_last, groups=1):
    spec = ("NHWC", "HWIO", "NHWC") if channels_last else ("NCHW", "OIHW", "NCHW")
    return lambda w, x: lax.conv_general_dilated(
        x, w, (2, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


def concatenated(w, x):
    return x @ jnp.concatenate([w, x.T], axis=1) + x @ w[:, :1]


NHWC, NCHW = randn(1, 2, 6, 6, 4), randn(1, 2, 4, 6, 6)
TOKENS = (jnp.array([[3, 30, 0]]),)

CASES = [
    Case("matmul", on(lambda w, x: x @ w, N, N)),
    Case("left operand", on(lambda w, x: w @ x.T, N, N)),
    Case("transposed", on(lambda w, x: x @ w.T, N, N)),
    Case("batch axes of x", on(lambda w, x: jnp.einsum("abd,df->fab", x[None], w), N, N)),
    Case("experts", on(lambda w, x: jnp.einsum("ed,edf->ef", x, w), 4, N, N)),
    Case("experts, each every token", on(lambda w, x: jnp.einsum("td,edf->tef", x, w), 3, N, N)),
    Case("experts in the middle", on(lambda w, x: jnp.einsum("ed,dfe->fe", x, w), N, N, 4)),
    Case("heads in", on(lambda w, x: jnp.einsum("td,dhk->thk", x, w), N, 2, 8)),
    Case("heads out", on(lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(4, 2, 8), w), 2, 8, N)),
    Case("heads out, axes swapped", on(lambda w, x: jnp.einsum("tkh,hkd->td", x.reshape(4, 8, 2), w), 2, 8, N)),
    Case("heads merged", on(lambda w, x: x @ w.reshape(N, -1), N, 2, 8)),
    Case("heads split", on(lambda w, x: jnp.einsum("td,dhk->htk", x, w.reshape(N, 2, 8)), N, N)),
    Case("inputs split", on(lambda w, x: jnp.einsum("tab,abf->tf", x.reshape(4, 2, 8), w.reshape(2, 8, N)), N, N)),
    Case("fused qkv", on(fused_qkv, N, 3 * N)),
    Case("fused qkv, sliced", on(sliced_qkv, N, 3 * N)),
    Case("fused qkv, split", on(split_qkv, N, 3 * N)),
    Case("fused qkv, moveaxis", on(heads_qkv, N, 3, 2, 8)),
    Case("layer of a stack", on(lambda w, x: x @ w[1], 3, N, N)),
    Case("layer of a stack, index", on(dynamic, 3, N, N, args=(X, jnp.int32(2)))),
    Case("layer of a stack, take", on(lambda w, x: x @ jnp.take(w, 1, axis=0), 3, N, N)),
    Case("columns, index", on(dynamic_columns, N, 3 * N, args=(X, jnp.int32(7)))),
    Case("every second column", on(lambda w, x: x @ w[:, ::2], N, N)),
    Case("axes of size one", on(lambda w, x: (x[None] @ w[None])[0], N, N)),
    Case("one output", on(lambda w, x: x @ w, N, 1)),
    Case("half precision", on(half, N, N), rounding=6e-3),
    Case("to half and back", on(to_half_and_back, N, N), rounding=6e-3),
    Case("half precision, wide sums", on(accumulate_wide, N, N), rounding=6e-3),
    Case("highest precision", on(lambda w, x: jnp.dot(x, w, precision="highest"), N, N)),
    Case("table", on(lambda w, ids: w[ids], 50, N, args=TOKENS)),
    Case("table, take", on(lambda w, ids: jnp.take(w, ids, axis=0), 50, N, args=TOKENS)),
    Case("table, take clips", on(lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"), 50, N, args=TOKENS)),
    Case("table by columns", on(lambda w, ids: jnp.take(w, ids, axis=1), N, 50, args=TOKENS)),
    Case("one hot", on(lambda w, ids: jax.nn.one_hot(ids, 50) @ w, 50, N, args=TOKENS)),
    Case("tied table", on(lambda w, ids: jnp.tanh(w[ids]) @ w.T, 50, N, args=TOKENS)),
    Case("chosen experts", on(chosen_experts, 3, N, N, args=(X, IDS))),
    Case("ragged dot", on(grouped, 3, N, N)),
    Case("convolution, channels last", on(image(True), 3, 3, 4, 8, args=(NHWC,))),
    Case("convolution, channels first", on(image(False), 8, 4, 3, 3, args=(NCHW,))),
    Case("convolution by channel", on(image(True, 4), 3, 3, 1, 8, args=(NHWC,))),
    Case("used as it is too", on(lambda w, x: x @ w + jnp.sum(w**2), N, N), how=("xla", "decode")),
    Case("concatenated", on(concatenated, N, N), how=("xla", "decode")),
    Case("a slice of the inputs", on(lambda w, x: x[:, :8] @ w[:8] + x @ w, N, N), how=("xla", "decode")),
    Case("two matmuls, two axes", on(lambda w, x: (x @ w) @ w.T, N, N), how=("xla", "decode")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_case(case):
    check_case(case)


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_rows_out_of_range(mode):
    """A table's rows beyond its ends are what they were."""
    ids = jnp.array([-1, 0, 49, 50, -51, 1000])
    fn = lambda p, ids: jnp.take(p["w"], ids, axis=0, mode=mode)
    fast, encoded = rewrite(fn, {"w": weight(0, 50, N)}, ids)
    got, want = fast(encoded, ids), fn(decode(encoded), ids)
    assert jnp.array_equal(got, want, equal_nan=True)


def test_weights_as_results():
    """Packed leaves in nested results come out as tensors."""
    fn = lambda p, x: {"y": [x @ p["w"], p["w"].T], "same": p}
    params = {"w": weight(0, N, N), "b": randn(1, N)}
    fast, encoded = rewrite(fn, params, X)
    assert relative_error(fast(encoded, X), fn(decode(encoded), X)) < 1e-6


def test_low_rank_update():
    """``w + a @ b`` is no stored tensor: it is computed, and the report says from what."""
    params = {"w": weight(0, N, N), "a": weight(1, N, 2), "b": weight(2, 2, N)}
    fn = lambda p, x: x @ (p["w"] + p["a"] @ p["b"])
    fast, encoded = rewrite(fn, params, X)
    explained = fast.explain(encoded, X)
    assert explained["w"].reason == "no weight: used by add (`add` has no low-bit form)"
    assert relative_error(fast(encoded, X), fn(decode(encoded), X)) < 1e-6


def test_a_function_of_a_weight_is_kept():
    params = {"w": weight(0, N, N), "t": weight(1, N, N)}
    fn = lambda p, x: x @ p["w"] @ jnp.tanh(p["t"])
    fast, encoded = rewrite(fn, params, X)
    assert encoded["t"] is params["t"]
    row = fast.explain(encoded, X)["t"]
    assert row.reason == "no weight: used by tanh (`tanh` has no low-bit form)"


def test_one_input_is_kept():
    """A scale for each number would be more bytes, not fewer."""
    params = {"w": weight(0, 1, N), "v": weight(1, N, N)}
    fast = sx.quantize("int8")(lambda p, x: (x[:, :1] @ p["w"]) @ p["v"])
    assert not is_packed(fast.encode(params, X)["w"])


def contracted(w, x):
    return jnp.dot(x, w, out_sharding=PartitionSpec(None, None))


@pytest.mark.parametrize(
    ("fn", "shape", "spec"),
    [
        (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (4, 3, N), ("d", None, None)),
        (contracted, (4, N), (None, "d")),
    ],
)
def test_explicit_shardings(fn, shape, spec):
    """Types that name mesh axes stay as they are; the weight is decoded, and the report says so."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    w = weight(0, N, 2, 8) if len(shape) == 3 else weight(0, N, N)
    with jax.set_mesh(mesh):
        x = jax.device_put(randn(1, *shape), jax.sharding.NamedSharding(mesh, PartitionSpec(*spec)))
        original = jax.jit(lambda p, x: fn(p["w"], x))
        fast, encoded = rewrite(original, {"w": w}, x)
        got, want = jax.jit(fast)(encoded, x), original(decode(encoded), x)
        assert jax.typeof(got) == jax.typeof(want)
        assert relative_error(got, want) < 1e-6
        use = fast.explain(encoded, x)["w"].uses[0]
        assert (use.how, use.reason) == ("decode", "the matmul has explicit shardings")
