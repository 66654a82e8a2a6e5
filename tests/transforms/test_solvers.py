"""Solvers: every solver on every kind of codec, and each against what defines it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax.pallas_kernels import codecs
from stowax.transforms import solvers

ROWS, LENGTH = 16, 96  # 96: a ragged last group of 36 and of 64

SOLVERS = {
    "round": solvers.rounding(),
    "clip": solvers.clip_search(),
    "hqq": solvers.hqq(),
    "gptq": solvers.gptq(),
    "gptq-in-order": solvers.gptq(act_order=False),
}

LOW_BITS = [
    "int4-g32",
    "int3-g64",
    "int2-g32-sym",
    "int4",
    "int4-tensor",
    "nf4-g36",
    "mxfp4",
    "nvfp4",
    "qoq4-g32",
]
WIDE = ["int8", "fp8_e5m2-tensor"]
SHIFTED = ["int4-g32", "int3-g64", "int4", "int4-tensor"]
GRIDS = LOW_BITS + WIDE
IN_ORDER = ["int4-g32", "int2-g32-sym", "nf4-g36", "mxfp4", "nvfp4"]  # compiled anew for each
OTHERS = ["f16", "bf16", "q4_0"]


@functools.cache
def correlated_hessian(length: int, seed: int = 0) -> jax.Array:
    """Second moment of inputs whose neighbours correlate by 0.9."""
    rng = np.random.default_rng(seed)
    index = np.arange(length)
    covariance = 0.9 ** np.abs(index[:, None] - index)
    inputs = rng.normal(size=(2048, length)) @ np.linalg.cholesky(covariance).T
    return jnp.asarray(inputs.T @ inputs / len(inputs), jnp.float32)


@functools.cache
def heavy_tailed(rows: int = ROWS, length: int = LENGTH, seed: int = 1) -> jax.Array:
    weights = np.random.default_rng(seed).standard_t(4, size=(rows, length))
    return jnp.asarray(0.02 * weights, jnp.float32)


@functools.cache
def solved(solver: str, codec: str) -> solvers.Solved:
    return SOLVERS[solver].solve(
        heavy_tailed(), codecs.get(codec), hessian=correlated_hessian(LENGTH)
    )


WORKS = {
    "round": GRIDS + OTHERS,
    "clip": GRIDS,
    "hqq": SHIFTED,
    "gptq": GRIDS,
    "gptq-in-order": IN_ORDER,
}
PAIRS = [(solver, codec) for solver, known in WORKS.items() for codec in known]
REFUSED = [("clip", "f16"), ("clip", "q4_0"), ("gptq", "bf16"), ("hqq", "int8"), ("hqq", "nf4-g36")]


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_parts_are_what_encode_gives(solver, codec):
    found = solved(solver, codec)
    expected = codecs.get(codec).part_shapes((ROWS, LENGTH))
    assert {k: (v.shape, v.dtype) for k, v in found.parts.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    assert np.isfinite(codecs.get(codec).decode(found.parts, LENGTH)).all()
    assert all(isinstance(value, float | str) for value in found.info.values())
    assert "fallback" not in found.info


@pytest.mark.parametrize(("solver", "codec"), REFUSED)
def test_codecs_without_what_the_solver_moves_are_refused(solver, codec):
    with pytest.raises(ValueError, match=f"`codec` '{codec}'"):
        solved(solver, codec)


@pytest.mark.parametrize(
    ("solver", "codec"),
    [pair for pair in PAIRS if pair[0].startswith("gptq") and pair[1] in LOW_BITS],
)
def test_gptq_has_far_less_output_error_than_rounding(solver, codec):
    rounded = solved("round", codec).info["output_error"]
    found = solved(solver, codec).info
    assert found["output_error"] * 1.5 < rounded
    assert found["rounding_output_error"] == pytest.approx(rounded)


@pytest.mark.parametrize("codec", SHIFTED)
def test_hqq_is_better_than_rounding(codec):
    assert solved("hqq", codec).info["weight_error"] < solved("round", codec).info["weight_error"]


def optimal_brain_quantizer(w, hessian, codec, damping, act_order):
    """GPTQ as it is defined: the inverse hessian of what is left, anew for each column, in float64."""
    w, hessian = np.array(w, np.float64), np.array(hessian, np.float64)
    length, group = w.shape[1], codec.group_size(w.shape[1])
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(length)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(length)
    fit = jax.jit(lambda w: codec.fit(jnp.asarray(w, jnp.float32)[:, None, :]))
    to_codes, to_values = jax.jit(codec.codes), jax.jit(codec.values)
    params = [fit(w[:, start : start + group]) for start in range(0, length, group)]
    codes = np.zeros(w.shape, np.uint8)
    for step, i in enumerate(order):
        if not act_order and i % group == 0:
            params[i // group] = fit(w[:, i : i + group])
        column = jnp.asarray(w[:, i, None, None], jnp.float32)
        code = to_codes(column, params[i // group])
        value = np.asarray(to_values(code, params[i // group]), np.float64)[:, 0, 0]
        codes[:, i] = code[:, 0, 0]
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        w[:, left] -= np.outer(w[:, i] - value, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize(
    ("codec", "act_order"), [("int4-g8", True), ("int4-g8", False), ("int3", True)]
)
def test_gptq_gives_the_codes_of_its_definition(codec, act_order):
    codec, w, hessian = codecs.get(codec), heavy_tailed(16, 32), correlated_hessian(32)
    solver = solvers.gptq(act_order=act_order, damping=0.01, clip=None, block=8)
    codes, _ = codec.disassemble(solver.solve(w, codec, hessian=hessian).parts, 32)
    expected = optimal_brain_quantizer(w, hessian, codec, 0.01, act_order)
    np.testing.assert_array_equal(codes, expected)


def test_gptq_blocks_change_nothing():
    codec = codecs.get("int4-g32")
    solver = solvers.gptq(block=7)
    found = solver.solve(heavy_tailed(), codec, hessian=correlated_hessian(LENGTH))
    expected = solved("gptq", "int4-g32").info["output_error"]
    assert found.info["output_error"] == pytest.approx(expected, rel=0.02)


def hessian_with_least_eigenvalue(least: float) -> jax.Array:
    """Ones on the diagonal, one pair of inputs coupled too strongly."""
    return jnp.eye(LENGTH).at[0, 1].set(1 - least).at[1, 0].set(1 - least)


def test_gptq_raises_damping_and_says_so():
    hessian = hessian_with_least_eigenvalue(-0.3)
    found = SOLVERS["gptq"].solve(heavy_tailed(), codecs.get("int4-g32"), hessian=hessian)
    assert found.info["damping"] == pytest.approx(0.4)  # 0.05, 0.1 and 0.2 fail


def test_gptq_falls_back_to_rounding_and_says_so():
    hessian = hessian_with_least_eigenvalue(-5.0)
    found = SOLVERS["gptq"].solve(heavy_tailed(), codecs.get("int4-g32"), hessian=hessian)
    assert found.info["fallback"] == "round"
    assert "positive definite" in found.info["reason"]
    assert found.info["damping"] == 1.0
    expected = solved("round", "int4-g32").parts
    jax.tree.map(np.testing.assert_array_equal, found.parts, expected)


@pytest.mark.parametrize("solver", ["gptq", "gptq-in-order"])
@pytest.mark.parametrize("live", [0, 1, 70])
def test_dead_inputs_are_rounded_and_counted(solver, live):
    """An expert that calibration never reached must not be erased."""
    mask = jnp.arange(LENGTH) < live
    hessian = jnp.where(mask[:, None] & mask, correlated_hessian(LENGTH), 0)
    codec, w = codecs.get("int4-g32"), heavy_tailed()
    found = SOLVERS[solver].solve(w, codec, hessian=hessian)
    assert found.info["dead"] == LENGTH - live
    error = np.asarray(codec.decode(found.parts, LENGTH) - w)
    assert np.linalg.norm(error[:, live:]) < 0.2 * np.linalg.norm(w[:, live:])


@pytest.mark.parametrize("shape", [(1, 32), (3, 7), (1, 1)])
@pytest.mark.parametrize("codec", ["int4-g16", "nvfp4"])
@pytest.mark.parametrize("solver", ["gptq", "gptq-in-order"])
def test_small_shapes(solver, codec, shape):
    codec, w = codecs.get(codec), heavy_tailed(*shape)
    found = SOLVERS[solver].solve(w, codec, hessian=correlated_hessian(shape[1]))
    assert found.info["output_error"] <= found.info["rounding_output_error"]
    assert jax.tree.map(jnp.shape, found.parts) == jax.tree.map(jnp.shape, codec.encode(w))


@pytest.mark.parametrize(
    "codec", ["int4-g32", "int4", "int4-tensor", "nf4-g36", "mxfp4", "nvfp4", "qoq4-g32"]
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_clip_is_never_worse_than_rounding_by_its_own_measure(codec, scale):
    codec, w, search = codecs.get(codec), scale * heavy_tailed(), solvers.clip_search()
    clipped = search.solve(w, codec, hessian=jnp.eye(LENGTH)).parts  # all weights count alike

    def measure(parts):
        error = jnp.abs(codec.split(codec.decode(parts, LENGTH) - w))
        return jnp.sum((error / jnp.max(jnp.abs(codec.split(w)), -1, keepdims=True)) ** search.p)

    assert measure(clipped) <= measure(codec.encode(w)) * (1 + 1e-5)


def test_clip_weighs_errors_by_their_inputs():
    codec, w = codecs.get("int4-g32"), heavy_tailed()
    strength = jnp.where(jnp.arange(LENGTH) % 8 == 0, 100.0, 0.01)
    blind = solvers.clip_search().solve(w, codec, hessian=jnp.eye(LENGTH)).parts
    seeing = solvers.clip_search().solve(w, codec, hessian=jnp.diag(strength)).parts
    error = lambda parts: jnp.sum(strength * (codec.decode(parts, LENGTH) - w) ** 2)
    assert error(seeing) < 0.8 * error(blind)


@pytest.mark.parametrize("solver", SOLVERS)
def test_constant_and_zero_weights_stay_finite(solver):
    codec = codecs.get("int4-g32")
    w = jnp.zeros((ROWS, LENGTH)).at[1].set(0.5).at[2].set(-0.5).at[3, :16].set(1e-7)
    found = SOLVERS[solver].solve(w, codec, hessian=correlated_hessian(LENGTH))
    values = codec.decode(found.parts, LENGTH)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values, w, atol=0.05)


@pytest.mark.parametrize("codec", ["int4-g32", "int4-tensor", "f16"])
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_storage_has_the_shapes_of_encode(codec, batch_dims):
    codec, x = codecs.get(codec), heavy_tailed(2 * 3 * 4, 40).reshape(2, 3, 4, 40)
    found = solvers.solve_storage(solvers.rounding(), x, codec, batch_dims=batch_dims)
    expected = codec.encode(x, batch_dims=batch_dims)
    assert jax.tree.map(jnp.shape, found.parts) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(np.testing.assert_array_equal, found.parts, expected)


def test_storage_solves_each_entry_with_its_own_hessian():
    codec, x = codecs.get("int4-g32"), heavy_tailed(2 * 16, LENGTH).reshape(2, 4, 4, LENGTH)
    hessian = jnp.stack([correlated_hessian(LENGTH), correlated_hessian(LENGTH, seed=5)])
    found = solvers.solve_storage(SOLVERS["gptq"], x, codec, batch_dims=1, hessian=hessian)
    alone = [
        SOLVERS["gptq"].solve(x[i].reshape(16, LENGTH), codec, hessian=hessian[i]) for i in (0, 1)
    ]
    for name, part in found.parts.items():
        expected = jnp.stack([one.parts[name].reshape(4, 4, -1) for one in alone])
        np.testing.assert_array_equal(part, expected)
    errors = [one.info["output_error"] for one in alone]
    assert found.info["output_error"] == pytest.approx(np.mean(errors))
    assert found.info["worst_output_error"] == max(errors)


BAD_INPUTS = {
    "a NaN weight": ("round", {"w": jnp.full((2, 8), jnp.nan)}, "`w`.*NaN"),
    "one axis": ("round", {"w": jnp.ones(8)}, r"`w` must be \[rows, length\]"),
    "an infinite hessian": ("gptq", {"hessian": jnp.full((8, 8), jnp.inf)}, "`hessian`.*infinite"),
    "a wrong hessian": ("gptq", {"hessian": jnp.eye(7)}, r"`hessian` must be \[length, length\]"),
    "no hessian": ("gptq", {"hessian": None}, "`hessian` is None"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(case):
    solver, changed, message = BAD_INPUTS[case]
    given = {"w": heavy_tailed(2, 8), "hessian": jnp.eye(8)} | changed
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver].solve(given["w"], codecs.get("int4-g8"), hessian=given["hessian"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.gptq(damping=0), "`damping`"),
        (lambda: solvers.gptq(block=0), "`block`"),
        (lambda: solvers.clip_search(steps=0), "`steps`"),
        (lambda: solvers.clip_search(least=1.5), "`least`"),
        (lambda: solvers.clip_search(p=0), "`p`"),
        (lambda: solvers.clip_search(refit=-1), "`refit`"),
        (lambda: solvers.hqq(kappa=0), "`kappa`"),
        (lambda: solvers.hqq(iters=-1), "`iters`"),
        (lambda: solvers.get("awq"), "`solver` must be one of"),
        (lambda: solvers.get("gptq"), "calibration"),
        (
            lambda: solvers.solve_storage(
                solvers.rounding(), jnp.ones((2, 8)), codecs.get("int8"), batch_dims=2
            ),
            "`batch_dims`",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_solvers_by_name():
    assert solvers.get("clip") == solvers.clip_search()
    assert solvers.get("hqq").name == "hqq"
    assert solvers.get(SOLVERS["gptq"]) is SOLVERS["gptq"]
    assert SOLVERS["gptq"].needs == {"hessian"}
    batch = [(jnp.ones(2),)]
    assert hash(solvers.gptq(batch)) == hash(solvers.gptq())  # data are no part of the identity
