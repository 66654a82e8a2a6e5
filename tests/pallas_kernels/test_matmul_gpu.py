"""The Hopper matmul without a GPU: its numbers in the interpreter, its lowering for CUDA, and who chooses it."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from stowax.pallas_kernels import codecs, hopper, kernel_name, matmul
from stowax.pallas_kernels.matmul import (
    columns,
    digits,
    dispatch,
    many_rows,
    mosaic_gpu,
    tall,
    tuned,
    xla,
)
from stowax.pallas_kernels.matmul.mosaic_gpu import Config

# spec, M, K, N, config, dtype: formats, ragged rows and columns, groups across a stage, every way to share K and rows
CASES = {
    "int4, sums scaled": ("int4-g128-sym", 5, 512, 64, Config(split=1), "bfloat16"),
    "int4, zeros": ("int4-g64", 3, 256, 72, Config(split=1), "bfloat16"),
    "int4, codes in place": ("int4-g32-sym", 20, 384, 64, Config(24, split=1), "bfloat16"),
}
SLOW = {
    "int4, units of a stage": ("int4-g64-sym", 9, 512, 64, Config(16), "float16"),
    "int8, zeros of units": ("int8-g64-asym", 3, 384, 64, Config(split=1), "bfloat16"),
    "int4, a channel": ("int4-sym", 9, 512, 64, Config(16), "float16"),
    "int4, small groups": ("int4-g32", 20, 384, 128, Config(16, split=1), "bfloat16"),
    "int4, two strips": ("int4-g32", 20, 384, 136, tall.Config(24, stages=3), "bfloat16"),
    "int4, strips, K over blocks": ("int4-g128", 40, 2304, 264, tall.Config(48, grid_k=2), "bfloat16"),
    "int2, codes in place": ("int2-g64-sym", 20, 512, 64, Config(24, split=2, row_bytes=64), "bfloat16"),
    "int2, zeros of codes in place": ("int2-g64", 20, 512, 64, Config(24, split=1, row_bytes=64), "bfloat16"),
    "int8, zeros of codes in place": ("int8-g128-asym", 20, 256, 128, tall.Config(24), "bfloat16"),
    "int8, codes in place, two strips": ("int8-g128", 20, 512, 128, tall.Config(24), "bfloat16"),
    "int4, zeros of many groups": ("int4-g32", 5, 4736, 64, Config(split=2, row_bytes=64), "bfloat16"),
    "int2, zeros, few rows": ("int2-g64", 3, 768, 72, Config(split=1, row_bytes=64), "bfloat16"),
    "nf4, two strips": ("nf4-g64", 5, 512, 128, tall.Config(), "float16"),
    "int4, K over blocks": ("int4-g32-sym", 7, 512, 64, Config(split=1, row_bytes=64, grid_k=2), "bfloat16"),
    "int8": ("int8", 5, 256, 64, Config(split=1), "bfloat16"),
    "int8, zeros": ("int8-g32-asym", 5, 256, 64, Config(split=1), "bfloat16"),
    "int2": ("int2-g64", 5, 256, 64, Config(split=1, row_bytes=64), "bfloat16"),
    "int3": ("int3-g32", 5, 512, 64, Config(split=1, row_bytes=64), "bfloat16"),
    "int5": ("int5-g64", 5, 512, 64, Config(split=1, row_bytes=64), "float16"),
    "nf4": ("nf4-g64", 5, 256, 64, Config(split=1), "bfloat16"),
    "e4m3": ("fp8_e4m3", 5, 256, 64, Config(split=1), "bfloat16"),
    "e5m2": ("fp8_e5m2-g64", 5, 256, 64, Config(split=1), "float16"),
    "split": ("int4-g128-sym", 5, 1024, 64, Config(split=2), "bfloat16"),
    "split in four, zeros": ("int4-g64", 5, 1024, 64, Config(split=4, row_bytes=64), "bfloat16"),
    "zeros, one operand in flight": ("int4-g32", 20, 384, 64, Config(24, split=1, in_flight=1), "bfloat16"),
}  # fmt: skip
# Its five warpgroups need more threads than tests have, which are as many as devices: it runs in a process of its own.
FOUR_STRIPS = ("int4-g128", 40, 2304, 264, tall.Config(48, strips=4, grid_k=2), "bfloat16")
# For many rows, also batches: a whole tile and a ragged one, parts of K for all tiles, for the last ones, for none.
MANY = {
    "zeros, ragged": ("int4-g64", 70, 256, 136, many_rows.Config(64, 2, blocks=2), "bfloat16"),
    "small groups, last tiles parted": (
        "int4-g32-sym",
        72,
        384,
        264,
        many_rows.Config(48, 3, blocks=4, parts=2),
        "float16",
    ),
}
MANY_SLOW = {
    "int3, all parted": ("int3-g32", 20, 1024, 128, many_rows.Config(16, 2, blocks=9, parts=2), "bfloat16"),
    "nf4, uneven parts": ("nf4-g64", 70, 512, 136, many_rows.Config(80, 2, blocks=3, parts=3), "bfloat16"),
    "int8, zeros": ("int8-g32-asym", 40, 256, 256, many_rows.Config(48, 2, blocks=2), "bfloat16"),
    "int2": ("int2-g128", 40, 512, 128, many_rows.Config(48, 2, blocks=2), "bfloat16"),
    "e4m3, a channel": ("fp8_e4m3", 40, 256, 128, many_rows.Config(48, 2, blocks=2), "bfloat16"),
    "float32": ("int4-g128-sym", 20, 256, 128, many_rows.Config(48, 2, blocks=2), "float32"),
}  # fmt: skip
# For very few rows: units of 128 and 64 columns, zeros, planes, rows over blocks, K over warpgroups and over blocks.
DIGITS = {
    "zeros": ("int4-g64", 3, 256, 72, Config(4, split=1, in_flight=2), "bfloat16"),
    "float16, rows over blocks": (
        "int2-g128-sym",
        5,
        1024,
        64,
        Config(4, in_flight=2, grid_k=2),
        "float16",
    ),
}
DIGITS_SLOW = {
    "int4, a channel": ("int4-sym", 2, 384, 64, Config(4), "bfloat16"),
    "int3, zeros": ("int3-g128", 4, 2048, 64, Config(4, in_flight=4), "bfloat16"),
    "int5": ("int5-g64", 1, 1024, 64, Config(4, split=1), "bfloat16"),
    "int8": ("int8", 4, 384, 64, Config(4, in_flight=1), "bfloat16"),
    "zeros, four warpgroups": ("int4-g64", 2, 1024, 64, Config(4, split=4), "bfloat16"),
    "eight rows": ("int4-g128", 8, 512, 64, Config(8, split=1), "bfloat16"),
    "float32": ("int4-g128-sym", 2, 512, 64, Config(4), "float32"),
}  # fmt: skip
REAL = [  # K, N of a Llama of 8 billion parameters, and odd ones
    (4096, 14336), (14336, 4096), (4096, 6144), (4096, 4096), (4096, 128_256), (1536, 576), (896, 128),
]  # fmt: skip
SPECS = ["int8", "int4-g128-sym", "int4-g64", "int3-g64", "int2-g128", "nf4-g64", "fp8_e4m3"]


def operands(spec, m, k, n, dtype="bfloat16", batch=1):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, m, k)), dtype)
    w = jnp.asarray(rng.standard_normal((batch, n, k)), dtype)
    return x, codecs.pack(w, codecs.get(spec), lead=(0, 1), inner=(2,))


def shapes(spec, m, k, n, dtype="bfloat16", batch=1):
    """The same, as shapes."""
    return jax.eval_shape(functools.partial(operands, spec, m, k, n, dtype, batch))


def error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def check(case, batch=1, kernel=mosaic_gpu):
    spec, m, k, n, config, dtype = case
    x, w = operands(spec, m, k, n, dtype, batch)
    run = functools.partial(kernel.matmul, config=config, interpret=True)
    got = jax.jit(run)(x, w).astype(jnp.float32)
    want = matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
    assert got.shape == want.shape
    assert error(got, want) < (6e-4 if dtype == "float16" else 5e-3)


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_numbers_of_every_format(name):
    check(SLOW[name])


@pytest.mark.slow
def test_four_strips(run_apart):
    code = "import test_matmul_gpu as tests; tests.check(tests.FOUR_STRIPS)"
    flags = "--xla_force_host_platform_device_count=24 --xla_backend_optimization_level=0"
    run_apart(code, flags, cwd=str(pathlib.Path(__file__).parent))


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("shape", [(2, 5, 1024), (1, 8, 768)])
def test_columns_and_sums_by_one_kernel(shape, group):
    """Also of rows and groups that are padded; sums as two numbers keep 16 bits."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), "bfloat16")
    form = {"pieces": 2, "unit": 2.0**33, "group": group}
    got, want = columns.kernel(x, **form, interpret=True), columns.plain(x, **form)
    assert len(got) == (1 if group is None else 2)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if group is not None:
        sums = hopper.permute_columns(x.astype(jnp.float32).reshape(*shape[:2], -1, group).sum(-1))
        both = got[1].astype(jnp.float32).reshape(shape[0], 2, *got[1].shape[1:]).sum(1)
        assert error(both[:, : shape[1]], sums) < 2**-15
    run = jax.jit(functools.partial(columns.columns_of, **form))
    assert "triton" in run.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", DIGITS)
