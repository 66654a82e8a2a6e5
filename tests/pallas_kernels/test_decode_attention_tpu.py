"""The TPU kernel for decode attention: numbers in interpret mode, and whether the real TPU compiler takes it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from stowax.pallas_kernels import attention_kernel, decode_attention
from stowax.pallas_kernels.codecs import per_channel, per_token
from stowax.pallas_kernels.decode_attention import mosaic_tpu
from stowax.pallas_kernels.decode_attention.mosaic_tpu import Config
from tests.pallas_kernels import tpu_compiler
from tests.pallas_kernels.test_decode_attention import KV, close, kivi, masked_rows, operands

NARROW = Config(128, 128)
CASES = {  # codecs, lengths, options, how it is cut, shapes
    "int4, zeros, a window and holes": ("int4-g32", [0, 250], {"window": 140, "holes": True, "weights": True},
                                        NARROW, {"s": 256}),
    "int8, rotated": (per_token("int8", rotate=True), [100, 1], {"soft_cap": 3.0}, None, {}),
    "kivi2": (kivi(2), [128], {}, None, {"b": 1, "k": 1}),
}  # fmt: skip
SLOW = {
    "int4, no zeros": ("int4-g64-sym", [100, 128], {}, None, {}),
    "int4, rows of whole tiles": ("int4-g64", [100, 128], {}, None, {"h": 256}),
    "int2, rows of 16 bytes": ("int2-g32", [100, 128], {}, None, {"h": 64}),
    "int2, a block that ends the rows": ("int2-g64", [384, 3], {}, Config(256, 128), {"s": 384}),
    "bfloat16 scales": ("int4-g64-bf16", [100, 128], {}, None, {"n": 20, "k": 1}),
    "bfloat16": ("int4-g32", [100, 128], {}, None, {"dtype": "bfloat16"}),
    "kivi4": (kivi(4), [250, 64], {"holes": True}, NARROW, {"s": 256}),
    "ragged heads": ("int4-g64", [[384, 3], [0, 70]], {"window": 100, "weights": True}, Config(256, 128), {"s": 384}),
    "kivi4, blocks of 64": (kivi(4, 64), [100, 128], {}, None, {}),
    "kv4": (KV[4], [100, 128], {}, None, {}),
    "kv2": (KV[2], [250, 128], {"window": 100}, NARROW, {"s": 256}),
}  # fmt: skip
TOLERANCES = {"kv4": 5e-3, "kv2": 1e-3, "bfloat16": 5e-3}


def check(codecs, lengths, options, config, shapes, tolerance=5e-5, interpret=True):
    if isinstance(codecs, str):
        codecs = per_token(codecs)
    pair = codecs if isinstance(codecs, tuple) else (codecs, codecs)
    shapes = {"b": 2, "n": 4, "k": 2, "s": 128, "h": 128} | shapes
    args = (*operands(*pair, **shapes), jnp.array(lengths))
    options = {"scale": 0.09, "soft_cap": None, "window": None} | options
    if options.pop("holes", False):
        options |= masked_rows(*(shapes[i] for i in "bksh"))
    run = functools.partial(
        mosaic_tpu.decode_attention, config=config, interpret=interpret, **options
    )
    got = jax.jit(run)(*args)
    want = decode_attention(*args, implementation="reference", **options)
    assert got[0].dtype == args[0].dtype
    close(*jax.tree.map(lambda x: x.astype(jnp.float32), (got, want)), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    check(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_values_of_every_form(name):
    check(*SLOW[name], tolerance=TOLERANCES.get(name, 5e-5))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["int4-g64", "int2-g64-bf16"])
def test_memory_that_nobody_wrote(spec):
    """What pads blocks is NaN here, and reads past a buffer raise."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    check(spec, [384, 3], {}, Config(256, 128), {"s": 384}, interpret=params)


