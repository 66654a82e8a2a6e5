"""`Packed` under random chains of layout ops: always the tensor that the same ops make."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import LayoutError, Packed
from stowax.pallas_kernels.codecs.artifact import _from_json, _to_json


def tensor(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@dataclasses.dataclass(frozen=True)
class InNumpy(codecs.Codec):
    """Values and a scale that is shared along the last lead axis; nothing to compile."""

    name = "in numpy"

    def encode(self, x, *, batch_dims=0):
        scale = 1 + np.abs(x).max(axis=(-2, -1), keepdims=True)
        return {"values": x / scale, "scale": scale}

    def decode(self, parts, length):
        return np.asarray(parts["values"]) * np.asarray(parts["scale"])


@st.composite
def packed_tensor(draw, sizes):
    """A stored tensor with its axes in any order, and the axes that are not encoded."""
    shape = tuple(draw(st.lists(st.sampled_from(sizes), min_size=2, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    lead = order[: draw(st.integers(1, len(shape) - 1))]
    inner = order[len(lead) :]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = x.transpose(order).reshape(*(shape[a] for a in lead), -1)
    view = codecs.storage_view(shape, "float32", lead, inner)
    return Packed(InNumpy().encode(stored), InNumpy(), view), lead, inner


def factorings(size: int) -> list[tuple[int, ...]]:
    """Ways to write `size` as a product of up to three factors."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [(a, b, size // a // b) for a in divisors for b in divisors if size // a % b == 0]


@st.composite
def layout_op(draw, shape):
    """A layout op on a tensor of `shape`, as a function of arrays and of `Packed` alike."""
    ndim = len(shape)
    kind = draw(st.sampled_from(["transpose", "reshape", "slice", "take", "squeeze", "expand"]))
    if kind == "transpose":
        order = draw(st.permutations(range(ndim)))
        return lambda x: x.transpose(order)
    if kind == "reshape" and ndim:
        axis = draw(st.integers(0, ndim - 1))
        if draw(st.booleans()):  # split
            new = (
                *shape[:axis],
                *draw(st.sampled_from(factorings(shape[axis]))),
                *shape[axis + 1 :],
            )
        else:  # merge
            end = draw(st.integers(axis + 1, ndim))
            new = (*shape[:axis], int(np.prod(shape[axis:end])), *shape[end:])
        return lambda x: x.reshape(new)
    if kind in ("slice", "take") and ndim:
        axis = draw(st.integers(0, ndim - 1))
        start = draw(st.integers(0, shape[axis] - 1))
        stop = draw(st.integers(start + 1, shape[axis]))
        starts, limits = [0] * ndim, list(shape)
        starts[axis], limits[axis] = start, stop
        if kind == "take":
            sizes = [b - a for a, b in zip(starts, limits)]
            index = [jnp.int32(i) for i in starts]
            return lambda x: apply(x, "dynamic_slice", index, sizes)
        strides = [1] * ndim
        strides[axis] = draw(st.integers(1, 3))
        return lambda x: apply(x, "slice", starts, limits, strides)
    if kind == "squeeze":
        ones = [i for i in range(ndim) if shape[i] == 1]
        dims = [i for i in ones if draw(st.booleans())]
        return lambda x: apply(x, "squeeze", dims)
    at = draw(st.integers(0, ndim))
    new, kept = (*shape[:at], 1, *shape[at:]), [i + (i >= at) for i in range(ndim)]
    return lambda x: x.expand(new, kept) if isinstance(x, Packed) else x.reshape(new)


# On plain arrays by numpy: nothing to compile.
IN_NUMPY = {
    "slice": lambda x, starts, stops, strides=None: x[
        tuple(map(slice, starts, stops, strides or (1,) * x.ndim))
    ],
    "dynamic_slice": lambda x, starts, sizes: x[
        tuple(slice(int(i), int(i) + n) for i, n in zip(starts, sizes, strict=True))
    ],
    "squeeze": lambda x, dims: x.squeeze(tuple(dims)),
}


def apply(x, name, *args):
    """A method of `Packed`, or what `lax` has by the same name, in numpy."""
    return getattr(x, name)(*args) if isinstance(x, Packed) else IN_NUMPY[name](x, *args)


@settings(max_examples=80)
@given(data=st.data())
def test_chains_of_layout_ops(data):
    packed, _, _ = data.draw(packed_tensor([1, 2, 3, 4, 6]))
    plain = packed.decode()
    for _ in range(data.draw(st.integers(1, 6))):
        op = data.draw(layout_op(plain.shape))
        try:
            packed = op(packed)
        except LayoutError:
            continue
        plain = op(plain)
        assert packed.shape == plain.shape
        for part in packed.parts.values():  # the invariant in the module's docstring
            assert len(part.shape) == len(packed.view.lead) + 1
            assert all(n in (1, m) for n, m in zip(part.shape, packed.view.lead))
    np.testing.assert_array_equal(packed.decode(), plain)


