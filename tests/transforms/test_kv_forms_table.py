"""The table of cache forms itself: each is a working model, and really is causal attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.transforms.kv_forms import FORMS, Form, embeddings, reference

BY_NAME = {form.name: form for form in FORMS}
BF16 = {name for name in BY_NAME if "bf16" in name}
GROWS = {"concat", "concat in the layout bksh"}

# The table itself; its forms run in test_kv_forms.py.
pytestmark = [pytest.mark.slow, pytest.mark.by_hand]

every_form = pytest.mark.parametrize("name", BY_NAME)


@functools.cache
def jitted(name: str):
    """Compiled in a hurry: it runs a few times only."""
    return jax.jit(BY_NAME[name].step, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def plain_outputs(name: str) -> list[np.ndarray]:
    return outputs(BY_NAME[name], BY_NAME[name].inputs)


def outputs(form: Form, inputs) -> list[np.ndarray]:
    """The first leaf of each output, under jit."""
    cache, outs = form.cache, []
    for x in inputs:
        out, cache = jitted(form.name)(form.params, x, cache)
        outs.append(np.asarray(jax.tree.leaves(out)[0], np.float32))
    return outs


def close(name, got, want) -> None:
    tolerance = 3e-2 if name in BF16 else 2e-5
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def first(x) -> jax.Array:
    """The tokens among the inputs of one call."""
    return jax.tree.leaves(x)[0]


def changed(form: Form, call: int, token: int) -> list:
    """The inputs with another token in one call."""
    leaves, tree = jax.tree.flatten(form.inputs[call])
    x = leaves[0]
    other = (x[:, token] + 1) % 40 if jnp.issubdtype(x.dtype, jnp.integer) else -x[:, token]
    leaves[0] = x.at[:, token].set(other)
    new = list(form.inputs)
    new[call] = jax.tree.unflatten(tree, leaves)
    return new


def test_counts_and_names():
    assert len(BY_NAME) == len(FORMS)
    assert sum(form.kind == "static" for form in FORMS) >= 21
    assert sum(form.kind == "adversarial" for form in FORMS) >= 35
    assert sum(not form.found for form in FORMS) >= 5
    assert {form.kind for form in FORMS} == {"static", "adversarial"}


@every_form
def test_cache_keeps_its_structure(name):
    form = BY_NAME[name]
    cache = form.cache
    for x in form.inputs:
        _, new = jax.eval_shape(form.step, form.params, x, cache)
        assert jax.tree.structure(new) == jax.tree.structure(cache)
        if name not in GROWS:
            assert leaves(new) == leaves(cache)
        cache = new


def leaves(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@every_form
def test_is_causal_and_remembers(name):
    form = BY_NAME[name]
    plain = plain_outputs(name)
    if first(form.inputs[0]).shape[1] > 1:
        other = outputs(form, changed(form, 0, -1))
        close(name, other[0][:, :-1], plain[0][:, :-1])
        assert np.abs(other[0][:, -1] - plain[0][:, -1]).max() > 1e-3
    if form.found:
        other = outputs(form, changed(form, -2, -1))
        assert np.abs(other[-1] - plain[-1]).max() > 1e-3, "does not look back"


@pytest.mark.parametrize("name", [form.name for form in FORMS if form.plain])
def test_equals_the_reference(name):
    form = BY_NAME[name]
    want = reference(form.params, jnp.concatenate(embeddings(), 1), form.plain)
    close(name, np.concatenate(plain_outputs(name), 1), want)
