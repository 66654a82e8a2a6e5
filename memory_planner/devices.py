"""What the planner must know of a device: its memories, and how fast they and its units are."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or a processor.

    Attributes:
      name: as in `device(name)`.
      source: where the figures come from.
      kind: a part of what jax calls such a device.
      backend: `gpu`, `tpu` or `cpu`: whose compiler's rules hold.
      hbm_bytes: its memory, bytes.
      host_bytes: the share of the host's memory that one device can use, bytes.
      bandwidth: of its memory, bytes/s.
      to_host, from_host: of the link to host memory, bytes/s each way.
      overlap: the share of the computation that transfers of residuals run beside.
      flops: peak rate of matrix products by dtype of the operands, flop/s; `float8` stands for all 8-bit floats.
      vector_flops: rate of elementwise arithmetic in float32, flop/s.
    """

    name: str
    source: str
    kind: str
    backend: str
    hbm_bytes: int
    host_bytes: int
    bandwidth: float
    to_host: float
    from_host: float
    overlap: float
    flops: Mapping[str, float]
    vector_flops: float

    @property
    def is_here(self) -> bool:
        """Whether jax runs on such a device."""
        return self.kind in jax.devices()[0].device_kind

    def peak(self, dtype: Any) -> float:
        """Flop/s of a matrix product of `dtype` operands.

        A type that the device has no rate for runs as the slowest type it can be widened to without loss: int4 as
        int8 where there is int8, float8 as bfloat16, anything else at the float32 rate.
        """
        name = jnp.dtype(dtype).name
        known = [key for key in _widened(name) if key in self.flops]
        return self.flops[known[0]] if known else self.flops["float32"]


def device(name: str, measured: str | Path | Mapping[str, Any] | None = None) -> Device:
    """A device by name, with measured figures in place of published ones where there are some.

    Args:
      name: `h100`, `h200`, `a100`, `v5e`, `v6e` or `cpu`.
      measured: a JSON file, or its content: `{"bandwidth": 2.8e12, "flops": {"bfloat16": 6.6e14}}`. Keys are the
        fields of `Device`; rates that `flops` doesn't name stay.

    Raises:
      ValueError: there is no such device, or `measured` has unknown keys or figures that are not positive numbers.

    Example:
      >>> device("h100", {"from_host": 5.4e10}).from_host
      54000000000.0
    """
    table = _table()
    if name not in table:
        raise ValueError(f"`name` is {name!r}; known devices: {', '.join(table)}.")
    fields = {"name": name, **table[name]}
    return Device(**(fields if measured is None else _calibrated(fields, measured)))


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files(__package__).joinpath("devices.json").read_text())


def _calibrated(fields: dict[str, Any], measured: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(measured, Mapping):
        try:
            measured = json.loads(Path(measured).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"`measured`: {measured} can't be read as JSON ({error}).") from None
    if not isinstance(measured, Mapping):
        raise ValueError("`measured` must hold a JSON object: {field: figure}.")
    flops = {**fields["flops"], **_mapping(measured.get("flops", {}))}
    given = {key: value for key, value in measured.items() if key != "flops"}
    if unknown := sorted(given.keys() - fields.keys() - {"name"}):
        raise ValueError(f"`measured` has {unknown}; a device has {sorted(fields)}.")
    texts = ("name", "source", "kind", "backend")
    figures = {key: value for key, value in given.items() if key not in texts} | flops
    if bad := [k for k, v in figures.items() if not (_is_positive(v) or (k, v) == ("overlap", 0))]:
        raise ValueError(f"`measured` must give positive numbers, which these are not: {bad}.")
    source = given.get("source", f"{fields['source']}; measured: {', '.join(sorted(measured))}")
    return {**fields, **given, "name": fields["name"], "flops": flops, "source": source}


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`measured`: `flops` is {value!r}, expected {{dtype: flop/s}}.")
    return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _widened(name: str) -> tuple[str, ...]:
    if name.startswith("float8"):
        return ("float8", "bfloat16")
    if name.startswith("float4"):
        return ("float4", "float8", "bfloat16")
    if name in ("int4", "uint4", "int2", "uint2"):
        return (name, "int4", "int8", "bfloat16")
    if name in ("int8", "uint8", "bool"):
        return (name, "int8", "bfloat16")
    return (name,)