def test_digits(name):
    check(DIGITS[name], kernel=digits, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS_SLOW)
def test_digits_of_every_format(name):
    check(DIGITS_SLOW[name], kernel=digits)


def test_digits_keep_what_a_row_says():
    """16 bits relative to the largest of a unit; a row of zeros gives zeros, one with a NaN nothing else."""
    _, w = operands("int4-g128-sym", 4, 512, 64)
    x = np.random.default_rng(0).standard_normal((1, 4, 512)).astype(np.float32)
    x[0, 0, 0], x[0, 1], x[0, 2, 3], x[0, 3] = 3e4, 0, np.nan, x[0, 3] * 1e-20
    x = jnp.asarray(x, jnp.bfloat16)
    run = functools.partial(digits.matmul, config=Config(4), out_dtype=jnp.float32, interpret=True)
    got = jax.jit(run)(x, w)[0]
    want = (x.astype(jnp.float32) @ w.codec.decode(w.parts, 512).swapaxes(1, 2))[0]
    assert float(jnp.linalg.norm(got[0] - want[0])) < 2e-4 * float(jnp.linalg.norm(want[0]))
    assert float(jnp.linalg.norm(got[3] - want[3])) < 1e-4 * float(jnp.linalg.norm(want[3]))
    assert not np.any(got[1])
    assert np.all(np.isnan(got[2]))


