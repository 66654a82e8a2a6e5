"""Properties of every codec in the table. A new line there inherits them all."""

import functools
import pathlib
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs.fp8 import Fp8
from stowax.pallas_kernels.codecs.mx import Mx
from stowax.pallas_kernels.codecs.nf4 import LEVELS
from stowax.pallas_kernels.codecs.table import CODECS

NAMES = codecs.names()
FAMILIES = (
    *("int1", "int3-g64", "int4-g64", "int5-g32-sym", "int8", "int4-tensor", "nf4-g64"),
    *("fp8_e4m3-g128", "fp8_e5m2", "mxfp4", "mxfp8_e4m3", "nvfp4", "qoq4-g32", "bf16"),
)
GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
ROUNDED = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-23}  # of a scale, relative
KINDS = ("normal", "skewed", "outlier", "zeros", "constant", "sparse", "negative zero", "tiny")


def shape_of(codec) -> tuple[int, ...]:
    """One shape for most tests (XLA compiles once): with a ragged last group where it may be."""
    return (2, 30, codec.block if isinstance(codec, codecs.BlockCodec) else 80)


def sample(kind: str, shape: tuple[int, ...], seed: int, magnitude: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * magnitude
    match kind:
        case "skewed":
            x = np.abs(x) - 0.2 * magnitude
        case "outlier":
            x[..., rng.integers(shape[-1])] *= 50
        case "zeros":
            x[..., : shape[-1] // 2] = 0
        case "constant":
            x[...] = x.flat[0]
        case "sparse":
            x *= rng.random(shape) < 0.1
        case "negative zero":
            x[..., ::2] = -0.0
        case "tiny":
            x[..., 1:] *= 1e-6
    return x.astype(np.float32)


@functools.cache
def decoder(codec):
    return jax.jit(codec.decode, static_argnums=1)


def bound(codec, x: np.ndarray, parts) -> np.ndarray:
    """The largest error that the codec's definition allows for each element."""
    if isinstance(codec, codecs.Cast):
        return np.abs(x) * ROUNDED[codec.dtype] + 2.0**-24
    if isinstance(codec, codecs.BlockCodec):
        return np.full_like(x, 0) + gguf_bound(codec.name, x)
    groups = np.asarray(codec.split(jnp.asarray(x)))
    params = codec.load({k: v for k, v in parts.items() if k != "codes"})
    scale = np.abs(np.asarray(params["scale"]))
    rounded = ROUNDED[getattr(codec, "scale_dtype", "f32")]
    slack = scale * rounded + (2.0**-25 if rounded == 2.0**-11 else 2.0**-126)
    if isinstance(codec, codecs.Int):
        steps = 1.0 if codec.symmetric else 0.5
        error = steps * scale + codec.last * slack
        if codec.bits == 1 and codec.symmetric:
            error = np.maximum(scale / 2, np.abs(groups)) + slack
    elif isinstance(codec, codecs.NF4):
        error = np.diff(LEVELS).max() / 2 * scale + slack
    elif isinstance(codec, codecs.LloydMax):
        beyond = np.abs(groups - np.asarray(params["mean"])) - codec.levels[-1] * scale
        error = np.maximum(np.diff(codec.levels).max() / 2 * scale, beyond) + slack
    elif isinstance(codec, codecs.Nvfp4):
        tensor = np.asarray(params["tensor_scale"])
        error = scale * tensor * (1 + 6 / 16) + 6 * tensor * 2.0**-10
    elif isinstance(codec, codecs.Qoq4):
        step = scale * np.asarray(params["channel_scale"])
        error = np.maximum(step / 2, np.abs(groups) - 7 * step) + 1e-5 * step
    elif isinstance(codec, Mx) and codec.element == "e2m1":
        error = 2 * scale  # what lies between 6 and 8 saturates
    else:
        assert isinstance(codec, Fp8 | Mx)
        mantissa, least = {"e4m3": (3, 2.0**-9), "e5m2": (2, 2.0**-16)}[codec.element]
        relative = 2.0 ** -(mantissa + 1)
        relative = max(relative, 1 / 8) if isinstance(codec, Mx) else relative  # saturation
        error = np.abs(groups) * relative + scale * least + codec.largest * slack
    error = np.broadcast_to(error, groups.shape) * (1 + 1e-4)
    return np.asarray(codec.join(jnp.asarray(error), x.shape[-1]))


def gguf_bound(name: str, x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(*x.shape[:-1], -1, codecs.get(name).block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    low = -np.minimum(blocks.min(-1, keepdims=True), 0)
    span = np.maximum(blocks.max(-1, keepdims=True), 0) + low
    error = {
        "q4_0": largest / 8,
        "q4_1": span / 30,
        "q5_0": largest / 16,
        "q5_1": span / 62,
        "q8_0": largest / 254,
        "q4_k": span / 30 + span / 126 + low / 126,
        "q5_k": span / 62 + span / 126 + low / 126,
        "q6_k": largest / 32 + largest / 256,
    }[name]
    error = error * 1.01 + largest * 2.0**-10 + 63 * 31 * 2.0**-24
    return np.broadcast_to(error, blocks.shape).reshape(x.shape)


@pytest.mark.parametrize("name", NAMES)
def test_name_round_trips(name):
    codec = codecs.get(name)
    assert codec.name == name
    assert codecs.get(codec.name) == codec
    assert hash(codecs.get(name.upper())) == hash(codec)
    assert codecs.get(codec) is codec


def test_names_cover_the_table():
    assert {name.split("-")[0] for name in NAMES} == set(CODECS)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([0.02, 1.0, 30.0]),
)
@example(kind="tiny", seed=23475, magnitude=0.02)
def test_round_trip_within_the_error_bound(name, kind, seed, magnitude):
    codec = codecs.get(name)
    x = sample(kind, shape_of(codec), seed, magnitude)
    decode = decoder(codec)
    parts = codec.encode(x, batch_dims=1)
    y = np.asarray(decode(parts, x.shape[-1]))
    assert y.shape == x.shape
    assert y.dtype == np.float32
    limit = bound(codec, x, parts)
    worst = np.unravel_index(np.argmax(np.abs(y - x) - limit), x.shape)
    assert np.all(np.abs(y - x) <= limit), (worst, x[worst], y[worst], limit[worst])
    # what was stored once is stored again as it is, or nearly
    scale = parts.get("scale", np.ones(1))
    is_coarse = (scale.dtype == np.float16) & (scale != 0) & (np.abs(scale) < 2.0**-14)
    # of a scale that is no normal number: the largest code may be one less
    rows = ~np.broadcast_to(np.any(is_coarse, -1), x.shape[:-1])
    parts = codec.encode(y, batch_dims=1)
    again = np.asarray(decode(parts, x.shape[-1]))
    assert np.all(np.abs(again - y) <= bound(codec, y, parts))
    if isinstance(codec, codecs.NF4 | Fp8 | Mx | codecs.Cast) or getattr(codec, "symmetric", 0):
        np.testing.assert_allclose(again[rows], y[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_shapes_and_lead_axes(name):
    codec = codecs.get(name)
    x = sample("normal", shape_of(codec), 0, 1.0)
    parts = codec.encode(x, batch_dims=1)
    shapes = codec.part_shapes(x.shape, batch_dims=1)
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }
    assert codec.nbytes(x.shape, batch_dims=1) == sum(np.asarray(p).nbytes for p in parts.values())
    assert codec.bits_per_weight(x.shape) == 8 * codec.nbytes(x.shape) / x.size
    for part in parts.values():
        assert part.ndim == x.ndim
        assert part.shape[0] == 2
        assert part.shape[1] in (1, 30)
    # a slice of the parts is the slice of the tensor
    whole = decoder(codec)(parts, x.shape[-1])
    half = {k: p[1:] for k, p in parts.items()}
    np.testing.assert_array_equal(decoder(codec)(half, x.shape[-1]), whole[1:])


@pytest.mark.parametrize("name", [*FAMILIES, "q4_1", "q4_k", "q6_k"])
def test_jit_changes_nothing(name):
    codec = codecs.get(name)
    x = sample("normal", shape_of(codec), 0, 1.0)
    parts = codec.encode(x, batch_dims=1)
    for k, part in jax.jit(lambda x: codec.encode(x, batch_dims=1))(x).items():
        np.testing.assert_array_equal(part, parts[k])
    whole = codec.decode(parts, x.shape[-1])
    np.testing.assert_array_equal(decoder(codec)(parts, x.shape[-1]), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(name, bad):
    codec = codecs.get(name)
    x = np.zeros(shape_of(codec), np.float32)
    x[1, 2, 7] = x[1, 2, 9] = bad
    count = "2 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 2 infinite"
    with pytest.raises(ValueError, match=rf"{count} of {x.size} .*\(1, 2, 7\)"):
        codec.encode(x, batch_dims=1)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    codec = codecs.get(name)
    x = np.zeros(shape_of(codec), np.float32)
    x[0] = -0.0
    assert not np.any(decoder(codec)(codec.encode(x, batch_dims=1), x.shape[-1]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 1)])
def test_odd_shapes(name, shape):
    codec = codecs.get(name)
    x = sample("normal", shape, 1, 1.0)
    parts = codec.encode(x)
    y = np.asarray(decoder(codec)(parts, shape[-1]))
    assert np.all(np.abs(y - x) <= bound(codec, x, parts))
    assert codec.nbytes(shape) == sum(np.asarray(p).nbytes for p in parts.values())


@pytest.mark.parametrize("name", ["int4-g64", "nf4-g64", "nvfp4", "bf16", "q4_0"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_input_dtype_does_not_matter(name, dtype):
    codec = codecs.get(name)
    x = jnp.asarray(sample("normal", shape_of(codec), 2, 1.0)).astype(dtype)
    parts = codec.encode(x, batch_dims=1)
    wide = codec.encode(x.astype(jnp.float32), batch_dims=1)
    for k in parts:
        np.testing.assert_array_equal(parts[k], wide[k])


@pytest.mark.parametrize("name", ["int4-g64", "nvfp4", "int4-tensor", "q4_k"])
def test_decodes_in_scan_and_vmap(name):
    codec = codecs.get(name)
    x = sample("normal", shape_of(codec), 3, 1.0)
    length = x.shape[-1]
    parts = codec.encode(x, batch_dims=1)
    whole = decoder(codec)(parts, length)
    _, scanned = jax.lax.scan(lambda c, p: (c, codec.decode(p, length)), 0, parts)
    np.testing.assert_array_equal(scanned, whole)
    np.testing.assert_array_equal(jax.vmap(lambda p: codec.decode(p, length))(parts), whole)


def test_tensor_scales_are_one_for_each_batch_entry():
    x = sample("normal", (2, 30, 80), 4, 1.0)
    x[1] *= 100
    for name, part in (("int8-tensor", "scale"), ("nvfp4", "tensor_scale")):
        codec = codecs.get(name)
        both = codec.encode(x, batch_dims=1)
        assert both[part].shape == (2, 1, 1)
        assert codec.encode(x)[part].shape == (1, 1, 1)
        alone = codec.encode(x[0])
        np.testing.assert_array_equal(both["codes"][0], alone["codes"])


def test_padding_of_a_ragged_group_does_not_matter():
    x = np.abs(sample("normal", (2, 30, 80), 5, 1.0)) + 1
    padded = np.concatenate([x, np.tile(x[..., 64:], (1, 1, 3))], axis=-1)
    for name in ("int1-g64", "int4-g64", "nf4-g64"):
        codec = codecs.get(name)
        ragged, full = (codec.encode(y, batch_dims=1)["scale"] for y in (x, padded))
        np.testing.assert_allclose(ragged, full, rtol=1e-3)


def error(name: str, x: np.ndarray) -> float:
    codec = codecs.get(name)
    y = decoder(codec)(codec.encode(x, batch_dims=1), x.shape[-1])
    return float(np.sqrt(np.mean((np.asarray(y, np.float64) - x) ** 2)))


def test_errors_are_ordered():
    gauss = sample("normal", (2, 30, 80), 6, 1.0)
    skewed = sample("skewed", (2, 30, 80), 7, 1.0)
    assert error("int4-g128", skewed) < 0.8 * error("int4-g128-sym", skewed)
    assert error("nf4", gauss) < error("int4-g128-sym", gauss)
    assert error("nvfp4", gauss) < error("mxfp4", gauss)
    assert error("qoq4-g32", gauss) < 1.05 * error("int4-g32-sym", gauss) < error("int4-sym", gauss)
    assert error("int4-g32", gauss) < error("int4-g64", gauss) < error("int4-tensor", gauss)
    errors = [error(f"int{bits}-g64", gauss) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    long = sample("normal", (2, 30, 256), 8, 1.0)
    assert error("q6_k", long) < error("q5_k", long) < error("q4_k", long)


def test_groups_of_a_constant_are_exact_to_scale_rounding():
    x = np.full((2, 30, 80), 0.37, np.float32)
    x[1] *= -1
    for name in ("int1", "int3-g64", "int4-g32", "int4-g128-sym", "int8", "nf4-g64", "fp8_e4m3"):
        assert error(name, x) < 2e-4, name


def test_shrink_shrinks_the_range():
    codec = codecs.get("int4-g64")
    groups = codec.split(jnp.asarray(sample("normal", (4, 128), 8, 1.0)))
    full, half = codec.fit(groups), codec.fit(groups, shrink=jnp.full((4, 2, 1), 0.5))
    np.testing.assert_allclose(half["scale"], full["scale"] / 2, rtol=1e-3)


def test_zero_points_may_leave_the_integers():
    codec = codecs.get("int4-g64")
    params = {"scale": jnp.full((1, 1), 0.5), "zero": jnp.full((1, 1), 7.25)}
    codes = jnp.arange(16, dtype=jnp.uint8)[None]
    values = codec.values(codes, params)
    np.testing.assert_array_equal(values[0], (np.arange(16) - 7.25) / 2)
    np.testing.assert_array_equal(codec.codes(values, params), codes)
    stored = codec.store({k: v[..., None] for k, v in params.items()})
    np.testing.assert_array_equal(codec.load(stored)["zero"].squeeze(-1), params["zero"])


# GGUF: exactly the bytes and the numbers of the gguf package


@pytest.mark.parametrize("name", GGUF)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gguf_decodes_any_bytes_as_the_package_does(name, seed):
    codec, kind = codecs.get(name), gguf.GGMLQuantizationType[name.upper()]
    assert (codec.block, codec.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2 * codec.block_bytes), np.uint8)
    parts = codec.from_bytes(raw.tobytes(), (3, 2 * codec.block))
    np.testing.assert_array_equal(parts["blocks"], raw)
    assert codec.nbytes((3, 2 * codec.block)) == raw.nbytes
    with np.errstate(invalid="ignore", over="ignore"):
        expected = quants.dequantize(raw, kind)
    np.testing.assert_array_equal(decoder(codec)(parts, 2 * codec.block), expected)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([1e-2, 1.0, 300.0]),
)
def test_gguf_encodes_as_the_package_does(name, kind, seed, magnitude):
    x = sample(kind, (5, 96), seed, magnitude)
    expected = quants.quantize(x, gguf.GGMLQuantizationType[name.upper()])
    blocks = np.array(codecs.get(name).encode(x)["blocks"])
    if name.endswith("_1"):  # the sign of a minimum of zero may differ
        for found in (expected, blocks):
            minimum = found.reshape(5, 3, -1)[..., 2:4]
            minimum[(minimum == (0, 0x80)).all(-1)] = 0
    np.testing.assert_array_equal(blocks, expected)


def test_gguf_refuses_wrong_sizes():
    codec = codecs.get("q4_k")
    with pytest.raises(ValueError, match=r"`length` .* 576; q4_k .* 256"):
        codec.encode(jnp.zeros((2, 576)))
    with pytest.raises(ValueError, match=r"`raw` has 143 bytes; q4_k .* takes 144"):
        codec.from_bytes(bytes(143), (1, 256))
    with pytest.raises(ValueError, match="`raw` has dtype float32"):
        codec.from_bytes(np.zeros(144, np.float32), (1, 256))


# Refusals


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("itn4", "int4"), ("int9", "int8"), ("q4k", "q4_k"), ("fp8", "fp8_e4m3"), ("", "int<1-8>")],
)
def test_unknown_names_get_a_hint(spec, hint):
    with pytest.raises(ValueError, match=hint):
        codecs.get(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "int4-g0",
        "int4-g",
        "int4-sym-sym",
        "int4-sym-asym",
        "nf4-sym",
        "mxfp4-g16",
        "q4_0-f32",
        "qoq4-a8",
    ],
)
def test_wrong_options_are_named(spec):
    with pytest.raises(ValueError, match="is not an option"):
        codecs.get(spec)


@pytest.mark.parametrize("spec", ["int4-g64-tensor", None, 4])
def test_what_is_not_a_spec(spec):
    with pytest.raises(ValueError, match="`"):
        codecs.get(spec)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("w4g64", "int4-g64"),
        ("w8", "int8"),
        ("W3G128-sym", "int3-g128-sym"),
        ("Q4_K", "q4_k"),
        ("int4-asym-g64", "int4-g64"),
        ("int8-sym", "int8"),
        ("bfloat16", "bf16"),
        ("w4a8", "qoq4-g128"),
    ],
)
def test_aliases(alias, name):
    assert codecs.get(alias).name == name


