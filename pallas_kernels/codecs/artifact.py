"""`Packed` in what `jax.export` writes: its static side as JSON, nothing that could run on loading.

Importing this module registers it. A serialized function that takes `Packed` arguments can be loaded
wherever ``stowax.pallas_kernels.codecs`` has been imported.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax

from . import table
from .packed import Packed
from .static import Static
from .view import View

NAME = "stowax.Packed"


def _to_json(aux: Static) -> bytes:
    parts, codec, view, guessed, name = aux.value
    data = {"parts": parts, "codec": codec.name, "view": dataclasses.asdict(view)}
    return json.dumps(data | {"guessed": guessed, "name": name}).encode()


def _from_json(data: bytes | bytearray) -> Static:
    """What `Packed.tree_flatten_with_keys` gives as static data.

    Raises:
      ValueError: for bytes that are not what `_to_json` writes.
    """
    try:
        found = json.loads(bytes(data))
        view = View(**{key: _tuples(value) for key, value in found["view"].items()})
        parts = tuple(map(str, found["parts"]))
        codec, name = table.get(found["codec"]), str(found["name"])
        return Static((parts, codec, view, bool(found["guessed"]), name))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the artifact holds no valid `{NAME}`: {error!r}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


jax.export.register_pytree_node_serialization(
    Packed,
    serialized_name=NAME,
    serialize_auxdata=_to_json,
    deserialize_auxdata=_from_json,
)
