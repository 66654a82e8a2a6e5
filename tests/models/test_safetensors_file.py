import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stowax.models.safetensors_file import SafetensorsFile

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("st") / "small.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    return path


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_floats(tmp_path, dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    safetensors.numpy.save_file({"x": x}, tmp_path / "f.safetensors")
    values = SafetensorsFile(tmp_path / "f.safetensors").read("x")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, x.astype(np.float32))


def info(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD = {
    "empty": b"",
    "short": b"\1\0\0",
    "header longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "not json": struct.pack("<Q", 2) + b"{x",
    "not utf-8": struct.pack("<Q", 2) + b"\xff\xff",
}
BAD_HEADERS = {
    "offset past the end": {"a": info([4], 0, 16)},
    "size and shape differ": {"a": info([5], 0, 8)},
    "overlap": {"a": info([2], 0, 8), "b": info([2], 4, 12)},
    "negative": {"a": info([2], -8, 0)},
    "unknown dtype": {"a": info([2], 0, 8, "F31")},
    "overflowing shape": {"a": info([2**63, 2**63], 0, 8)},
    "list": [1, 2],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: corrupt"):
        SafetensorsFile(path)


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers(tmp_path, header):
    path = write(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=r"bad\.safetensors: corrupt"):
        SafetensorsFile(path)


def test_bad_tensors(tmp_path):
    tensors = {"i": np.arange(3), "n": np.array([np.inf], np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="'i' has dtype I64"):
        file.read("i")
    with pytest.raises(ValueError, match="'n' has values that are not finite"):
        file.read("n")
    with pytest.raises(ValueError, match="no tensor 'x'"):
        file.read("x")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none.safetensors")


def read_or_value_error(path):
    try:
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)
    except ValueError:
        return


@FUZZ
@given(data=st.data())
def test_truncated_files(small, tmp_path, data):
    whole = small.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        SafetensorsFile(path)


@FUZZ
@given(data=st.data())
def test_flipped_bytes(small, tmp_path, data):
    whole = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flip.safetensors"
    path.write_bytes(bytes(whole))
    read_or_value_error(path)


@FUZZ
@given(header=st.binary(max_size=200), data=st.binary(max_size=64))
def test_random_headers(tmp_path, header, data):
    read_or_value_error(write(tmp_path / "random.safetensors", header, data))
