"""The TPU kernel: numbers in interpret mode, and whether the real TPU compiler takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.matmul import mosaic_tpu, reference
from tests.pallas_kernels import tpu_compiler

CASES = {  # codec, batch, M, K, N
    "a token": ("int8", (), 1, 256, 16),
    "rows of x and of w that fill no block": ("int4-g64", (), 33, 512, 40),
    "two blocks of w": ("int4-g128-sym", (), 16, 256, 700),
    "two blocks of x": ("int4-g32", (), 160, 256, 16),
    "pieces that fill no tile": ("int4-g64", (), 5, 576, 8),
    "a group over two pieces, odd K": ("int4-g48", (), 3, 577, 8),
    "a channel, odd K": ("int4", (), 3, 301, 33),
    "a scale for all": ("int4-tensor", (), 3, 256, 8),
    "two planes": ("int3-g64", (), 5, 1024, 16),
    "three planes, bfloat16 scales": ("int7-g256-bf16", (), 2, 1024, 8),
    "four pieces": ("int2-g64-sym", (), 1, 1024, 24),
    "8 bits with a zero point": ("int8-g128-asym", (), 5, 576, 8),
    "levels": ("nf4-g64", (), 5, 512, 16),
    "8-bit floats": ("fp8_e4m3", (), 5, 300, 16),
    "experts": ("fp8_e4m3-g128", (3,), 2, 256, 16),
    "two batch axes": ("int4-g64", (2, 2), 1, 256, 8),
}


def operands(spec, batch, m, k, n, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*batch, m, k)), dtype)
    w = jnp.asarray(rng.standard_normal((*batch, n, k)), jnp.float32)
    lead = tuple(range(len(batch) + 1))
    return x, codecs.pack(w, codecs.get(spec), lead=lead, inner=(len(batch) + 1,))


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    x, w = operands(*CASES[case])
    got = mosaic_tpu.matmul(x, w, precision="highest", interpret=True)
    want = reference.matmul(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("spec", ["int4-g64", "nf4-g64", "fp8_e4m3"])
def test_bfloat16(spec):
    """Integers and 8-bit floats lose nothing to bfloat16; 16 levels do."""
    x, w = operands(spec, (), 5, 512, 16, jnp.bfloat16)
    got = mosaic_tpu.matmul(x, w, preferred_element_type=jnp.float32, interpret=True)
    want = reference.matmul(x, w, preferred_element_type=jnp.float32)
    error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert error < (3e-3 if spec == "nf4-g64" else 1e-5)


@pytest.mark.parametrize("spec", ["int4-g64", "fp8_e4m3"])
def test_memory_that_nobody_wrote(spec):
    """What pads blocks is NaN here, and reads past a buffer raise."""
    x, w = operands(spec, (), 3, 320, 40)
    params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    got = mosaic_tpu.matmul(x, w, precision="highest", interpret=params)
    np.testing.assert_allclose(got, reference.matmul(x, w), rtol=1e-4, atol=2e-4)


def test_subnormal_scales():
    x, w = operands("int8", (), 2, 256, 8)
    w.parts["scale"] *= 1e-4
    assert jnp.abs(w.parts["scale"]).max() < 2.0**-14
    got = mosaic_tpu.matmul(x, w, precision="highest", interpret=True)
    np.testing.assert_allclose(got, reference.matmul(x, w), rtol=1e-3, atol=1e-7)


def test_every_e4m3_code():
    codes = jnp.asarray([c for c in range(256) if c & 0x7F != 0x7F], jnp.uint8)[None]
    w = codecs.pack(jnp.ones(codes.shape), codecs.get("fp8_e4m3"), lead=(0,), inner=(1,))
    w = jax.tree.map(lambda part: codes if part.dtype == jnp.uint8 else part, w)
    got = mosaic_tpu.matmul(jnp.eye(codes.size), w, interpret=True)
    np.testing.assert_array_equal(got, w.decode().T)


@pytest.mark.parametrize(
    ("spec", "k", "reason"),
    [
        ("q4_0", 256, "not one of int1 to int8"),
        ("fp8_e5m2", 256, "not one of int1 to int8"),
        ("int3-g64", 576, "K is 576; the planes of int3-g64 .* multiples of 1024"),
    ],
)
def test_refusals(spec, k, reason):
    x, w = operands(spec, (), 2, k, 8)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.matmul(x, w)


def test_refuses_layouts_and_dtypes():
    x, w = operands("int8", (), 8, 8, 8)
    assert mosaic_tpu.refusal(x, w) == ""
    assert "not stored in the order" in mosaic_tpu.refusal(x, w.transpose((1, 0)))
    assert "`x` is int32" in mosaic_tpu.refusal(x.astype(jnp.int32), w)


COMPILED = [  # chip, codec, batch, M, K, N, precision
    ("v5e", "int4-g64", (), 1, 4096, 14336, None),
    ("v6e", "int4-g32", (), 16, 14336, 4096, None),
    ("v6e", "int3-g64", (), 128, 4096, 14336, None),
    ("v5e", "fp8_e4m3", (4,), 16, 576, 1536, None),
    ("v5e", "nf4-g64", (), 1, 4096, 14336, "highest"),
]
SLOW = [
    (chip, spec, (), m, 4096, 14336, None)
    for chip in ("v5e", "v6e")
    for spec in ("int8", "int8-g128-asym", "int4-g128-sym", "int4", "int2-g64", "nf4-g64")
    for m in (1, 1024)
]

COMPILE = """
from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.matmul import mosaic_tpu

def compile_it(chip, spec, batch, m, k, n, precision):
    lead = tuple(range(len(batch) + 1))
    pack = lambda w: codecs.pack(w, codecs.get(spec), lead=lead, inner=(len(batch) + 1,))
    w = jax.eval_shape(pack, jax.ShapeDtypeStruct((*batch, n, k), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((*batch, m, k), jnp.float32 if precision else jnp.bfloat16)
    run = functools.partial(mosaic_tpu.matmul, precision=precision)
    tpu_estimates.compile_for(chip, run, x, w)
"""


@tpu_compiler.needs_it
@pytest.mark.parametrize(
    "cases", [COMPILED, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_the_tpu_compiler_takes_it(cases):
    assert tpu_compiler.errors(COMPILE, cases) == {}
