import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stowax.models import load
from stowax.models.gguf_file import GgufFile

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def build(*, version=3, entries=(), tensors=(), data=b"", counts=None) -> bytes:
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + data


def opened(tmp_path, content: bytes) -> GgufFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return GgufFile(path)


def test_agrees_with_the_gguf_package(tiny_gguf):
    ours, theirs = GgufFile(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.shape == tuple(t.shape.tolist())[::-1]
        assert (info.type, info.nbytes, info.offset) == (t.tensor_type, t.n_bytes, t.data_offset)
        np.testing.assert_array_equal(ours.raw(t.name).reshape(-1), t.data.view(np.uint8).ravel())
        np.testing.assert_array_equal(
            ours.dequantize(t.name), gguf.dequantize(t.data, t.tensor_type)
        )
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert np.array_equal(ours.metadata[key], field.contents()), key


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_dequantizes(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    data = gguf.quantize(x, kind).tobytes()
    file = opened(tmp_path, build(tensors=[tensor("w", (64, 5), kind)], data=data))
    assert np.abs(file.dequantize("w") - x).max() < 0.3
    assert file.raw("w").tobytes() == data


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_dequantizes_k_types(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    data = bytes(3 * gguf.GGML_QUANT_SIZES[kind][1])
    file = opened(tmp_path, build(tensors=[tensor("w", (256, 3), kind)], data=data))
    np.testing.assert_array_equal(file.dequantize("w"), np.zeros((3, 256), np.float32))


BAD = {
    "empty": (b"", "shorter"),
    "not gguf": (b"PK\x03\x04" + bytes(40), "does not start with"),
    "version 1": (build(version=1), "version 1"),
    "big endian": (build(version=3 << 24), "big-endian"),
    "too many tensors": (build(counts=(2**60, 0)), "tensor count"),
    "too many entries": (build(counts=(0, 2**60)), "metadata count"),
    "key twice": (build(entries=[entry("k", 0, b"\1")] * 2), "'k' is listed twice"),
    "unknown value type": (build(entries=[entry("k", 99, b"")]), "type 99"),
    "bool of 2": (build(entries=[entry("k", 7, b"\2")]), "bool other than"),
    "key not utf-8": (build(entries=[struct.pack("<Q", 1) + b"\xff" + bytes(32)]), "UTF-8"),
    "long string": (build(entries=[entry("k", 8, struct.pack("<Q", 2**62))]), "needs"),
    "long array": (build(entries=[entry("k", 9, struct.pack("<IQ", 4, 2**61))]), "room"),
    "long string array": (build(entries=[entry("k", 9, struct.pack("<IQ", 8, 2**50))]), "room"),
    "nested array": (build(entries=[entry("k", 9, struct.pack("<IQ", 9, 1))]), "type 9"),
    "alignment 3": (
        build(entries=[entry("general.alignment", 4, struct.pack("<I", 3))]),
        "power of two",
    ),
    "tensor twice": (
        build(tensors=[tensor("w", (4,)), tensor("w", (4,), 0, 32)], data=bytes(64)),
        "'w' is listed twice",
    ),
    "tensors overlap": (
        build(tensors=[tensor("a", (16,)), tensor("b", (16,), 0, 32)], data=bytes(128)),
        "'a' and 'b' overlap",
    ),
    "no dims": (build(tensors=[tensor("w", ())], data=bytes(64)), "0 dims"),
    "five dims": (build(tensors=[tensor("w", (1,) * 5)], data=bytes(64)), "5 dims"),
    "zero dim": (build(tensors=[tensor("w", (0,))], data=bytes(64)), "impossible"),
    "half a block": (build(tensors=[tensor("w", (33,), 3)], data=bytes(64)), "impossible"),
    "unknown tensor type": (build(tensors=[tensor("w", (4,), 77)], data=bytes(64)), "type 77"),
    "retired tensor type": (build(tensors=[tensor("w", (4,), 4)], data=bytes(64)), "type 4"),
    "overflowing shape": (build(tensors=[tensor("w", (2**63, 2))], data=bytes(64)), "ends at"),
    "past the end": (build(tensors=[tensor("w", (64,))], data=bytes(64)), "ends at"),
    "far offset": (build(tensors=[tensor("w", (4,), 0, 2**63)], data=bytes(64)), "ends at"),
    "unaligned": (build(tensors=[tensor("w", (4,), 0, 4)], data=bytes(64)), "not aligned"),
}


@pytest.mark.parametrize(("content", "match"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, content, match):
    with pytest.raises(ValueError, match=match) as caught:
        opened(tmp_path, content)
    assert "x.gguf" in str(caught.value)


def test_values_that_are_not_finite(tmp_path):
    data = np.array([1.0, np.nan], np.float32).tobytes()
    file = opened(tmp_path, build(tensors=[tensor("w", (2,))], data=data))
    with pytest.raises(ValueError, match=r"'w' has values that are not finite"):
        file.dequantize("w")


def test_unknown_names(tiny_gguf):
    file = GgufFile(tiny_gguf)
    with pytest.raises(ValueError, match="no tensor 'nope'"):
        file.raw("nope")
    with pytest.raises(ValueError, match="lacks 'nope'"):
        file.get("nope", int)
    with pytest.raises(ValueError, match="should be int"):
        file.get("general.architecture", int)


def load_or_value_error(path, content: bytes):
    path.write_bytes(content)
    try:
        load(path)
    except ValueError:
        return


@FUZZ
@given(data=st.data())
def test_truncated_files(tiny_gguf, tmp_path, data):
    whole = tiny_gguf.read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        GgufFile(path)


@FUZZ
@given(data=st.data())
def test_flipped_bytes(tiny_gguf, tmp_path, data):
    whole = bytearray(tiny_gguf.read_bytes())
    start = min(t.offset for t in GgufFile(tiny_gguf).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, start - 1))
        whole[where] = data.draw(st.integers(0, 255))
    load_or_value_error(tmp_path / "flip.gguf", bytes(whole))


@FUZZ
@given(words=st.data())
def test_wild_numbers(tiny_gguf, tmp_path, words):
    """Whole 8-byte words of the header replaced: lengths, counts, dims and offsets."""
    whole = bytearray(tiny_gguf.read_bytes())
    start = min(t.offset for t in GgufFile(tiny_gguf).tensors.values())
    where = words.draw(st.integers(0, start - 8))
    value = words.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    whole[where : where + 8] = struct.pack("<Q", value)
    load_or_value_error(tmp_path / "wild.gguf", bytes(whole))


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes_after_the_magic(tmp_path, content):
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + content)
    with pytest.raises(ValueError, match=r"random\.gguf"):
        GgufFile(path)
