import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stowax import memory_planner


def compiled(fn, *shapes, **options):
    return jax.jit(fn, **options).lower(*shapes).compile()


MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)  # 256 KiB


def test_report_counts_arguments_outputs_and_temporaries():
    report = memory_planner.memory_report(
        compiled(lambda x, y: jnp.tanh(x @ y) @ y, MATRIX, MATRIX)
    )
    assert report.arguments == 2 * MATRIX.size * 4
    assert report.outputs == MATRIX.size * 4
    assert report.aliased == report.host == 0
    assert report.peak == report.arguments + report.outputs + report.temporaries


def test_a_donated_argument_counts_once_at_the_peak():
    report = memory_planner.memory_report(compiled(lambda x: x + 1, MATRIX, donate_argnums=0))
    assert report.aliased == MATRIX.size * 4
    assert report.peak == MATRIX.size * 4 + report.temporaries


def test_report_counts_int4_arguments_packed():
    packed = jax.ShapeDtypeStruct((1024,), jnp.int4)
    report = memory_planner.memory_report(compiled(lambda x: x.astype(jnp.float32).sum(), packed))
    assert report.arguments == 512 == memory_planner.tree_nbytes(packed)


def test_report_prints_an_aligned_table():
    report = memory_planner.MemoryReport(
        arguments=3 * 2**20, outputs=1536, aliased=0, temporaries=12, host=0
    )
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("arguments", "outputs", "aliased", "temporaries", "host", "peak")
    ]
    assert "3.00 MiB" in lines[0]
    assert "1.50 KiB" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_report_refuses_what_is_not_compiled():
    with pytest.raises(ValueError, match=r"`compiled` is a function.*lower\(\*args\)\.compile\(\)"):
        memory_planner.memory_report(lambda x: x)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.int2, 3),
        (jnp.int4, 5),
        (jnp.uint4, 5),
        (jnp.float4_e2m1fn, 5),
        (jnp.float8_e4m3fn, 9),
        (jnp.float8_e8m0fnu, 9),
        (jnp.bool_, 9),
        (jnp.int8, 9),
        (jnp.bfloat16, 18),
        (jnp.float32, 36),
        (jnp.complex64, 72),
    ],
)
def test_nine_elements_take_their_true_bytes(dtype, expected):
    assert memory_planner.tree_nbytes(jax.ShapeDtypeStruct((9,), dtype)) == expected
    assert memory_planner.tree_nbytes(jnp.zeros((9,), dtype)) == expected


def test_tree_nbytes_adds_leaves_of_all_kinds():
    tree = {
        "numpy": np.zeros((2, 3), np.float16),  # 12
        "jax": jnp.zeros((0, 4)),  # 0
        "scalar": 1.0,  # 4
        "key": jax.random.key(0),  # two uint32: 8
        "none": None,
    }
    assert memory_planner.tree_nbytes(tree) == 24


def test_tree_nbytes_names_every_odd_leaf():
    with pytest.raises(ValueError, match=r"`tree`.*\['a'\]: str; \['b'\]\[1\]: object"):
        memory_planner.tree_nbytes({"a": "text", "b": [1, object()]})


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (5 * 2**30, "5.00 GiB")],
)
def test_format_bytes(count, expected):
    assert memory_planner.format_bytes(count) == expected