def test_digits_are_not_for_a_high_precision(monkeypatch):
    taken = []
    kernel = digits.matmul
    monkeypatch.setattr(digits, "matmul", lambda *a, **k: taken.append(1) or kernel(*a, **k))
    for precision, count in (("highest", 0), (None, 1)):
        run = jax.jit(functools.partial(matmul, precision=precision))
        run.trace(*shapes("int4-g128", 1, 512, 64)).lower(lowering_platforms=("cuda",))
        assert len(taken) == count


@pytest.mark.parametrize("name", MANY)
def test_many_rows(name):
    check(MANY[name], kernel=many_rows, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY_SLOW)
def test_many_rows_of_every_format(name):
    check(MANY_SLOW[name], kernel=many_rows)


@pytest.mark.slow
def test_float32_rows_keep_their_digits():
    """A float32 x on integers that bfloat16 holds exactly: 16 bits of x, not 8."""
    _, w = operands("int4-g128-sym", 3, 512, 64)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 512)), jnp.float32)
    got = jax.jit(functools.partial(mosaic_gpu.matmul, config=Config(split=1), interpret=True))(
        x, w
    )
    want = x @ w.codec.decode(w.parts, 512).swapaxes(1, 2)
    assert got.dtype == jnp.float32
    assert error(got, want) < 3e-5


@pytest.mark.slow
def test_experts():
    check(("int4-g32", 9, 256, 64, Config(16, split=1), "bfloat16"), batch=2)


@pytest.mark.parametrize("spec", SPECS)
def test_lowers_for_cuda(spec):
    sizes = [(1, 256), (100, 256), (16, 6144)] if spec in SPECS[:2] else [(16, 256)]
    for m, n in sizes:
        x, w = shapes(spec, m, 4096, n)
        config = tuned.config(hopper.plan_of(w.codec), m, n, 4096)
        run = jax.jit(functools.partial(mosaic_gpu.matmul, config=config))
        text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
    x, w = shapes(spec, 1, 4096, 256)
    if config := dispatch._digits_of(x, w):
        run = jax.jit(functools.partial(digits.matmul, config=config))
        assert "mosaic_gpu" in run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    x, w = shapes(spec, 1024, 4096, 14336)
    config = tuned.many(hopper.plan_of(w.codec), 1, 1024, 14336, 4096)
    run = jax.jit(functools.partial(many_rows.matmul, config=config))
    assert "mosaic_gpu" in run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