@pytest.mark.parametrize("name", ["int4", "int8-tensor", "nf4-g64", "q4_0", "q6_k", "f16"])
def test_overflow_is_an_error(name):
    x = np.random.default_rng(0).normal(size=(64, 5, 512)).astype(np.float32)
    with pytest.raises(ValueError, match=r"overflow|above the range"):
        codecs.get(name).encode(x * np.float32(1e9))


def test_float32_scales_reach_further():
    x = sample("normal", (2, 30, 80), 0, 1.0)
    for name in ("int8-f32", "nf4-tensor-f32", "fp8_e4m3"):
        assert error(name, x * np.float32(1e30)) < 0.2e30


@pytest.mark.parametrize("name", ["int4", "nf4-g64", "q4_0", "q6_k"])
def test_loss_of_everything_is_an_error(name):
    with pytest.raises(ValueError, match="underflow"):
        codecs.get(name).encode(
            np.full(shape_of(codecs.get(name)), 1e-20, np.float32), batch_dims=1
        )


def test_bad_arrays_are_named():
    codec = codecs.get("int8")
    for x, match in (
        (np.zeros((2, 3), np.int32), "dtype int32"),
        (np.float32(1), r"shape \(\)"),
        (np.zeros((2, 0), np.float32), r"shape \(2, 0\)"),
    ):
        with pytest.raises(ValueError, match=match):
            codec.encode(x)
    with pytest.raises(ValueError, match="`batch_dims` is 2"):
        codec.encode(np.zeros((2, 3), np.float32), batch_dims=2)


def test_the_page_tells_the_true_bits():
    page = pathlib.Path(__file__).parents[2] / "docs" / "codecs.md"
    rows = re.findall(r"^\| `(\S+)` \|.*\| (\S+) \| (\S+) \| [^|]* \|$", page.read_text(), re.M)
    assert {name.split("-")[0] for name, _, _ in rows} >= set(CODECS)
    for name, *figures in rows:
        for length, figure in zip((576, 4096), figures):
            if figure != "—":
                bits = codecs.get(name).bits_per_weight((4096, length))
                assert figure == f"{bits:.3f}", (name, length)
