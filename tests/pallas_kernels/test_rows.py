"""Row codecs: one table of what every one must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import Gear, hadamard, per_channel, per_token

WIDTH = 64
# codec, and the relative error that it may make on normal rows
ROWS = {
    "int8": (per_token("int8"), 0.01),
    "int4-g32": (per_token("int4-g32"), 0.12),
    "hadamard int4": (per_token("int4-g32", rotate=True), 0.12),
    "int4 per channel": (per_channel("int4-asym", 32), 0.12),
    "int2 per channel": (per_channel("int2-asym", 32), 0.7),
    "lm4 per channel": (per_channel("lm4", 32), 0.075),
    "lm2 hadamard": (per_token("lm2-g32", rotate=True), 0.31),
    "gear": (Gear(per_channel("int2-asym", 64), rank=4), 0.6),
    "gear per token": (Gear(per_token("int4-g64"), rank=2), 0.12),
    "f16": (per_token("f16"), 1e-3),
}
every_codec = pytest.mark.parametrize("name", ROWS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, x):
    return codec.encode(x)


@functools.partial(jax.jit, static_argnums=0)
def decode(codec, parts):
    return codec.decode(parts, WIDTH)


def error(codec, x):
    y = decode(codec, encode(codec, x))
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


@every_codec
def test_error_shapes_and_leading_axes(name):
    codec, allowed = ROWS[name]
    x = normal(2, 3, 128, WIDTH)
    parts = encode(codec, x)
    assert all(p.shape[:2] == (2, 3) and p.shape[2] == 128 // codec.block for p in parts.values())
    shapes = codec.part_shapes(x.shape)
    assert {k: (s.shape, s.dtype) for k, s in shapes.items()} == {
        k: (p.shape, p.dtype) for k, p in parts.items()
    }
    rows = decode(codec, parts)
    assert np.linalg.norm(rows - x) < allowed * np.linalg.norm(x)
    np.testing.assert_allclose(decode(codec, encode(codec, x[1, 2])), rows[1, 2], atol=1e-5)


@every_codec
def test_blocks_are_independent(name):
    """A cache is written block by block: the codes of one do not depend on others."""
    codec, _ = ROWS[name]
    x = normal(1, 128, WIDTH)
    block = encode(codec, x[:, : codec.block])
    whole = encode(codec, x)
    for key, part in block.items():
        want = np.asarray(whole[key][:, :1], np.float32)
        np.testing.assert_allclose(np.asarray(part, np.float32), want, rtol=1e-2, atol=1e-4)


@every_codec
def test_no_tokens(name):
    codec, _ = ROWS[name]
    assert all(s.shape[1] == 0 for s in codec.part_shapes((2, 0, WIDTH)).values())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_hadamard_is_its_own_inverse(width, seed):
    x = normal(3, width, seed=seed)
    y = hadamard(x)
    np.testing.assert_allclose(hadamard(y), x, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-4)


def outliers(seed=0):
    """Rows as keys are: some channels are large in every token."""
    x = normal(256, WIDTH, seed=seed)
    return x.at[:, jnp.asarray([3, 17, 40])].mul(12.0).at[:, 8].add(15.0)


def test_per_channel_beats_per_token_where_channels_have_outliers():
    assert error(per_channel("int4-asym", 32), outliers()) < 0.6 * error(
        per_token("int4-g32"), outliers()
    )


def test_rotation_beats_none_where_channels_have_outliers():
    x = normal(256, WIDTH).at[:, 5].mul(30.0)
    assert error(per_token("int4", rotate=True), x) < 0.7 * error(per_token("int4"), x)


def test_levels_beat_a_uniform_grid():
    x = normal(512, WIDTH)
    for bits, ratio in ((2, 0.8), (3, 0.95)):
        ours, uniform = (error(per_token(f"{c}{bits}-g32"), x) for c in ("lm", "int"))
        assert ours < ratio * uniform


def test_gear_beats_the_code_inside_it():
    x = outliers()
    for inner in (per_channel("int2-asym", 64), per_token("int2-g64")):
        assert error(Gear(inner, rank=4), x) < 0.9 * error(inner, x)


def test_gear_is_good_at_blocks_of_low_rank():
    x = normal(256, 2) @ normal(2, WIDTH, seed=1)  # the shape of `outliers`: the same programs
    assert error(Gear(per_channel("int2-asym", 64), rank=4), x) < 0.6 * error(
        per_channel("int2-asym", 64), x
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gear(per_channel("int2", 48)), "`tokens` is 64"),
        (lambda: Gear(per_token("int4"), rank=0), "`rank` is 0"),
        (lambda: codecs.get("lm5"), "unknown codec"),
        (lambda: codecs.LloydMax(bits=7), "`bits` is 7"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_under_jit_and_vmap():
    codec = ROWS["lm4 per channel"][0]
    x = normal(4, 64, WIDTH)
    want = codec.decode(codec.encode(x), WIDTH)
    got = jax.jit(jax.vmap(lambda y: codec.decode(codec.encode(y), WIDTH)))(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