def test_dtypes_that_differ_lower_for_cuda():
    """As `lax.dot_general` has it, whose result is not what jnp promotes to."""
    x, w = shapes("int4-g128", 3, 512, 64)
    run, x = jax.jit(matmul), jax.ShapeDtypeStruct(x.shape, "float16")
    assert jax.eval_shape(run, x, w).dtype == w.dtype
    assert "mosaic_gpu" in run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("spec", SPECS)
def test_every_shape_gets_blocks_that_fit(spec):
    plan = hopper.plan_of(codecs.get(spec))
    for k, n in REAL:
        for m in (1, 2, 8, 9, 16, 31, 64, 65, 128, 129, 256, 1000, 1025):
            c = tuned.config(plan, m, n, k)
            assert c.shared_bytes(plan) <= tuned.SHARED_BYTES
            assert 64 * c.strips <= n
            assert c.block_m % 8 == 0
            assert c.grid_k * c.split * c.row_bytes <= 2 * max(
                k // plan.pieces, c.row_bytes * c.split
            )
            if c := tuned.digits_config(plan, m, n, k):
                assert digits.shared_bytes(c, plan, k // plan.pieces) <= tuned.SHARED_BYTES


def test_parts_of_k_are_warpgroups_of_a_block_where_that_is_faster():
    def parts(spec, m, n, k, of=tuned.config):
        c = of(hopper.plan_of(codecs.get(spec)), m, n, k)
        return c.split, c.grid_k

    assert [parts("int4-g128", m, 6144, 4096) for m in (8, 16, 32)] == [(4, 1)] * 3
    assert parts("int4-g128", 1, 6144, 4096, tuned.digits_config) == (4, 1)
    assert parts("int4-g128", 16, 4096, 14336) == (2, 4)
    assert parts("int2-g128", 16, 4096, 14336) == (4, 2)
    assert parts("int4-g128", 64, 4096, 14336) == (2, 2)
    assert parts("int2-g128", 64, 6144, 4096) == (1, 2)  # there is no room for two
    assert parts("int4-g128", 64, 1024, 4096) == (1, 8)  # there would be 64 blocks
    assert parts("int4-g128", 16, 4096, 1024) == (2, 2)
    assert parts("int6-g128", 16, 6144, 4096) == (2, 2)
    strips = lambda n: tuned.config(hopper.plan_of(codecs.get("int4-g128")), 128, n, 14336).strips
    assert [strips(n) for n in (1024, 4096, 6144, 14336)] == [1, 2, 1, 2]


def test_a_multiprocessor_holds_two_blocks_with_their_table_of_levels():
    plan = hopper.plan_of(codecs.get("nf4-g64"))
    for m in (1, 16, 32, 64):
        c = tuned.config(plan, m, 14336, 4096)
        assert 2 * (c.shared_bytes(plan) + 1024) < 228 * 1024  # the driver takes 1024


@pytest.mark.parametrize("spec", SPECS)
def test_many_rows_get_blocks_that_fit(spec):
    plan = hopper.plan_of(codecs.get(spec))
    for k, n in REAL:
        for m in (64, 129, 256, 1000, 1025, 4096):
            c = tuned.many(plan, 1, m, n, k)
            assert many_rows.shared_bytes(c, plan) <= tuned.SHARED_BYTES
            assert c.block_m % 16 == 0
            assert c.block_m <= 256


def test_digits_are_for_the_shapes_that_have_room():
    of = lambda spec, m, k, n: tuned.digits_config(hopper.plan_of(codecs.get(spec)), m, n, k)
    assert all(of("int4-g128", 2, k, n) for k, n in REAL)
    assert all(of("int3-g64", 1, k, n) for k, n in REAL[:2])
    assert of("int4-g128-sym", 4, 4096, 4096)
    assert of("int4-g128", 4, 4096, 4096) is None
    assert of("int4-g128", 1, 65536, 65536) is None
    refusal = lambda spec, k: digits.refusal(shapes(spec, 1, k, 64)[1])
    assert refusal("int4-g32", 512) == "groups of 32"
    assert refusal("nf4-g64", 512) == "nf4-g64 is no integer"
    assert refusal("int4-g64", 896) == "K = 896 is no multiple of 256"


def test_columns_are_permuted_as_codes_are_taken():
    """Column 16 t + 8 o + 2 q + e of a block is byte 16 q + 4 t + 2 e + o."""
    x = hopper.permute_columns(jnp.arange(128.0)[None])[0].astype(int)
    for i in (0, 1, 2, 8, 15, 16, 40, 63):
        t, o, q, e = i // 16, i // 8 % 2, i // 2 % 4, i % 2
        assert x[i] == 16 * q + 4 * t + 2 * e + o
        assert x[64 + i] == 64 + x[i]
    assert not np.any(hopper.permute_columns(jnp.ones((1, 40)))[0, -1])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_plans_find_every_code(bits):
    """Codes put together from the fields of a plan are those that were packed."""
    plan = hopper.plan_of(codecs.get(f"int{bits}-g32"))
    k = 32 * plan.pieces
    codes = np.random.default_rng(bits).integers(0, 2**bits, k).astype(np.uint8)
    packed = np.asarray(codecs.pack_bits(jnp.asarray(codes), bits)).astype(int)
    piece = k // plan.pieces
    assert len(packed) == plan.streams * piece
    for j, fields in enumerate(plan.fields):
        found = sum(
            (packed[f.stream * piece : (f.stream + 1) * piece] >> f.shift & 2**f.width - 1) << f.up for f in fields
        )  # fmt: skip
        np.testing.assert_array_equal(found, codes[j * piece : (j + 1) * piece])


def loss(x, w):
    return jnp.sum(matmul(x, w).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("what", ["jit", "vmap", "scan", "grad", "shard_map"])
def test_a_program_runs_here_and_holds_the_kernel_for_cuda(what, monkeypatch):
    x, w = operands("int4-g64", 8, 256, 64)
    if what == "vmap":
        run, args = jax.vmap(matmul, (0, None)), (jnp.stack([x, 2 * x]), w)
    elif what == "scan":
        step = lambda x, _: (jnp.tile(matmul(x, w), (1, 1, 4)).astype(x.dtype) / 64, None)
        run, args = (lambda x: jax.lax.scan(step, x, None, length=2)[0]), (x,)
    elif what == "grad":
        run, args = jax.grad(loss), (x, w)
    elif what == "shard_map":
        mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        run, args = (
            jax.shard_map(
                matmul, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=False
            ),
            (x, w),
        )
    else:
        run, args = matmul, (x, w)
    traced = jax.jit(run).trace(*args)
    here, there = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    assert "mosaic_gpu" not in here
    assert "mosaic_gpu" in there
    with monkeypatch.context() as m:
        m.setattr(
            dispatch, "PACKED_MATMUL", lambda operands, choose, **o: xla.matmul(*operands, **o)
        )
        want = jax.jit(lambda *a: run(*a))(*args)
    np.testing.assert_allclose(
        jax.jit(run)(*args).astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )


def test_an_exported_program_picks_its_kernel_where_it_runs():
    x, w = operands("int4-g64", 8, 256, 64)
    leaves, tree = jax.tree.flatten(w)
    flat = jax.jit(lambda x, *parts: matmul(x, jax.tree.unflatten(tree, parts)))
    exported = export.export(flat, platforms=("cpu", "cuda", "tpu"))(x, *leaves)
    assert "mosaic_gpu" in exported.mlir_module()
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(again.call(x, *leaves), flat(x, *leaves))


@pytest.mark.parametrize(
    ("spec", "k", "n", "dtype", "reason"),
    [
        ("int4-g64", 256, 64, "float32", "x and the weight are float32"),
        ("int4-g64", 256, 64, "int8", "x is int8"),
        ("int4-g64", 256, 40, "bfloat16", "N = 40"),
        ("int4-g64", 576, 64, "bfloat16", "K = 576 is no multiple of 128"),
        ("int4-g40", 640, 64, "bfloat16", "groups of 40"),
        ("mxfp4", 256, 64, "bfloat16", "no kernel for mxfp4"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_another_path(spec, k, n, dtype, reason):
    x, w = shapes(spec, 8, k, n, "bfloat16" if dtype == "int8" else dtype)
    x = jax.ShapeDtypeStruct(x.shape, dtype)
    assert reason in mosaic_gpu.refusal(x, w)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda x, w: matmul(x, w, implementation="mosaic_gpu"), x, w)
    assert jax.eval_shape(matmul, x, w).shape == (1, 8, n)
    assert kernel_name(x, w).startswith("xla")


def test_a_named_kernel_needs_its_gpu():
    x, w = shapes("int4-g64", 8, 256, 64)
    with pytest.raises(NotImplementedError, match="no Hopper GPU"):
        jax.eval_shape(lambda x, w: matmul(x, w, implementation="mosaic_gpu"), x, w)
