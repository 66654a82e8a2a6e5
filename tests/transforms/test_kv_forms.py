"""Every form of attention over a cache: found where it is one, left alone where it is not, and never wrong."""

import functools

import jax
import numpy as np
import pytest

import stowax as sx
from stowax.pallas_kernels.codecs import per_token
from stowax.transforms.kv import KVState, Method
from tests.transforms import kv_outside
from tests.transforms.kv_forms import FORMS, Form

# Left alone, with the reason that `explain()` gives.
REFUSED = {
    "flash-style scan over blocks": "carried by `scan`",
    "attention in shard_map": "shard_map",
    "rolled by two rows, one written": "rolled by 2 rows, and other rows than those are written",
    "paged, read through another table": "written through one table and read through another",
    "old cache and self, nothing written": "not updated there in this call",
    "keys written before, values after": "keys are read before they are updated and values after",
}
# Read by replay and not by the attention kernel, with the reason that `explain()` gives.
REPLAYED = {
    "ALiBi": "no mask of positions",
    "deferred softmax": "not divided by their sum",
    "deferred softmax, layers unrolled": "not divided by their sum",
    "softmax(where=)": "not divided by their sum",
    "where after softmax": "not divided by their sum",
    "dropout on the weights": "not divided by their sum",
    "exp(x - logsumexp)": "not divided by their sum",
    "exp times reciprocal": "not divided by their sum",
    "sink logits": "not divided by their sum",
    "sink logit first": "not divided by their sum",
    "sigmoid": "not divided by their sum",
    "denominator plus one": "the weights are no softmax",
    "-inf, empty rows handled": "the weights are no softmax",
    "RoPE on the cached K": "not one stream each",
    "K normalised at read": "keys are changed after they are read",
    "MLA, two dots": "not one stream each",
    "MLA, one dot over c and r": "not one stream each",
    "concat": "the cache grows",
    "concat in the layout bksh": "the cache grows",
    "roll by concat": "moves or grows",
    "roll by jnp.roll": "moves or grows",
    "roll in the layout bksh": "moves or grows",
    "written after, concat at read": "moves or grows",
    "written after, in the layout bksh": "moves or grows",
    "written after, scan over layers": "moves or grows",
    "written after, layers unrolled": "moves or grows",
    "old cache and self in one softmax": "0 new tokens",
    "old cache and self merged by sums": "0 new tokens",
    "old cache and self, scan over layers": "0 new tokens",
    "old cache and self, layers unrolled": "0 new tokens",
    "chunks only": "cuDNN takes bfloat16 and float16",
}
# Rows are encoded without loss, so that what reads packed rows takes part.
EXACT = Method("exact", per_token("f32"), per_token("f32"))
# A selector can't evict: the cache grows, or weights and rows are used elsewhere too.
NO_EVICTION = {
    "concat",
    "concat in the layout bksh",
    "attention weights returned",
}
TOLERANCE = 2e-5
built = functools.cache(lambda build: build())

every_form = pytest.mark.parametrize("form", FORMS, ids=[f.name for f in FORMS])


def outputs_of(form: Form, method, calls: int):
    """The outputs with a compressed cache, those of the form itself, and the last `explain`."""
    apply = sx.compress_kv(method, private_pages=True)
    fast = apply(form.step, params=0, cache=2, strict=False)
    cache = fast.init_cache(form.cache, form.params, form.inputs[0])
    last = []
    jit = jax.jit if "bf16" not in form.name else lambda f: f  # XLA rounds bfloat16 where it likes

    @jit  # one program to compile
    def run(params, inputs, cache, own):
        got, want = [], []
        for x in inputs:
            last[:] = jax.tree.map(as_shape, (params, x, cache))
            out, cache = fast(params, x, cache)
            got.append(out)
            out, own = form.step(params, x, own)
            want.append(out)
        return got, want

    got, want = run(form.params, form.inputs[:calls], cache, form.cache)
    return got, want, fast.explain(*last).caches


def as_shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def check_equal(got, want, tolerance=TOLERANCE):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance
        )


@every_form
def test_found_and_equal_with_a_full_cache(form):
    """A prompt by replay, the next token by the attention kernel where the form is the usual one."""
    got, want, table = outputs_of(form, EXACT, calls=2)
    check_equal(
        got, want, 2e-2 if "bf16" in form.name else TOLERANCE
    )  # a kernel keeps scores in float32
    paths = [site.path for row in table.rows if row.method for site in row.sites]
    reason = REPLAYED.get(form.name)
    assert all(p.startswith("xla: ") if reason is None else reason in p for p in paths), paths
    found = any(row.method for row in table.rows)
    assert found == (form.found and form.name not in REFUSED)
    if form.name in REFUSED:
        assert any(REFUSED[form.name] in row.reason for row in table.rows), table
    assert all(row.reason for row in table.rows if not row.method)


# Every third form: what masks at positions are is tested by all methods too.
@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [f if i % 3 == 0 else pytest.param(f, marks=pytest.mark.by_hand) for i, f in enumerate(FORMS)],
    ids=[f.name for f in FORMS],
)
def test_equal_when_nothing_has_to_be_evicted(form):
    """Slots that remember positions: the model's mask is evaluated at them, for each head."""
    if form.name in NO_EVICTION:
        pytest.skip("this cache can't lose tokens: see NO_EVICTION")
    method = sx.recipes.select("streaming", 12, sinks=2)
    got, want, table = outputs_of(form, method, calls=2)
    if form.name == "ring buffer":
        assert any(row.method for row in table.rows)
    check_equal(got, want)


@pytest.mark.parametrize("build", kv_outside.OUTSIDE)
@pytest.mark.parametrize("method", [sx.recipes.full(), sx.recipes.select("streaming", 12, sinks=2)])
def test_models_of_other_people(build, method):
    """Decoders of outside packages, unmodified: caches found, outputs equal where nothing is lost."""
    form = built(build)
    got, want, table = outputs_of(form, method, calls=2)
    assert [row for row in table.rows if row.method]
    check_equal(got, want)


def test_forms_that_are_found():
    """The study's bar: all static forms, and nearly all odd ones."""
    odd = [f.name for f in FORMS if f.kind == "adversarial" and f.found]
    assert len([n for n in odd if n not in REFUSED]) >= 0.8 * len(odd)
    assert not [f.name for f in FORMS if f.kind == "static" and f.name in REFUSED]


def test_a_cond_of_which_one_branch_attends_hides_its_attention():
    form = next(f for f in FORMS if f.name == "attention in cond")
    with pytest.raises(ValueError, match="only some branches"):
        outputs_of(form, sx.recipes.select("h2o", 12), calls=1)


def test_a_structured_mask_is_never_made_in_full():
    """Masks of iotas and lengths leave no array of queries x cache behind, with positions of slots or without."""
    form = next(f for f in FORMS if f.name == "sliding window")
    fast = sx.compress_kv(sx.recipes.select("streaming", 12))(form.step, params=0, cache=2)
    cache = fast.init_cache(form.cache, form.params, form.inputs[0])
    table = fast.explain(form.params, form.inputs[0], cache).caches
    assert table.rows[0].sites[0].mask == "causal + window 4"


def test_state_takes_the_place_of_the_first_leaf():
    form = FORMS[0]
    fast = sx.compress_kv(sx.recipes.int8())(form.step, params=0, cache=2)
    cache = fast.init_cache(form.cache, form.params, form.inputs[0])
    _, after = jax.jit(fast)(form.params, form.inputs[0], cache)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    states = list(jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, KVState)))
    assert sum(isinstance(x, KVState) for x in states) == 1
