"""Plans: they keep to their budget as predicted, change no result, travel as JSON, and say what is in the way."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stowax as sx
from stowax import memory_planner, models
from stowax.transforms.core import compat
from stowax.transforms.placement import BASELINES, Plan, updates
from stowax.transforms.placement.memory import host_type

CONFIG = models.LlamaConfig(
    vocab_size=64, dim=64, layers=3, heads=2, kv_heads=2, head_dim=32, ffn_dim=128
)
plan = functools.partial(sx.plan, device="v5e")


@functools.cache
def llama():
    """A loss, its gradient, and arguments."""
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)

    def loss(params, tokens):
        logits = functions.forward(params, tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean()

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 65)))
    return loss, jax.value_and_grad(loss), (params, tokens)


def mlp():
    """No scan, no attention: a plain function of lists."""

    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return (x**2).sum()

    draw = lambda *s: jnp.asarray(np.random.default_rng(1).standard_normal(s), jnp.float32) / 8
    args = [draw(32, 32) for _ in range(12)], draw(512, 32)
    return loss, jax.grad(loss), args


def jitted(fn):
    """Compiled in a hurry: it runs once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def wanted(program: str):
    _, fn, args = PROGRAMS[program]()
    return jitted(fn)(*args)


PROGRAMS = {"scanned": llama, "mlp": mlp}


def check_equal(got, want, exact=False):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_plans_keep_to_budgets_and_change_nothing(program):
    _, fn, args = PROGRAMS[program]()
    whole, full = (plan(fn, *args, strategy=s) for s in ("keep-all", "full-remat"))
    budget = (whole.after + full.after) // 2
    found = plan(fn, *args, hbm=budget)
    assert found.after <= budget
    assert 0 <= found.bound <= found.seconds
    check_equal(jitted(found.apply(fn))(*args), wanted(program))
    assert found.seconds <= full.seconds


SLOW = ("save-dots", "offload-dots", "keep-all")


@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in BASELINES]
)
def test_named_rules_change_nothing(strategy):
    _, fn, args = llama()
    found = plan(fn, *args, strategy=strategy)
    assert (found.strategy, found.budget) == (strategy, None)
    check_equal(jitted(found.apply(fn))(*args), wanted("scanned"))


def test_operation_by_operation_results_are_equal_bit_for_bit():
    """Eagerly, so that no compiler fuses the two programs differently."""
    _, fn, args = mlp()
    found, whole = (plan(fn, *args, strategy=s) for s in ("full-remat", "keep-all"))
    assert found.again
    check_equal(found.apply(fn)(*args), whole.apply(fn)(*args), exact=True)


def test_less_is_kept_in_the_compiled_program():
    """By XLA's own count for the CPU; the scan's stacks are what it can't undo."""
    _, fn, args = llama()
    found = plan(fn, *args, strategy="full-remat")
    peak = lambda f: memory_planner.memory_report(jax.jit(f).lower(*args).compile()).temporaries
    assert peak(found.apply(fn)) < 0.7 * peak(fn)


def test_gradients_of_layers_take_memory_when_their_loop_starts():
    """They are carried, from zeros that wait; masks are made in the loops; neither is counted twice."""
    _, fn, args = llama()
    found = plan(fn, *args, strategy="keep-all", device="h100")
    scans = [e for e in jax.make_jaxpr(found.apply(fn))(*args).eqns if e.primitive.name == "scan"]
    stacks = lambda e: [v for v in e.outvars[compat.scan_split(e)[1] :] if v.aval.ndim > 1]
    assert stacks(scans[0])
    assert not stacks(scans[-1])
    held = [v.aval for e in scans for v in e.invars[: compat.scan_split(e)[0]]]
    assert all(a.size <= 64 * 64 for a in held if a.dtype == bool)
    assert found.after <= memory_planner.predict(fn, *args, device="h100").peak


