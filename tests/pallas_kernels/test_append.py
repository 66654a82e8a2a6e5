"""New rows of a cache: the kernel against the path of XLA, what it refuses, and where it is in a program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from stowax.pallas_kernels import Kept, append, pack_rows
from stowax.pallas_kernels.append import append_kernel, kernel
from stowax.pallas_kernels.codecs import Gear, per_channel, per_token

ROTATED = per_token("lm2-g16", rotate=True)
CODECS = {
    "kv": (per_channel("lm4", 32), ROTATED),
}
CODECS_SLOW = {
    "int4": (per_token("int4-g16"), per_token("int8")),
    "kivi": (per_channel("int2-asym", 32), per_token("int2-g16-asym")),
    "floats": (per_token("nf4-g16"), per_token("fp8_e4m3")),
    "plain and blocks of 64": (per_token("bf16"), per_channel("int8", 64)),
    "binary": (per_token("int1"), per_token("lm1-g16")),
}


def operands(codecs, b=2, k=1, s=64, h=32, recent=32, sinks=3, dtype="bfloat16"):
    """Caches, new rows, positions, labels and counts."""
    rng = np.random.default_rng(0)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    streams = tuple(
        Kept(pack_rows(x(b, k, s, h), c), x(b, k, sinks, h), x(b, k, recent, h)) for c in codecs
    )
    new = tuple(x(b, k, 1, h) for _ in codecs)
    labels = np.stack([rng.permutation(s)[:recent] for _ in range(b)]).astype(np.int32)
    labels[-1, recent // 2 :] = -1
    at = jnp.asarray(
        [[41], [1], [s]][:b], jnp.int32
    )  # one block of three tokens, a sink, a row to drop
    return streams, new, at, jnp.asarray(labels), jnp.asarray([70, 5, 6][:b], jnp.int32)


def check(codecs, **changes):
    """Codes are the same but where rounding goes the other way, by which few rows change, and little."""
    args = operands(codecs, b=3, **changes)
    got = jax.jit(functools.partial(kernel.append, length=50, interpret=True))(*args)
    want = jax.jit(functools.partial(append, length=50, implementation="xla"))(*args)
    for a, b in zip(got[0], want[0]):
        x, y = a.rows.decode(), b.rows.decode()
        off = jnp.abs(x - y) > 1e-3 * jnp.abs(y).max()
        assert float(off.mean()) < 1e-3
        assert bool((a.sinks == b.sinks).all() and (a.recent == b.recent).all())
    assert bool((got[1] == want[1]).all() and (got[2] == want[2]).all())


@pytest.mark.parametrize("name", CODECS)
def test_kernel(name):
    check(CODECS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS_SLOW)
def test_kernel_of_every_form(name):
    check(CODECS_SLOW[name], recent=64, h=64, s=128)


@pytest.mark.parametrize("entry", [1, -1, 7])
def test_an_entry_of_a_stack(entry):
    """As its own buffers, in place: the other entries stay; an index is clipped as `lax.dynamic_index_in_dim` does."""
    streams, *rest = operands(CODECS["kv"], b=2)
    stack = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x[::-1] * 0]), streams)
    real = {1: 1, -1: 2, 7: 2}[entry]
    own = jax.tree.map(lambda x: x[real], stack)
    for run in (
        functools.partial(append, implementation="xla", length=50),
        functools.partial(kernel.append, length=50, interpret=True),
    ):
        run = jax.jit(run)
        got, want = run(stack, *rest, entry=jnp.int32(entry)), run(own, *rest)
        for x, y, old in zip(*map(jax.tree.leaves, (got[0], want[0], stack)), strict=True):
            np.testing.assert_array_equal(x, old.at[real].set(y))
        for x, y in zip(got[1:], want[1:]):
            np.testing.assert_array_equal(x, y)


def test_without_sinks_and_recent_rows():
    check((per_token("int8"),), recent=0, sinks=0)


def test_what_comes_back_is_what_came():
    """Token by token, also under vmap and scan."""
    (stream,), _, _, labels, count = operands((per_token("int8"),), b=1)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((5, 1, 1, 1, 32)), jnp.bfloat16)

    def step(state, x):
        return append(state[0], [x], state[2][:, None] - 60, *state[1:]), None

    start = (stream,), labels, count
    (after,), labels, count = jax.lax.scan(step, start, rows)[0]
    found = after.rows.decode()[0, 0, 10:15]
    np.testing.assert_allclose(found, rows[:, 0, 0, 0].astype(jnp.float32), atol=0.03)
    np.testing.assert_array_equal(labels[0, 6:11], range(10, 15))  # 70 % 32
    np.testing.assert_array_equal(after.recent[0, 0, 6:11], rows[:, 0, 0, 0])
    two = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    both = jax.vmap(lambda s: step(s, rows[0])[0])(two)
    one = step(start, rows[0])[0]
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(x[1], y)
    at = jnp.asarray([[10]])
    into = lambda s, e: append(s[0], [rows[0]], at, *s[1:], entry=e)
    stack = jax.tree.map(lambda x: x[None], two[0]), *two[1:]  # a stack of one, for each of two
    stack = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stack[0]), *stack[1:]
    for axes, entry in (((0, None), jnp.int32(0)), ((0, 0), jnp.zeros(2, jnp.int32))):
        many = jax.vmap(into, axes)(stack, entry)
        for x, y in zip(jax.tree.leaves(many[0]), jax.tree.leaves(one[0]), strict=True):
            np.testing.assert_array_equal(x[1, 0], y)


def test_the_kernel_is_in_programs_for_cuda_but_not_in_exported_ones():
    args = jax.eval_shape(lambda: operands(CODECS["kv"]))
    jitted = jax.jit(lambda *x: jax.tree.leaves(append(*x)))
    assert "xla.gpu.triton" in jitted.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    leaves, tree = jax.tree.flatten(args)
    flat = jax.jit(lambda *x: jitted(*jax.tree.unflatten(tree, x)))
    assert "triton" not in export.export(flat, platforms=("cpu", "cuda"))(*leaves).mlir_module()


@pytest.mark.parametrize(
    ("codec", "changes", "reason"),
    [
        (per_token("int3-g16"), {}, "its axes are no powers of two"),
        (per_token("int4-g16"), {"h": 96}, "its axes are no powers of two"),
        (Gear(per_token("int4-g32"), tokens=32), {}, "no `top_k` in a kernel"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_xla(codec, changes, reason, monkeypatch):
    args = jax.eval_shape(lambda: operands((codec,), **changes))
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(append, implementation="triton"), *args)
    assert jax.eval_shape(append, *args)[2].shape == (2,)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert reason in append_kernel(args[0], 1)
    assert "2 new tokens" in append_kernel(args[0], 2)


def test_bad_input():
    streams, new, at, labels, count = operands(CODECS["kv"])
    with pytest.raises(ValueError, match="`streams` are 2 and `new` 1"):
        append(streams, new[:1], at, labels, count)
    with pytest.raises(ValueError, match=r"`at` is int32\[2\]"):
        append(streams, new, at[:, 0], labels, count)
    with pytest.raises(ValueError, match=r"`labels` is \[1, 32\]"):
        append(streams, new, at, labels[:1], count)
    with pytest.raises(ValueError, match="stream 1: rows, sinks, recent and new"):
        append(streams, (new[0], new[1][..., :8]), at, labels, count)
    with pytest.raises(ValueError, match="`how` is 'roll'"):
        append(streams, new, at, labels, count, how="roll")
    with pytest.raises(ValueError, match="`implementation` is 'mosaic'"):
        append(streams, new, at, labels, count, implementation="mosaic")