def test_an_exported_program_holds_the_kernel_for_a_named_tpu():
    """Without the name of the chip the XLA path is taken."""
    chip = jax.sharding.AbstractDevice("TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)
    for codecs in (kivi(4), (per_token("int8"),) * 2):
        args = jax.eval_shape(lambda codecs=codecs: operands(*codecs, h=128, dtype="bfloat16"))
        leaves, tree = jax.tree.flatten((*args, jax.ShapeDtypeStruct((2,), jnp.int32)))
        flat = lambda *x, tree=tree: decode_attention(*jax.tree.unflatten(tree, x))
        export_it = lambda flat=flat, leaves=leaves: export.export(
            jax.jit(flat), platforms=("cpu", "tpu")
        )(*leaves)
        assert "tpu_custom_call" not in export_it().mlir_module()
        with jax.sharding.use_abstract_mesh(mesh):
            exported = export_it()
        assert "tpu_custom_call" in exported.mlir_module()
        export.deserialize(exported.serialize())


@pytest.mark.parametrize(
    ("key", "value", "shape", "reason"),
    [
        ("int4-g32", "int4-g32", {"s": 96}, "S = 96 is no multiple of 128"),
        ("int4-g32", "int4-g32", {"h": 96}, "keys: rows of 96 elements, no multiple of 64"),
        ("int4-g32", "int3-g32", {}, "values: no kernel for int3-g32"),
        ("int4", per_channel("int4-asym"), {}, "values: no kernel for int4 per channel"),
        (per_channel("int4-asym", 16), "int4", {}, "a block has 32 or 64 tokens"),
        (per_channel("int4-asym"), "int4", {"h": 64}, "keys: 64 channels are no multiple of 128"),
        ("int4", "int4", {"n": 130, "k": 2}, "65 query heads share a head"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_another_path(key, value, shape, reason, monkeypatch):
    key, value = (per_token(x) if isinstance(x, str) else x for x in (key, value))
    args = jax.eval_shape(lambda: operands(key, value, **({"h": 128} | shape)))
    refusal = mosaic_tpu.refusal(*args, args[1].heads)
    assert reason in refusal
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    run = functools.partial(decode_attention, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(run, *args, lengths)
    assert jax.eval_shape(decode_attention, *args, lengths)[0].shape == args[0].shape
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention_kernel(*args) == f"xla: decode + attend, block by block ({refusal})"


def test_the_kernel_by_name(monkeypatch):
    args = jax.eval_shape(lambda: operands(per_token("int4"), per_token("int4"), h=128))
    with pytest.raises(NotImplementedError, match="this is no TPU"):
        decode_attention(*args, jnp.array([1, 2]), implementation="mosaic_tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention_kernel(*args) == "mosaic_tpu: fused"


# Chip, codecs of keys and values (a number: per channel of so many tokens), batch, heads of the cache, S, H, dtype.
COMPILED = [
    ("v5e", ["int4-g32"], ["int4-g32"], 2, 8, 4096, 128, "bfloat16"),
    ("v6e", [32, "int2-asym"], ["lm4-g32", "rotated"], 1, 2, 2048, 128, "bfloat16"),
    ("v6e", ["int8"], ["int8"], 1, 1, 8192, 64, "float32"),
]
COMPILED_SLOW = [
    (chip, key, value, 2, heads, 4096, h, "bfloat16")
    for chip in ("v5e", "v6e")
    for key, value, heads, h in (
        (["int8"], ["int8-g64-asym"], 8, 128),
        (["int4-g64-sym-bf16"], ["int2-g32"], 10, 128),
        (["int4-g64"], ["int4-g64"], 16, 256),
        (["int2-g32"], ["int4"], 8, 64),
        ([32, "lm4"], ["lm2-g32", "rotated"], 8, 128),
        ([64, "int4-asym"], ["int4-g64-asym"], 8, 256),
    )
]

COMPILE = """
from stowax.pallas_kernels import codecs, pack_rows
from stowax.pallas_kernels.decode_attention import mosaic_tpu

def codec(form):
    if isinstance(form[0], int):
        return codecs.per_channel(form[1], form[0])
    return codecs.per_token(form[0], rotate="rotated" in form)

def compile_it(chip, key, value, b, heads, s, h, dtype):
    shape = jax.ShapeDtypeStruct((b, heads, s, h), jnp.float32)
    rows = [jax.eval_shape(functools.partial(pack_rows, codec=codec(x)), shape) for x in (key, value)]
    q, lengths = jax.ShapeDtypeStruct((b, 4 * heads, h), dtype), jax.ShapeDtypeStruct((b,), jnp.int32)
    seen = jax.ShapeDtypeStruct((b, heads, s), jnp.bool_)
    options = {"scale": 0.1, "soft_cap": 30.0, "window": 1500, "weights": chip == "v6e"}
    run = functools.partial(mosaic_tpu.decode_attention, **options)
    tpu_estimates.compile_for(chip, run, q, *rows, lengths, seen)
"""


@tpu_compiler.needs_it
@pytest.mark.parametrize(
    "cases",
    [COMPILED, pytest.param(COMPILED_SLOW, marks=pytest.mark.slow)],
    ids=["few", "every_form"],
)
def test_the_tpu_compiler_takes_it(cases):
    assert tpu_compiler.errors(COMPILE, cases) == {}