def test_a_measured_plan_keeps_to_its_budget_as_compiled():
    _, fn, args = mlp()
    compiled = lambda f: memory_planner.memory_report(jax.jit(f).lower(*args).compile()).peak
    found = sx.plan(fn, *args, hbm=compiled(fn), device="cpu", measure=True)
    assert found.measured == compiled(found.apply(fn)) <= found.budget
    pins = r"least peak of \d compiled plans is .* there are tanh float32\[512,32\].* less, allow `encode`"
    with pytest.raises(ValueError, match=pins) as refused:
        sx.plan(fn, *args, hbm=compiled(fn) // 2, host="1GiB", device="cpu", measure=True)
    enough: Any = refused.value
    found = sx.plan(fn, *args, hbm=enough.least, host="1GiB", device="cpu", measure=True)
    assert found.peak <= enough.least


def test_encoded_values_are_near():
    _, fn, args = llama()
    low = plan(fn, *args, strategy="full-remat").after
    found = plan(fn, *args, hbm=low - 40_000, encode="int8-g64")
    assert "encode" in {k.how for k in found.kept}
    assert found.codec == "int8-g64"
    got, want = jitted(found.apply(fn))(*args), wanted("scanned")
    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert max(map(error, jax.tree.leaves(got), jax.tree.leaves(want))) < 0.05


def test_a_plan_travels_as_json():
    _, fn, args = mlp()
    found = plan(fn, *args, strategy="sqrt")
    again = Plan.from_json(found.to_json())
    assert again == found
    check_equal(jitted(again.apply(fn))(*args), wanted("mlp"))
    with pytest.raises(ValueError, match="`text` is no plan"):
        Plan.from_json("{}")


def test_a_plan_is_for_one_program():
    _, fn, (ws, x) = mlp()
    found = plan(fn, ws, x)
    with pytest.raises(ValueError, match="made for another program"):
        found.apply(fn)(ws, x[:8])


def test_a_budget_out_of_reach_names_the_least_and_what_pins_it():
    _, fn, args = llama()
    with pytest.raises(
        ValueError,
        match=r"`hbm` is 1\.\d\d KiB; the least that was reached is .*arguments and outputs",
    ):
        plan(fn, *args, hbm=1500)
    with pytest.raises(
        ValueError, match=r'`hbm` is .lots.; expected bytes, as a number or as "8GiB"'
    ):
        plan(fn, *args, hbm="lots")
    with pytest.raises(ValueError, match=r"`strategy` is 'best'; expected 'optimal' or one of"):
        plan(fn, *args, strategy="best")


def test_remat_is_a_loss_whose_gradient_is_planned():
    loss, _, args = mlp()
    value, grads = jitted(jax.value_and_grad(loss))(*args)
    budget = plan(jax.value_and_grad(loss, (0, 1)), *args).before * 19 // 20
    small = sx.remat(loss, budget=budget, device="v5e")
    got = jitted(jax.value_and_grad(lambda ws, x: 3 * small(ws, x)))(*args)
    check_equal(got, (3 * value, jax.tree.map(lambda g: 3 * g, grads)))
    np.testing.assert_allclose(jitted(small)(*args), value, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`loss` gives float32\[4\]"):
        sx.remat(lambda x: x, budget="1MB")(jnp.ones(4))


@pytest.mark.parametrize("scan", [True, False])
def test_weights_on_the_host_are_fetched(scan):
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    args = jnp.ones((1, 4), jnp.int32), functions.init_cache(1, 8)
    streamed = sx.offload(functions.step, weights="host")
    check_equal(
        jitted(streamed)(streamed.place(params), *args), jitted(functions.step)(params, *args)
    )
    with pytest.raises(ValueError, match="`weights` is 'disk'"):
        sx.offload(functions.step, weights="disk")


def test_packed_weights_on_the_host():
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    args = jnp.ones((1, 4), jnp.int32), functions.init_cache(1, 8)
    fast = sx.quantize({"embed|norm": None, "": "int8"})(functions.step, params=0)
    packed = fast.encode(params, *args)
    streamed = sx.offload(fast, weights="host")
    check_equal(jitted(streamed)(streamed.place(packed), *args), jitted(fast)(packed, *args))


def trainer():
    """A training step with Adam behind a clip, and its arguments."""
    loss, _, (ws, x) = mlp()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (ws[:3], optimizer.init(ws[:3]), x)


def places_of(tree):
    return [jax.typeof(x).memory_space for x in jax.tree.leaves(tree)]


def test_optimizer_state_on_the_host_is_updated_there(monkeypatch):
    """Two steps, donated, in parts of 2 KiB: the state comes back to where it was, and numbers are equal."""
    monkeypatch.setattr(updates, "PART", 1 << 11)
    step, (params, state, x) = trainer()
    streamed = sx.offload(step, optimizer="host")
    plain, fast = jitted(step), jax.jit(streamed, donate_argnums=(0, 1))
    placed = streamed.place(jax.tree.map(np.asarray, state))
    copies = jax.tree.map(jnp.copy, params)
    want = plain(*plain(params, state, x)[:2], x)
    got = fast(*fast(copies, placed, x)[:2], x)
    assert jax.memory.Space.Host in places_of(got[1])
    assert places_of(got[1]) == places_of(streamed.place(state))
    assert jax.memory.Space.Host not in places_of(got[0])
    check_equal(got, want)


def elementwise(params, state, x):
    """An update by hand: an average of the parameters beside momentum, everything elementwise."""
    grads = jax.tree.map(lambda p: p * x, params)
    speed = jax.tree.map(lambda m, g: 0.9 * m + g, state["speed"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, params, speed)
    mean = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, state["mean"], params)
    return params, {"speed": speed, "mean": mean}


def test_operation_by_operation_an_update_in_parts_is_equal_bit_for_bit(monkeypatch):
    monkeypatch.setattr(updates, "PART", 1 << 10)
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((12, 64)), jnp.float32)}
    state = {"speed": params, "mean": params}
    streamed = sx.offload(elementwise, optimizer="host")
    with jax.disable_jit():
        want = elementwise(params, state, 0.3)
    got = streamed(params, streamed.place(state), jnp.float32(0.3))
    assert set(places_of(got[1])) == {jax.memory.Space.Host}
    check_equal(got, want, exact=True)