@settings(max_examples=20)
@given(data=st.data())
def test_rows_and_unstack(data):
    """A gather along a lead axis, and the scan over one."""
    packed, lead, _ = data.draw(packed_tensor([1, 2, 3]))
    dim, plain = data.draw(st.sampled_from(lead)), packed.decode()
    indices = np.array(data.draw(st.lists(st.integers(-2, 5), min_size=2, max_size=2)))[:, None]
    clipped = np.clip(indices, 0, plain.shape[dim] - 1)
    taken = np.moveaxis(np.take(plain, clipped, axis=dim), (dim, dim + 1), (0, 1))
    np.testing.assert_array_equal(packed.rows(dim, jnp.asarray(indices), 0).decode(), taken)

    stacked, size = packed.unstack(dim)
    assert size == plain.shape[dim]
    for i in range(size):
        entry = jax.tree.map(lambda part, i=i: part[i], stacked)
        np.testing.assert_array_equal(entry.decode(), np.take(plain, i, axis=dim))


@settings(max_examples=20)
@given(data=st.data())
def test_folded(data):
    """``[batch, rows, length]`` in the order of storage, for any dimensions as batch."""
    packed, lead, inner = data.draw(packed_tensor([1, 2, 3]))
    batch = tuple(data.draw(st.lists(st.sampled_from(lead), unique=True)))
    rows = tuple(a for a in lead if a not in batch)
    plain = packed.decode()
    sizes = [int(np.prod([plain.shape[a] for a in axes])) for axes in (batch, rows)]
    want = plain.transpose(*batch, *rows, *inner).reshape(*sizes, -1)
    np.testing.assert_array_equal(packed.folded(batch).decode(), want)


@pytest.mark.parametrize("spec", ["int4-g4", "int8-tensor"])
def test_real_codecs(spec):
    """One chain of everything, on packed codes and shared scales."""
    packed = codecs.pack(tensor(3, 64, 4), codecs.get(spec), lead=(0, 2), inner=(1,))
    plain = np.asarray(packed.decode())
    for op in (
        lambda x: x.transpose((2, 0, 1)),
        lambda x: apply(x, "slice", (1, 0, 0), (4, 3, 64), (2, 1, 1)),
        lambda x: x.reshape((2, 3, 8, 8)),
        lambda x: apply(x, "dynamic_slice", (jnp.int32(0), jnp.int32(2), 0, 0), (2, 1, 8, 8)),
        lambda x: apply(x, "squeeze", (1,)),
    ):
        packed, plain = op(packed), op(plain)
        assert packed.shape == plain.shape
        np.testing.assert_array_equal(packed.decode(), plain)


def test_casts_are_replayed_in_order():
    x = tensor(4, 8)
    packed = codecs.pack(x, codecs.get("f32"), lead=(0,), inner=(1,)).cast(jnp.bfloat16)
    assert packed.dtype == jnp.bfloat16
    back = packed.cast(jnp.float32)
    np.testing.assert_array_equal(back.decode(), x.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda w: w.slice((0, 0), (6, 4), (1, 1)), "dimension 1 lies along the encoded axis"),
        (lambda w: w.reshape((4, 12)), "cuts across stored axes"),
        (lambda w: w.expand((2, 6, 8), (1, 2)), "broadcast to a larger shape"),
        (lambda w: w.reshape((48,)).rows(0, jnp.array([1]), 0), "made of 2 stored axes"),
    ],
)
def test_what_is_no_relabelling_says_why(op, reason):
    packed = codecs.pack(tensor(6, 8), codecs.get("int8"), lead=(0,), inner=(1,))
    with pytest.raises(LayoutError, match=reason):
        op(packed)


def test_bytes_are_those_of_the_buffers():
    packed = codecs.pack(tensor(6, 64), codecs.get("int4-g32"), lead=(0,), inner=(1,))
    assert packed.nbytes == sum(np.asarray(p).nbytes for p in packed.parts.values())
    assert packed.nbytes == packed.codec.nbytes((6, 64))
    assert str(packed) == f"Packed(int4-g32, float32[6,64], {packed.nbytes:,} bytes)"


def test_axes_must_be_those_of_the_tensor():
    with pytest.raises(ValueError, match="`lead`"):
        codecs.pack(tensor(6, 8), codecs.get("int8"), lead=(0,), inner=(0,))


@pytest.mark.parametrize("spec", ["int4-g16", "nf4", "q4_k", "mxfp4"])
def test_static_side_as_json(spec):
    packed = codecs.pack(tensor(4, 256), codecs.get(spec), lead=(0,), inner=(1,)).reshape(
        (2, 2, 256)
    )
    aux = packed.tree_flatten_with_keys()[1]
    assert _from_json(bytearray(_to_json(aux))) == aux


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"parts": [], "codec": "int4", "view": 3}'])
def test_bad_static_side_is_refused(data):
    with pytest.raises(ValueError, match="no valid"):
        _from_json(data)
