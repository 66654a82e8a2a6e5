"""A strict reader of GGUF files.

Everything a file says is checked against its size before it is used: a corrupt or truncated file
is a ``ValueError`` that names the file, the tensor or key, and what is wrong. Tensor data are
mapped, not read. (``gguf.GGUFReader`` trusts the lengths that it reads.)

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Numbers are little-endian;
``string`` is a u64 length and UTF-8 bytes.

    magic "GGUF" | u32 version | u64 tensor count | u64 metadata count
    metadata: string key, u32 type, value
    tensors:  string name, u32 dims, u64 size of each dim (fastest first), u32 type, u64 offset
    padding to `general.alignment` | tensor data
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"} | {
    7: "u1",  # bool
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_ENTRY = 8 + 4 + 1  # bytes of a metadata entry with an empty key
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes of a tensor entry with an empty name


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
      name: as in the file.
      shape: row-major, ``(out, in)`` for a weight (the file lists the dims the other way round).
      type: how it is stored; blocks lie along the last axis.
      offset: first byte, from the start of the file.
      nbytes: bytes stored.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """For example ``q4_1``."""
        return self.type.name.lower()


class GgufFile:
    """An open GGUF file.

    Attributes:
      path: where it is.
      metadata: key -> Python scalar, str, list of str, or numpy array.
      tensors: name -> `TensorInfo`.

    Raises:
      ValueError: the file is not a well-formed GGUF file of version 2 or 3.
      FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.stat().st_size < 24:
            raise ValueError(f"{self.path}: not a GGUF file (shorter than a GGUF header).")
        self._data = np.memmap(self.path, np.uint8, mode="r")
        cursor = _Cursor(self.path, self._data)
        n_tensors, n_entries = _read_header(cursor)
        self.metadata: dict[str, Any] = _read_metadata(cursor, n_entries)
        alignment = _alignment(cursor, self.metadata)
        entries = [_read_tensor_entry(cursor) for _ in range(n_tensors)]
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for entry in entries:
            info = _locate(cursor, entry, start, alignment)
            if info.name in self.tensors:
                raise cursor.error(f"tensor {info.name!r} is listed twice")
            self.tensors[info.name] = info
        _check_overlap(cursor, self.tensors)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata entry `key`, checked to be a `kind`; `default` where it is absent.

        Raises:
          ValueError: it has another type, or it is absent and there is no default.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: the metadata lacks {key!r}.")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in wanted)
            raise ValueError(f"{self.path}: metadata {key!r} should be {names}, got {value!r:.80}.")
        return value

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, ``uint8[*shape[:-1], row bytes]``; a view of the file."""
        info = self._info(name)
        data = self._data[info.offset : info.offset + info.nbytes]
        return data.reshape(*info.shape[:-1], -1)

    def dequantize(self, name: str) -> np.ndarray:
        """The values of a tensor, ``float32[shape]``, by the ``gguf`` package's definition.

        Raises:
          ValueError: values that are not finite, or a type that the package can't dequantize.
        """
        info = self._info(name)
        try:
            with np.errstate(all="ignore"):
                values = gguf.dequantize(self._typed(name), info.type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} has type {info.type_name}, which the gguf package"
                " can't dequantize."
            ) from error
        if not np.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {name!r} has values that are not finite.")
        return values.astype(np.float32, copy=False).reshape(info.shape)

    def _typed(self, name: str) -> np.ndarray:
        """`raw`, in the dtype that ``gguf.dequantize`` wants."""
        dtypes = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
        raw = np.asarray(self.raw(name))
        dtype = dtypes.get(self.tensors[name].type.name)
        return raw if dtype is None else np.frombuffer(raw.tobytes(), dtype)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name!r} in this file.")
        return self.tensors[name]


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.position = path, 0
        self._buffer = memoryview(data)
        self.size = len(self._buffer)

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: corrupt or unsupported GGUF file: {what}.")

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, nbytes: int, what: str) -> memoryview:
        if nbytes > self.left:
            raise self.error(
                f"{what} needs {nbytes} bytes at byte {self.position} and {self.left} are left"
            )
        self.position += nbytes
        return self._buffer[self.position - nbytes : self.position]

    def number(self, fmt: str, what: str) -> int:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", f"length of {what}"), what)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason})") from error

    def count(self, smallest: int, what: str) -> int:
        """A u64 count of things of at least `smallest` bytes each."""
        n = self.number("Q", what)
        if n * smallest > self.left:
            raise self.error(f"{what} is {n}, more than the file has room for")
        return n


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4, "magic")) != b"GGUF":
        raise ValueError(f"{cursor.path}: not a GGUF file (it does not start with 'GGUF').")
    version = cursor.number("I", "version")
    if version not in _VERSIONS:
        big_endian = version & 0xFFFF == 0
        hint = "; it may be big-endian" if big_endian else ""
        raise cursor.error(f"version {version}{hint}; versions {_VERSIONS} are supported")
    n_tensors = cursor.count(_SMALLEST_TENSOR, "tensor count")
    return n_tensors, cursor.count(_SMALLEST_ENTRY, "metadata count")


def _read_metadata(cursor: _Cursor, n_entries: int) -> dict[str, Any]:
    metadata = {}
    for i in range(n_entries):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} is listed twice")
        metadata[key] = _read_value(cursor, cursor.number("I", f"type of {key!r}"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"metadata {key!r}"
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    return _read_scalars(cursor, kind, 1, what)[0].item()


def _read_array(cursor: _Cursor, what: str) -> list[str] | np.ndarray:
    kind = cursor.number("I", f"element type of {what}")
    if kind == _STRING:
        return [cursor.string(what) for _ in range(cursor.count(8, f"length of {what}"))]
    itemsize = np.dtype(_SCALARS[kind]).itemsize if kind in _SCALARS else 1
    return _read_scalars(cursor, kind, cursor.count(itemsize, f"length of {what}"), what)


def _read_scalars(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    if kind not in _SCALARS:
        raise cursor.error(f"{what} has unknown or unsupported value type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype).copy()
    if kind == _BOOL:
        if values.size and values.max() > 1:
            raise cursor.error(f"{what} is a bool other than 0 and 1")
        return values.astype(bool)
    return values


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    is_int = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"'general.alignment' is {alignment!r}, not a power of two")
    return alignment


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, row-major shape, type number, offset from the start of the data."""
    name = cursor.string("a tensor name")
    what = f"tensor {name!r}"
    n_dims = cursor.number("I", f"dims of {what}")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dims; 1 to {_MAX_DIMS} are possible")
    shape = tuple(cursor.number("Q", f"shape of {what}") for _ in range(n_dims))[::-1]
    kind = cursor.number("I", f"type of {what}")
    return name, shape, kind, cursor.number("Q", f"offset of {what}")


def _locate(cursor: _Cursor, entry, start: int, alignment: int) -> TensorInfo:
    name, shape, kind, offset = entry
    try:
        kind = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise cursor.error(f"tensor {name!r} has unknown type {kind}") from error
    if 0 in shape or shape[-1] % block:
        raise cursor.error(f"tensor {name!r} has shape {shape}, impossible for type {kind.name}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset % alignment:
        raise cursor.error(f"tensor {name!r} starts at {offset}, not aligned to {alignment}")
    if start + offset + nbytes > cursor.size:
        raise cursor.error(
            f"tensor {name!r} ends at byte {start + offset + nbytes}, the file has {cursor.size}"
        )
    return TensorInfo(name, shape, kind, start + offset, nbytes)


def _check_overlap(cursor: _Cursor, tensors: dict[str, TensorInfo]):
    order = sorted(tensors.values(), key=lambda t: t.offset)
    for a, b in itertools.pairwise(order):
        if a.offset + a.nbytes > b.offset:
            raise cursor.error(f"tensors {a.name!r} and {b.name!r} overlap")
