"""A reader of safetensors files whose every complaint is a ``ValueError`` that names the file.

The ``safetensors`` library checks the header against the file's size; this adds names, a shorter
list of dtypes and float32 values. The format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import safetensors

_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file: its shape and its dtype as safetensors names it, for example BF16."""

    shape: tuple[int, ...]
    dtype: str


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
      path: where it is.
      tensors: name -> `TensorInfo`.

    Raises:
      ValueError: the file is not a well-formed safetensors file.
      FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: there is no such file.")
        try:
            self._file = safetensors.safe_open(str(self.path), framework="numpy")
            views = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.tensors = {
                name: TensorInfo(tuple(view.get_shape()), str(view.get_dtype()))
                for name, view in views.items()
            }
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{self.path}: corrupt safetensors file ({error}).") from error

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor as ``float32``.

        Raises:
          ValueError: no such tensor, a dtype that is not a plain float, or values that are not
            finite.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name!r} in this file.")
        dtype = self.tensors[name].dtype
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.path}: tensor {name!r} has dtype {dtype}; supported are"
                f" {', '.join(_DTYPES)}."
            )
        values = self._file.get_tensor(name).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {name!r} has values that are not finite.")
        return values