def test_what_is_no_elementwise_update_comes_back_whole_or_is_refused():
    def normalized(w, state, x):
        mean = 0.5 * state["mean"] + x.T @ x
        return w - mean / jnp.linalg.norm(mean), {"mean": mean @ mean}

    args = jnp.eye(8), {"mean": jnp.eye(8)}, jnp.ones((4, 8))
    streamed = sx.offload(normalized, optimizer="host")
    got = streamed(args[0], streamed.place(args[1]), args[2])
    assert places_of(got) == [jax.memory.Space.Device, jax.memory.Space.Host]
    check_equal(got, normalized(*args))
    lost = sx.offload(lambda w, state, x: w + state["mean"], optimizer="host")
    with pytest.raises(ValueError, match=r"`state` is argument 1.* 1/mean is no result of the fun"):
        lost(args[0], lost.place(args[1]), args[2])
    with pytest.raises(ValueError, match="nothing is offloaded"):
        sx.offload(normalized)


def test_a_loop_over_parts_needs_few_of_them(monkeypatch):
    """Predicted: donated parameters are updated in place, of the state one part is there."""
    monkeypatch.setattr(updates, "PART", 1 << 20)
    params = {"w": jax.ShapeDtypeStruct((16, 512, 512), jnp.float32)}  # 16 MiB
    on_host = jax.tree.map(host_type, {"speed": params, "mean": params})
    x = jax.ShapeDtypeStruct((), jnp.float32)
    streamed = sx.offload(elementwise, optimizer="host")
    found = memory_planner.predict(streamed, params, on_host, x, donate=(0, 1), device="v5e")
    assert found.outputs == 0
    assert found.peak <= (16 + 4) * 2**20
    both_ways = 2 * 2 * 2**24 / memory_planner.device("v5e").to_host
    assert both_ways <= found.seconds <= 1.1 * both_ways


def test_a_decode_step_streams_the_weights_that_do_not_fit():
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    args = params, jnp.ones((1, 4), jnp.int32), functions.init_cache(1, 8)
    whole = plan(functions.step, *args)
    found = plan(functions.step, *args, hbm=whole.after * 2 // 3, host="1GiB")
    assert not whole.streamed
    assert found.after <= found.budget < found.before == whole.before
    assert found.host > 0
    assert all(path.startswith("0/layers/") for path in found.streamed)
    assert Plan.from_json(found.to_json()) == found
    placed = found.place(*args)
    on_host = [jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(placed)]
    assert sum(on_host) == len(found.streamed)
    check_equal(jitted(found.apply(functions.step))(*placed), jitted(functions.step)(*args))


def test_a_training_step_has_so_much_of_its_optimizer_on_the_host_as_it_must(monkeypatch):
    monkeypatch.setattr(updates, "PART", 1 << 9)
    step, (params, state, x) = trainer()
    args = params, state, x[:8]
    whole = plan(step, *args, donate=(0, 1))
    found = plan(step, *args, hbm=whole.after - 9_000, host="1GiB", donate=(0, 1))
    assert found.after <= found.budget
    assert 0 < len(found.streamed) < 6
    assert all(path.startswith("1/") for path in found.streamed)
    assert found.seconds > whole.seconds
    assert "on the host, fetched part by part" in str(found)
    placed = Plan.from_json(found.to_json()).place(*args)
    got = jitted(found.apply(step))(*placed)
    assert places_of(got[1]) == places_of(placed[1])
    check_equal(got, jitted(step)(*args))


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture(ending, tmp_path):
    _, fn, args = mlp()
    found = plan(fn, *args, strategy="sqrt")
    found.save_picture(tmp_path / f"plan.{ending}")
    assert (tmp_path / f"plan.{ending}").stat().st_size > 1000
    assert "<svg" in found._repr_html_()
    for line, peak in zip(found.timelines, (found.before, found.after)):
        assert max(map(sum, zip(*(band.nbytes for band in line)))) == peak
    assert all(0 <= box.start < box.end <= 1 for box in found.boxes)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 2**33), ("1.5 kB", 1500), ("3B", 3), (7, 7), ("512MB", 512_000_000)],
)
def test_sizes(text, nbytes):
    assert memory_planner.parse_bytes(text, "hbm") == nbytes


