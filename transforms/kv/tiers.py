"""Where the codes of a cache live between attentions.

The big segment of a store, "main", can be in host memory; sinks, recent rows, positions and scores stay on the device.
An attention fetches the segment of its own layer and puts it back whole. Under a scan over layers only one layer's is
on the device at a time; in an unrolled program XLA's own schedule fetches all of them before it puts one back.
"""

from __future__ import annotations

from typing import Any

import jax

# name: the memory space. On CPU both are the same memory, so that programs run there but save nothing.
TIERS = {"device": jax.memory.Space.Device, "host": jax.memory.Space.Host}
SEGMENT = "main"


def fetch(arrays: Any, tier: str) -> Any:
    """The buffers of a layer, all on the device."""
    return arrays if tier == "device" else _moved(arrays, TIERS["device"])


def put(arrays: Any, tier: str) -> Any:
    """The buffers of a layer (or of layers), each where it lives."""
    return arrays if tier == "device" else _moved(arrays, TIERS[tier])


def on_host(arrays: Any, tier: str) -> list[Any]:
    """The leaves that live in host memory."""
    if tier != "host":
        return []
    parts = arrays.get("layers", [arrays])
    return jax.tree.leaves([part[SEGMENT] for part in parts if SEGMENT in part])


def _moved(arrays: Any, space: Any) -> Any:
    if "layers" in arrays:
        return {"layers": [_moved(part, space) for part in arrays["layers"]]}
    if SEGMENT not in arrays:
        return arrays
    return arrays | {SEGMENT: jax.device_put(arrays[SEGMENT], space)}
