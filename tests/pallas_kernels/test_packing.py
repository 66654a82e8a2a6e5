"""Packing against bits counted by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowax.pallas_kernels.codecs import pack_bits, packed_bytes, unpack_bits
from stowax.pallas_kernels.codecs.packing import PLANES

LENGTHS = (1, 33, 576)
pack = jax.jit(pack_bits, static_argnums=1)
unpack = jax.jit(unpack_bits, static_argnums=(1, 2))


def reference_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each plane as a string of bits: byte `j` holds codes `j`, `n + j`, ..., low bits first."""
    planes, shift = [], bits
    for width in PLANES[bits]:
        shift -= width
        plane = (codes >> shift) & (2**width - 1)
        count = 8 // width
        plane = np.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, -plane.shape[-1] % count)])
        plane = plane.reshape(*plane.shape[:-1], count, -1).swapaxes(-1, -2)
        string = (plane[..., None] >> np.arange(width)) & 1
        string = string.reshape(*codes.shape[:-1], -1)
        planes.append(np.packbits(string.astype(np.uint8), axis=-1, bitorder="little"))
    return np.concatenate(planes, axis=-1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_make_up_the_width(bits):
    assert sum(PLANES[bits]) == bits
    assert all(8 % width == 0 for width in PLANES[bits])


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=5, deadline=None)
@given(length=st.sampled_from(LENGTHS), seed=st.integers(0, 2**32 - 1))
def test_packs_as_numpy_does_and_unpacks(bits, length, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, length), np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, packed_bytes(length, bits))
    np.testing.assert_array_equal(packed, reference_pack(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_works_eagerly_and_under_vmap(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 2, 10), np.uint8)
    packed = pack_bits(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack_bits(p, bits, 10))(packed), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_where_whole_bytes_allow(bits):
    assert packed_bytes(576, bits) == 576 * bits // 8
