"""Small float formats against ml_dtypes, every bit pattern and every rounding boundary."""

import ml_dtypes
import numpy as np
import pytest

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs.elements import ELEMENTS, e8m0_from_bits, e8m0_to_bits

DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_pattern_decodes_as_ml_dtypes_does(name):
    bits = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8)
    expected = bits.view(DTYPES[name]).astype(np.float32)
    finite = np.isfinite(expected)
    decoded = np.asarray(ELEMENTS[name].from_bits(bits))
    np.testing.assert_array_equal(decoded[finite], expected[finite])
    np.testing.assert_array_equal(np.signbit(decoded[finite]), np.signbit(expected[finite]))
    assert np.max(expected[finite]) == ELEMENTS[name].largest
    assert ELEMENTS[name].exponent == np.frexp(ELEMENTS[name].largest)[1] - 1


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounds_as_ml_dtypes_does_and_saturates(name):
    element = ELEMENTS[name]
    bits = np.arange(2**element.bits, dtype=np.uint8)
    levels = bits.view(DTYPES[name]).astype(np.float32)
    levels = np.unique(levels[np.isfinite(levels)])
    ties = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [levels, ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(-9e9))]
    )
    expected = x.astype(DTYPES[name]).view(np.uint8)
    np.testing.assert_array_equal(element.to_bits(x), expected)
    np.testing.assert_array_equal(
        element.from_bits(element.to_bits(np.float32([1e9, -1e9]))),
        [element.largest, -element.largest],
    )


def test_scale_bytes_are_powers_of_two():
    bits = np.arange(255, dtype=np.uint8)
    scale = np.asarray(e8m0_from_bits(bits))
    np.testing.assert_array_equal(scale, bits.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    np.testing.assert_array_equal(e8m0_to_bits(scale), bits)
    np.testing.assert_array_equal(e8m0_to_bits(scale * np.float32(1.99)), bits)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_is_the_specification(name):
    codec = codecs.get(name)
    x = np.random.default_rng(0).normal(size=(2, 30, 80)).astype(np.float32)
    x *= np.exp2(np.random.default_rng(1).integers(-20, 20, (2, 30, 1))).astype(np.float32)
    parts = codec.encode(x, batch_dims=1)
    blocks = np.pad(x, ((0, 0), (0, 0), (0, 16))).reshape(2, 30, 3, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    shared = np.floor(np.log2(largest)) - ELEMENTS[codec.element].exponent
    np.testing.assert_array_equal(parts["scale"], shared.squeeze(-1) + 127)
    limit = ELEMENTS[codec.element].largest
    elements = np.clip(blocks / np.exp2(shared), -limit, limit).astype(DTYPES[codec.element])
    expected = elements.astype(np.float32) * np.exp2(shared)
    np.testing.assert_array_equal(codec.decode(parts, 80), expected.reshape(2, 30, 96)[..., :80])