FORMATS = {"weights": ("int8", "int4-g32"), "caches": ("int8",), "cache": 2}


def decoder(length=256):
    functions, params = models.functions(CONFIG), models.init_params(CONFIG)
    cache = lambda: functions.init_cache(1, length)
    return functions.step, (params, jnp.ones((1, 1), jnp.int32), jax.eval_shape(cache)), cache


@pytest.mark.parametrize(
    ("share", "host"), [(0.3, 0), pytest.param(0.25, "1MiB", marks=pytest.mark.slow)]
)
def test_formats_of_weights_and_caches_are_chosen_for_a_budget(share, host):
    step, args, cache = decoder()
    planner = functools.partial(plan, step, *args, host=host, donate=2, **FORMATS)
    whole = memory_planner.predict(step, *args, donate=2, device="v5e").peak
    found = planner(hbm=int(share * whole))
    assert found.after <= found.budget < found.before == whole
    stored = {f.how.removeprefix("host:") for f in found.formats}
    assert stored != {"as it is"}
    assert (found.host > 0) == bool(host)
    again = Plan.from_json(found.to_json())
    assert again == found
    small = again.apply(step)
    got, _ = jitted(small)(*small.prepare(*args))
    want, _ = jitted(step)(*args[:2], cache())
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert error < (0.05 if stored <= {"as it is", "int8"} else 0.5)


def test_formats_that_are_not_needed_are_not_taken_unless_they_are_faster():
    step, args, _ = decoder(512)
    planner = functools.partial(plan, step, *args, donate=2, **FORMATS)
    assert {f.how for f in planner().formats} == {"as it is"}
    fast = planner(least="seconds")
    assert {f.how for f in fast.formats if f.kind == "weights"} == {"int4-g32"}
    assert fast.step_after < fast.step_before


def test_formats_by_a_wrong_name():
    step, args, _ = decoder()
    with pytest.raises(ValueError, match="`caches` has 'kv5'; expected a recipe"):
        plan(step, *args, caches=("kv5",), cache=2)
    with pytest.raises(ValueError, match="`caches` has 'select', which needs arguments"):
        plan(step, *args, caches=("select",), cache=2)
    with pytest.raises(ValueError, match="`cache` is not: say which argument"):
        plan(step, *args, caches=("kv4",))
    with pytest.raises(ValueError, match="`least` is 'error'; expected 'loss' or 'seconds'"):
        plan(step, *args, least="error")
    with pytest.raises(ValueError, match=r"argument 5 is none of the 3 given"):
        plan(step, *args, caches=("kv4",), cache=5)


LAYERS = {
    "dense": lambda x, w: jnp.tanh(x @ w),
    "gate": lambda x, w: x * jax.nn.sigmoid(x @ w),
    "add": lambda x, w: x + jnp.sin(x @ w) @ w.T,
    "norm": lambda x, w: (x - x.mean(-1, keepdims=True)) * (w[0] + 1.0),
    "softmax": lambda x, w: jax.nn.softmax(x @ w) @ w,
}


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=3, max_size=7),
    st.floats(0, 1),
    st.booleans(),
)
def test_no_plan_exceeds_its_budget_or_changes_a_result(names, part, host):
    """Random differentiated programs; what is alive is added up again, buffer by buffer."""

    def loss(ws, x):
        for name, w in zip(names, ws):
            x = LAYERS[name](x, w)
        return (x * x).sum()

    fn = jax.grad(loss)
    draw = np.random.default_rng(len(names)).standard_normal
    args = (
        [jnp.asarray(draw((16, 16)), jnp.float32) / 4 for _ in names],
        jnp.asarray(draw((256, 16)), jnp.float32),
    )
    ends = [plan(fn, *args, strategy=s).after for s in ("keep-all", "full-remat", "save-dots")]
    budget = round(min(ends) + part * (max(ends) - min(ends)))
    found = plan(fn, *args, hbm=budget, host="1MiB" if host else 0)
    applied = found.apply(fn)
    seen = memory_planner.predict(applied, *args, device="v5e")
    alive = lambda t: sum(b.nbytes for b in seen.buffers if b.start <= t < b.end)
    naive = max(map(alive, range(len(seen.operations))), default=0)
    assert seen.arguments + seen.outputs + naive == found.after <= budget
    check_equal(applied(*args), fn(*args))
