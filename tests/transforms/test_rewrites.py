"""Small programs before and after, as text: what the rewriter emits, equation by equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import stowax as sx
from stowax.transforms.core import compat
from tests.transforms.check import randn, weight

X = randn(1, 2, 8)


def outline(jaxpr, indent=""):
    """A line for each equation: primitive (or the name of a jit), types in and out; inner programs below."""
    lines = []
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        name = eqn.params["name"] if eqn.primitive.name == "jit" else eqn.primitive.name
        types = [
            " ".join(v.aval.str_short(short_dtypes=True) for v in vs)
            for vs in (eqn.invars, eqn.outvars)
        ]
        lines.append(f"{indent}{name}: {types[0]} -> {types[1]}")
        if name not in ("packed_dot", "_take"):
            for inner in compat.inner_jaxprs(eqn):
                lines += outline(inner, indent + "  ")
    return lines


def matmul(p, x):
    return jnp.tanh(x @ p["w"].T)


def scan(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def remat_of_jit(p, x):
    return jax.checkpoint(jax.jit(lambda w, x: jnp.sin(x @ w)))(p["w"], x)


GOLDEN = [
    (
        matmul,
        weight(0, 4, 8),
        """
        transpose: f32[4,8] -> f32[8,4]
        dot_general: f32[2,8] f32[8,4] -> f32[2,4]
        tanh: f32[2,4] -> f32[2,4]
        """,
        """
        packed_dot: f32[2,8] u8[4,8] f16[4,1] -> f32[2,4]
        tanh: f32[2,4] -> f32[2,4]
        """,
    ),
    (
        scan,
        weight(0, 3, 8, 8),
        """
        scan: f32[2,8] f32[3,8,8] -> f32[2,8]
          dot_general: f32[2,8] f32[8,8] -> f32[2,8]
          tanh: f32[2,8] -> f32[2,8]
        """,
        """
        scan: f32[2,8] u8[3,8,8] f16[3,8,1] -> f32[2,8]
          packed_dot: f32[2,8] u8[8,8] f16[8,1] -> f32[2,8]
          tanh: f32[2,8] -> f32[2,8]
        """,
    ),
    (
        remat_of_jit,
        weight(0, 8, 8),
        """
        remat2: f32[8,8] f32[2,8] -> f32[2,8]
          <lambda>: f32[8,8] f32[2,8] -> f32[2,8]
            dot_general: f32[2,8] f32[8,8] -> f32[2,8]
            sin: f32[2,8] -> f32[2,8]
        """,
        """
        remat2: u8[8,8] f16[8,1] f32[2,8] -> f32[2,8]
          <lambda>: u8[8,8] f16[8,1] f32[2,8] -> f32[2,8]
            packed_dot: f32[2,8] u8[8,8] f16[8,1] -> f32[2,8]
            sin: f32[2,8] -> f32[2,8]
        """,
    ),
]


@pytest.mark.parametrize(
    ("fn", "w", "before", "after"), GOLDEN, ids=[g[0].__name__ for g in GOLDEN]
)
def test_golden(fn, w, before, after):
    fast = sx.quantize("int8")(fn)
    encoded = fast.encode({"w": w}, X)
    for jaxpr, text in zip(fast.jaxprs(encoded, X), (before, after)):
        assert outline(jaxpr) == [line[8:] for line in text.splitlines() if line.strip()]


def test_show(capsys):
    fast = sx.quantize("int8")(matmul)
    encoded = fast.encode({"w": weight(0, 4, 8)}, X)
    sx.show(fast, encoded, X)
    printed = capsys.readouterr().out
    assert printed.index("dot_general") < printed.index("packed_dot")
