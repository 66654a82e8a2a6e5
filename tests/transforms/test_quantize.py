"""Rules, errors, guesses and reports."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stowax as sx
from stowax.transforms.core import is_packed
from tests.transforms.check import decode, randn, relative_error, weight

N = 16
X = randn(100, 4, N)


def mlp(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"]


def params():
    return {
        "up": {"kernel": weight(0, N, 32), "bias": randn(1, 32)},
        "down": {"kernel": weight(2, 32, N)},
    }


def codecs_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.codec.name
        for path, leaf in leaves
        if is_packed(leaf)
    }


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ("int8", {"up/kernel": "int8", "down/kernel": "int8"}),
        ({"up": "int4-g8", "": "int8"}, {"up/kernel": "int4-g8", "down/kernel": "int8"}),
        ({"up": None, "": "int8"}, {"down/kernel": "int8"}),
        ({"kernel": "int8", "up/bias": None}, {"up/kernel": "int8", "down/kernel": "int8"}),
        ([("^down", "w4g8")], {"down/kernel": "int4-g8"}),
        ({"(up|down)/kernel$": sx.codecs.get("nf4")}, {"up/kernel": "nf4", "down/kernel": "nf4"}),
    ],
)
def test_first_rule_that_matches_decides(rules, want):
    assert codecs_of(sx.quantize(rules)(mlp).encode(params(), X)) == want


def test_unused_rule():
    fast = sx.quantize({"upp/kernel": "int4", "": "int8"})(mlp)
    with pytest.raises(ValueError, match=r"\['upp/kernel'\].*'up/kernel'.*strict=False"):
        fast.encode(params(), X)
    lax_ = sx.quantize({"upp/kernel": "int4", "": "int8"})(mlp, strict=False)
    with pytest.warns(UserWarning, match="upp/kernel"):
        encoded = lax_.encode(params(), X)
    assert len(codecs_of(encoded)) == 2


def test_a_rule_for_a_bias_says_why_not():
    with pytest.raises(
        ValueError, match=r"'bias' is found in 'up/bias', which is no weight: used by"
    ):
        sx.quantize({"bias": "int8", "": "int8"})(mlp).encode(params(), X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sx.quantize("int44"), "unknown codec 'int44'"),
        (lambda: sx.quantize({"(": "int8"}), r"`rules` has '\('"),
        (lambda: sx.quantize("int8", solver="magic"), "magic"),
        (lambda: sx.chain(), "at least one transform"),
        (lambda: sx.quantize("int8")(mlp, params="weights").encode(params(), X), "'weights'"),
        (lambda: sx.quantize("int8")(mlp, params=3).encode(params(), X), "argument 3"),
        (lambda: sx.quantize("int8")(mlp)(params(), X), "no leaf of `params` is encoded"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_not_a_function():
    with pytest.raises(TypeError, match="`fn` must be a function; got dict"):
        sx.quantize("int8")({})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    broken = params()
    broken["down"]["kernel"] = broken["down"]["kernel"].at[3, 1].set(bad)
    with pytest.raises(ValueError, match="down/kernel"):
        sx.quantize("int8")(mlp).encode(broken, X)


def test_two_leaves_with_one_path():
    tree = {"a/b": weight(0, N, N), "a": {"b": weight(1, N, N)}}
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        sx.quantize("int8")(lambda p, x: x @ p["a/b"] @ p["a"]["b"]).encode(tree, X)


# ---- which arguments hold weights


def test_weights_by_position_and_by_name():
    first = lambda x, weights: x @ weights["w"]
    tree = {"w": weight(0, N, N)}
    want = None
    for role in (1, -1, "weights"):
        fast = sx.quantize("int8")(first, params=role)
        encoded = fast.encode(X, tree)
        assert codecs_of(encoded) == {"w": "int8"}
        want = fast(X, encoded) if want is None else want
        assert np.array_equal(fast(X, encoded), want)
    by_name = sx.quantize("int8")(first, params="weights")
    encoded = by_name.encode(X, weights=tree)
    assert np.array_equal(by_name(X, weights=encoded), want)
    assert np.array_equal(by_name(weights=encoded, x=X), want)


def test_weights_in_several_arguments():
    """The same path in two arguments: each keeps its own values, rules see the argument."""
    fn = lambda a, b, x: x @ a["w"] @ b["w"]
    a, b = {"w": weight(0, N, N)}, {"w": weight(1, N, N)}
    fast = sx.quantize({"^0/": "int4-g8", "^1/": "int8"})(fn, params=(0, 1))
    packed_a, packed_b = fast.encode(a, b, X)
    assert (packed_a["w"].codec.name, packed_b["w"].codec.name) == ("int4-g8", "int8")
    want = fn(decode(packed_a), decode(packed_b), X)
    assert relative_error(fast(packed_a, packed_b, X), want) < 1e-6
    alone_a, alone_b = fast.encode(a, b)
    assert relative_error(fast(alone_a, alone_b, X), want) < 1e-6


def test_leaves_that_are_no_floats_are_kept():
    """Keys, counters, flags, strings and functions ride along."""

    def fn(p, x):
        noise = jax.random.normal(p["key"], x.shape) * 0
        return (
            p["act"](lax.cond(p["on"], lambda: x, lambda: -x) @ p["w"])
            + noise
            + p["table"][p["at"]]
        )

    tree = {
        "w": weight(0, N, N),
        "key": jax.random.key(0),
        "on": jnp.array(True),
        "at": jnp.array(1),
        "act": jnp.tanh,
        "note": "kept",
        "none": None,
        "flag": True,
        "table": randn(1, 3),
    }
    fast = sx.quantize("int8")(fn)
    encoded = fast.encode(tree, X)
    assert codecs_of(encoded) == {"w": "int8"}
    assert relative_error(fast(encoded, X), fn(tree, X)) < 0.02
    explained = fast.explain(encoded, X)
    assert explained["key"].reason == "no weight: its dtype is key<fry>"
    json.dumps(explained.to_dict())


def test_keywords_and_statics_of_a_call():
    def fn(p, x, *, scale=1.0, mode="plain"):
        return x @ p["w"] * scale if mode == "plain" else x @ p["w"].T

    fast = sx.quantize("int8")(fn)
    encoded = fast.encode({"w": weight(0, N, N)}, X, scale=2.0)
    assert relative_error(fast(encoded, X, scale=2.0), 2 * fast(encoded, X)) < 1e-6
    assert fast(encoded, X, mode="other").shape == (4, N)
    jitted = jax.jit(fast, static_argnames="mode")
    assert relative_error(jitted(encoded, X, mode="plain"), fast(encoded, X)) < 1e-6


# ---- encoding without a program


def conv(p, x):
    x = lax.conv_general_dilated(
        x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return x @ p["dense"]["kernel"]


def embed(p, ids):
    return p["embedding"][ids] @ p["embedding"].T


def stacked(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["w"])[0]


GUESSES = [
    ("matmul", mlp, params(), X),
    ("stack", stacked, {"layers": {"w": weight(0, 3, N, N)}}, X),
    (
        "convolution",
        conv,
        {"conv": {"kernel": weight(0, 3, 3, 4, 8)}, "dense": {"kernel": weight(1, 8, N)}},
        randn(2, 1, 5, 5, 4),
    ),
    ("embedding", embed, {"embedding": weight(0, 20, N)}, jnp.array([[1, 19]])),
]


@pytest.mark.parametrize(("name", "fn", "tree", "x"), GUESSES, ids=[g[0] for g in GUESSES])
def test_guesses_by_name_are_as_good(name, fn, tree, x):
    """The conventions find the axes that the program would have shown."""
    fast = sx.quantize("int8")(fn)
    guessed, told = fast.encode(tree), fast.encode(tree, x)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert codecs_of(guessed) == codecs_of(told)
    assert jax.tree.leaves(shapes(guessed)) == jax.tree.leaves(shapes(told))
    assert relative_error(fast(guessed, x), fast(told, x)) < 1e-6
    assert all(v.guessed for v in jax.tree.leaves(guessed, is_leaf=is_packed) if is_packed(v))


def test_a_wrong_guess_is_refused_with_advice():
    """A stack of norm gains looks like a matrix."""

    def fn(p, x):
        return lax.scan(lambda x, p: ((x * p["gain"]) @ p["w"], None), x, p)[0]

    tree = {"gain": randn(0, 3, N), "w": weight(1, 3, N, N)}
    fast = sx.quantize("int8")(fn)
    with pytest.raises(ValueError, match=r"'gain' \(used by scan\).*fast.encode\(params, x\)"):
        fast(fast.encode(tree), X)
    assert codecs_of(fast.encode(tree, X)) == {"w": "int8"}
    kept = sx.quantize({"gain": None, "": "int8"})(fn)
    assert relative_error(kept(kept.encode(tree), X), fn(tree, X)) < 0.05


def test_names_of_norms_are_no_weights():
    tree = {
        "norm": {"scale": randn(0, 3, N)},
        "attn_norm": {"weight": randn(0, 3, N)},
        "w": weight(1, N, N),
    }
    assert codecs_of(sx.quantize("int8")(mlp).encode(tree)) == {"w": "int8"}


def test_functions_of_any_arguments_are_encoded_by_name():
    """``encode(variables)`` of an ``apply(variables, *args)`` is no call without inputs."""
    fast = sx.quantize("int8")(lambda variables, *args: args[0] @ variables["w"])
    assert fast.encode({"w": weight(0, N, N)})["w"].guessed


# ---- reports


def test_explain_before_and_after_encoding():
    fast = sx.quantize({"down": None, "": "int8"})(mlp)
    before, encoded = fast.explain(params(), X), fast.encode(params(), X)
    after = fast.explain(encoded, X)
    assert before.nbytes == after.nbytes == sum(v.nbytes for v in jax.tree.leaves(encoded))
    assert before.nbytes_before == after.nbytes_before
    assert before["up/kernel"].reason == "not encoded yet"
    assert before["down/kernel"].reason == "kept by a rule"
    assert before["up/bias"].reason.startswith("no weight: used by")
    use = after["up/kernel"].uses[0]
    assert (use.op, use.kind, use.how, use.inner, use.rows) == (
        "dot_general",
        "matmul",
        "xla: decode + dot",
        (0,),
        (1,),
    )
    assert "1 of 3 leaves packed" in str(after)
    assert "xla: decode + dot" in str(after)
    data = json.loads(json.dumps(after.to_dict()))
    assert [row["name"] for row in data["rows"]] == ["down/kernel", "up/bias", "up/kernel"]
    assert "<table>" in after._repr_html_()
    shapes = jax.eval_shape(lambda: (params(), X))
    assert str(fast.explain(*shapes)) == str(before)


def test_report_of_encode():
    fast = sx.quantize("int8")(mlp)
    assert fast.report is None
    encoded = fast.encode(params(), X)
    rows = {row.name: row for row in fast.report.rows}
    assert set(rows) == {"up/kernel", "down/kernel"}
    row = rows["up/kernel"]
    assert (row.codec, row.solver, row.nbytes) == ("int8", "round", encoded["up"]["kernel"].nbytes)
    true = relative_error(encoded["up"]["kernel"].decode(), params()["up"]["kernel"])
    assert row.info["weight_error"] == pytest.approx(true, rel=0.3)
    json.dumps(fast.report.to_dict())
    assert "weight error" in str(fast.report)
    assert "<table>" in fast.report._repr_html_()


def test_chain():
    """A leaf goes to the first transform that claims it; the function is rewritten once."""
    fast = sx.chain(sx.quantize({"up": "int4-g8"}), sx.chain(sx.quantize("int8", solver="clip")))(
        mlp
    )
    encoded = fast.encode(params(), X)
    assert codecs_of(encoded) == {"up/kernel": "int4-g8", "down/kernel": "int8"}
    assert {row.name: row.solver for row in fast.report.rows}["down/kernel"] == "clip"
    assert relative_error(fast(encoded, X), mlp(decode(encoded), X)) < 1e-6
    assert repr(fast.transform).count("quantize") == 2


def test_nothing_packed_is_the_function_itself():
    fast = sx.quantize(None)(mlp)
    encoded = fast.encode(params(), X)
    before, after = fast.jaxprs(encoded, X)
    assert str(before) == str(after)
    assert np.array_equal(fast(encoded, X), mlp(params(), X))


def test_encoding_twice_keeps_what_is_packed():
    first = sx.quantize({"up": "int4-g8"})(mlp)
    half = first.encode(params(), X)
    whole = sx.quantize({"down": "int8"})(mlp).encode(half, X)
    assert codecs_of(whole) == {"up/kernel": "int4-g8", "down/kernel": "int8"}
