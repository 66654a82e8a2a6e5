"""Packing: against brute force on small problems, by property on larger ones, and MiniMalloc's hard ones."""

import pathlib
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stowax import memory_planner
from stowax.memory_planner import Buffer, packing
from stowax.memory_planner.packing import portfolio
from stowax.memory_planner.packing.buffers import problem_of

MINIMALLOC = pathlib.Path(__file__).parent / "data" / "minimalloc"
CAPACITY = 1_048_576

# No more than 6 is live at once, and yet 6 aren't enough: the two of size 4 leave the three of size 1
# the same two places, at times 4 and 5.
FRAGMENTED = [
    Buffer("left", 0, 4, 4),
    Buffer("beside left", 1, 2, 2),
    Buffer("early", 2, 5, 1),
    Buffer("middle", 3, 6, 1),
    Buffer("late", 4, 6, 1),
    Buffer("right", 5, 7, 4),
    Buffer("beside right", 6, 7, 2),
]


@st.composite
def problems(draw, most=6, times=6, sizes=4):
    count = draw(st.integers(1, most))
    lowers = draw(st.lists(st.integers(0, times - 1), min_size=count, max_size=count))
    return [
        Buffer(i, lower, lower + draw(st.integers(1, times)), draw(st.integers(1, sizes)))
        for i, lower in enumerate(lowers)
    ]


@st.composite
def full(draw, capacity=6, times=6):
    """Buffers that fill the capacity at every time: what is freed is taken at once."""
    live, buffers = [], []
    for now in range(times):
        ends = [draw(st.booleans()) for _ in live]
        buffers += [(start, now, size) for (start, size), end in zip(live, ends) if end]
        live = [one for one, end in zip(live, ends) if not end]
        while free := capacity - sum(size for _, size in live):
            live.append((now, draw(st.integers(1, free))))
    buffers += [(start, times, size) for start, size in live]
    return [Buffer(i, *row) for i, row in enumerate(buffers)]


def overlap(a, b):
    return a.lower < b.upper and b.lower < a.upper


def max_live(buffers):
    return max(sum(b.size for b in buffers if b.lower <= a.lower < b.upper) for a in buffers)


def can_be_packed(buffers, capacity, placed=()):
    """Brute force: each buffer at each offset."""
    if not buffers:
        return True
    b, *rest = buffers
    return any(
        can_be_packed(rest, capacity, (*placed, (b, at)))
        for at in range(capacity - b.size + 1)
        if not any(overlap(b, c) and at < o + c.size and o < at + b.size for c, o in placed)
    )


def fits(buffers, capacity):
    try:
        offsets, cause = memory_planner.pack(buffers, capacity), ()
    except memory_planner.PackingError as error:
        offsets, cause = None, error.buffers
    if offsets is None:
        assert not can_be_packed(cause, capacity)
        return False
    packing.validate(buffers, offsets, capacity)
    return True


def search(buffers, capacity, workers=1):
    return portfolio.branch_and_bound(
        problem_of(buffers, 1),
        capacity // problem_of(buffers, 1).unit,
        deadline=time.monotonic() + 60,
        workers=workers,
    )


@settings(max_examples=100)
@example(FRAGMENTED, 0)
@example(FRAGMENTED, 1)
@given(st.one_of(problems(), full(capacity=4, times=4)), st.integers(0, 2))
def test_search_agrees_with_brute_force(buffers, more):
    capacity = max_live(buffers) + more
    found = search(buffers, capacity)
    assert found.infeasible == (not can_be_packed(buffers, capacity))
    if found.offsets is not None:
        unit = problem_of(buffers, 1).unit
        packing.validate(buffers, [int(o) * unit for o in found.offsets], capacity)


@settings(max_examples=50)
@given(full(), st.randoms(use_true_random=False))
def test_order_of_the_buffers_does_not_matter(buffers, random):
    shuffled = random.sample(buffers, len(buffers))
    assert fits(buffers, 6) == fits(shuffled, 6)


