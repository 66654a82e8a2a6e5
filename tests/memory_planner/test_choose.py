"""The choice of what to keep: equal to brute force on small graphs, to the known optimum on chains; errors by name."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowax.memory_planner import (
    Candidate,
    InfeasibleError,
    Option,
    Problem,
    Recompute,
    Site,
    choose,
)

SIZES = st.integers(1, 20)


@st.composite
def graphs(draw, most=8):
    """Random programs: each operation makes one value of earlier ones."""
    n = draw(st.integers(1, most))
    values, ops = [], []
    for i in range(n):
        inputs = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        free = i == 0 and draw(st.booleans())
        again = i > 0 or draw(st.booleans())
        values.append(Candidate(f"v{i}", draw(SIZES), i if again else None, free=free))
        ops.append(Recompute(float(draw(SIZES)), tuple(sorted(inputs))))
    required = draw(st.sets(st.integers(0, n - 1), min_size=1))
    return Problem(tuple(values), tuple(ops), tuple(sorted(required)))


def again_of(problem, kept):
    """What has to run again, or None where something can't."""
    again, todo = set(), [v for v in problem.required if v not in kept]
    while todo:
        v = todo.pop()
        value = problem.values[v]
        if v in kept or value.free or value.producer in again:
            continue
        if value.producer is None:
            return None
        again.add(value.producer)
        todo += problem.ops[value.producer].inputs
    return again


def brute_force(problem, budget):
    """The least seconds, or None."""
    best = None
    for flags in itertools.product((0, 1), repeat=len(problem.values)):
        kept = {i for i, f in enumerate(flags) if f}
        size = sum(problem.values[i].nbytes for i in kept)
        again = again_of(problem, kept) if size <= budget else None
        if again is not None:
            seconds = sum(problem.ops[o].seconds for o in again)
            best = seconds if best is None else min(best, seconds)
    return best


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 80))
def test_equals_brute_force(problem, budget):
    want = brute_force(problem, budget)
    if want is None:
        with pytest.raises(InfeasibleError) as error:
            choose(problem, budget)
        assert brute_force(problem, error.value.least) is not None
        assert brute_force(problem, error.value.least - 1) is None
        return
    found = choose(problem, budget)
    assert found.seconds == pytest.approx(want, rel=1e-6)
    assert found.bound <= found.seconds * (1 + 1e-9)
    assert found.nbytes <= budget
    assert again_of(problem, set(found.how)) <= found.again


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=30), st.integers(0, 200))
def test_equals_the_optimum_on_chains(steps, budget):
    """Of a chain that is needed whole, what is not kept runs again once: a knapsack, by dynamic programming."""
    values = tuple(Candidate(f"v{i}", size, i) for i, (size, _) in enumerate(steps))
    ops = tuple(Recompute(float(c), (i - 1,) if i else ()) for i, (_, c) in enumerate(steps))
    saved = [0] * (budget + 1)
    for size, cost in steps:
        for room in range(budget, size - 1, -1):
            saved[room] = max(saved[room], saved[room - size] + cost)
    found = choose(Problem(values, ops, tuple(range(len(steps)))), budget)
    assert found.seconds == pytest.approx(sum(c for _, c in steps) - saved[budget], rel=1e-6)


def one(**options):
    return Candidate("x", 100, 0, **options)


def test_offloads_what_the_link_hides():
    problem = Problem(
        (one(offload=True),), (Recompute(5.0, ()),), (0,), to_host=100.0, from_host=50.0, hidden=2.0, staged=0.1
    )  # fmt: skip
    found = choose(problem, 10, host=100)
    assert (found.how, found.nbytes, found.host_nbytes) == ({0: "offload"}, 10, 100)
    assert found.seconds == pytest.approx(0.0)
    slow = choose(dataclasses.replace(problem, hidden=0.0), 10, host=100)
    assert slow.seconds == pytest.approx(3.0)  # 1 s there and 2 s back
    assert choose(problem, 10, host=99).again == {0}


def test_encodes_where_it_may():
    problem = Problem((one(encode=0.25),), (Recompute(5.0, ()),), (0,), encode_seconds=0.01)
    found = choose(problem, 30)
    assert (found.how, found.nbytes) == ({0: "encode"}, 25)
    assert found.seconds == pytest.approx(1.0)
    assert choose(problem, 100).how == {0: "keep"}


def test_groups_bound_how_far_recomputation_reaches():
    values = tuple(Candidate(f"v{i}", 10, i) for i in range(4))
    ops = tuple(Recompute(1.0, (i - 1,) if i else ()) for i in range(4))
    problem = Problem(values, ops, (3,), groups=((0, 1), (1, 2)))
    assert choose(problem, 10).how == {1: "keep"}


def test_an_infeasible_budget_says_what_pins_it():
    problem = Problem((Candidate("carry", 64, None), one()), (Recompute(1.0, (0,)),), (1,))
    with pytest.raises(
        InfeasibleError, match=r"is 10 B; at least 64 B are needed, for carry"
    ) as error:
        choose(problem, 10)
    assert (error.value.least, error.value.pinned) == (64, ("carry",))


@st.composite
def tables(draw):
    """Random sites: options that lose more are smaller, those on the host move what they take."""
    sites = []
    for i in range(draw(st.integers(1, 3))):
        options = []
        for loss in range(draw(st.integers(1, 3))):
            size, seconds = draw(SIZES), float(draw(SIZES))
            options.append(Option(f"{loss}", size, seconds=seconds, loss=loss))
            options.append(Option(f"{loss} host", 1, host=size, up=size, seconds=1.0, loss=loss))
        sites.append(Site(f"s{i}", tuple(options)))
    return tuple(sites)


@settings(max_examples=40, deadline=None)
@given(graphs(most=3), tables(), st.integers(0, 60), st.integers(0, 20), st.booleans())
def test_options_of_sites_are_chosen_together_with_what_is_kept(graph, sites, budget, host, lossy):
    problem = dataclasses.replace(graph, sites=sites, from_host=2.0)
    best = None
    for taken in itertools.product(*(site.options for site in sites)):
        rest = budget - sum(o.nbytes for o in taken)
        seconds = brute_force(graph, rest) if rest >= 0 else None
        if seconds is None or sum(o.host for o in taken) > host:
            continue
        seconds += sum(o.seconds + o.up / 2.0 for o in taken)
        key = (sum(o.loss for o in taken) if lossy else 0, seconds)
        best = key if best is None else min(best, key)
    least = "loss" if lossy else "seconds"
    if best is None:
        with pytest.raises(InfeasibleError):
            choose(problem, budget, host, least=least)
        return
    found = choose(problem, budget, host, least=least)
    assert found.seconds == pytest.approx(best[1], rel=1e-3)
    taken = [site.options[o] for site, o in zip(sites, found.options)]
    assert found.host_nbytes == sum(o.host for o in taken) <= host
    kept = sum(graph.values[i].nbytes for i in found.how)
    assert found.nbytes == kept + sum(o.nbytes for o in taken) <= budget