@given(problems(most=40, times=30, sizes=1000), st.sampled_from([1, 64]))
def test_min_capacity(buffers, alignment):
    found = memory_planner.min_capacity(buffers, alignment=alignment, time_limit=0.2)
    rounded = [Buffer(b.id, b.lower, b.upper, -(-b.size // alignment) * alignment) for b in buffers]
    assert max_live(rounded) <= found.lower <= found.upper
    assert found.gap == found.upper - found.lower
    packing.validate(rounded, found.offsets, found.upper, alignment=alignment)
    assert max(o + b.size for o, b in zip(found.offsets, rounded)) == found.upper


def test_min_capacity_is_proven_where_more_is_needed_than_is_live():
    assert max_live(FRAGMENTED) == 6
    found = memory_planner.min_capacity(FRAGMENTED)
    assert (found.lower, found.upper) == (7, 7)


def test_error_names_the_buffers_that_are_too_many_at_once():
    buffers = [Buffer(f"b{i}", i, i + 3, 10 * (i + 1)) for i in range(5)]
    with pytest.raises(
        memory_planner.PackingError, match=r"need 120 at time 4, .* 10 more"
    ) as info:
        memory_planner.pack(buffers, 110)
    assert [b.id for b in info.value.buffers] == ["b4", "b3", "b2"]
    assert all(b.id in str(info.value) for b in info.value.buffers)


def test_error_names_the_buffers_that_leave_no_arrangement():
    others = [Buffer(i, 10 + i, 12 + i, 2) for i in range(20)]
    with pytest.raises(memory_planner.PackingError, match="no more than 6 is live") as info:
        memory_planner.pack([*others, *FRAGMENTED], 6)
    assert info.value.irreducible
    assert set(info.value.buffers) == set(FRAGMENTED)
    for left_out in FRAGMENTED:
        assert can_be_packed([b for b in FRAGMENTED if b != left_out], 6)


def test_running_out_of_time_gives_bounds():
    buffers = packing.read_buffers(MINIMALLOC / "A.1048576.csv")
    with pytest.raises(memory_planner.PackingTimeout, match="`time_limit`=0 s") as info:
        memory_planner.pack(buffers, CAPACITY, time_limit=0)
    assert info.value.lower == CAPACITY < info.value.upper < 1.5 * CAPACITY


@pytest.mark.parametrize("name", "ABCDEFGHIJK")
def test_minimalloc(name):
    buffers = packing.read_buffers(MINIMALLOC / f"{name}.{CAPACITY}.csv")
    found = packing.find_packing(buffers, CAPACITY)
    packing.validate(buffers, found.offsets, CAPACITY)
    assert found.nodes > 0


def test_one_worker_and_two_find_the_same():
    buffers = packing.read_buffers(MINIMALLOC / "K.1048576.csv")
    one, two = (packing.find_packing(buffers, CAPACITY, workers=workers) for workers in (1, 2))
    assert one == two


def test_alignment():
    buffers = [Buffer("a", 0, 2, 100), Buffer("b", 0, 2, 200), Buffer("c", 1, 3, 1)]
    offsets = memory_planner.pack(buffers, 640, alignment=128)
    assert all(offset % 128 == 0 for offset in offsets)
    with pytest.raises(memory_planner.PackingError):
        memory_planner.pack(buffers, 511, alignment=128)


def test_nothing_to_pack():
    assert memory_planner.pack([], 0) == ()
    assert memory_planner.min_capacity([]) == memory_planner.CapacityBounds(0, 0, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 2.5, 1), "`upper` of buffer 'x' is 2.5, expected an integer"),
        ((3, 3, 1), "`upper` of buffer 'x' is 3, expected above `lower`=3"),
        ((0, 1, 0), "`size` of buffer 'x' is 0, expected at least 1"),
        ((0, 1, 2**62), "`size` of buffer 'x' .* below 2\\*\\*62"),
    ],
)
def test_buffer_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Buffer("x", *fields)


def test_buffer_takes_numpy_integers():
    assert Buffer("x", *np.array([0, 1, 2])) == Buffer("x", 0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": -1}, "`capacity` is -1"),
        ({"alignment": 0}, "`alignment` is 0"),
        ({"workers": 0}, "`workers` is 0"),
        ({"buffers": [Buffer("x", 0, 1, 1)] * 2}, r"`buffers` has ids .* more than once: \['x'\]"),
        ({"buffers": [Buffer(i, 0, 1, 2**61) for i in range(2)]}, "`buffers` have .* in total"),
    ],
)
def test_pack_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        memory_planner.pack(**{"buffers": FRAGMENTED, "capacity": 7} | arguments)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0], "1 entries, expected 3"),
        ([0, 4, 7], r"c \(4 on \[1, 2\)\) at 7 isn't within \[0, 10\)"),
        ([-1, 4, 0], "a .* at -1 isn't within"),
        ([0, 4, 3], "a .* at 0 and c .* at 3 overlap"),
        ([0, 3, 6], "b .* at 3 and a .* overlap|a .* at 0 and b .* at 3 overlap"),
    ],
)
def test_validate_refuses(offsets, message):
    buffers = [Buffer("a", 0, 2, 4), Buffer("b", 0, 1, 6), Buffer("c", 1, 2, 4)]
    packing.validate(buffers, [0, 4, 4], 10)
    with pytest.raises(ValueError, match=message):
        packing.validate(buffers, offsets, 10)


def test_read_buffers(tmp_path):
    file = tmp_path / "two.csv"
    file.write_text("size,id,lower,upper\n5,a,0,2\n7,b,1,3\n")
    assert packing.read_buffers(file) == [Buffer("a", 0, 2, 5), Buffer("b", 1, 3, 7)]
    file.write_text("id,lower,upper,size\na,0,2,5\nb,3,3,7\n")
    with pytest.raises(ValueError, match=r"two\.csv, line 3: `upper` of buffer 'b'"):
        packing.read_buffers(file)
    file.write_text("id,start,end,size\n")
    with pytest.raises(ValueError, match=r"has the columns .*'start'"):
        packing.read_buffers(file)
