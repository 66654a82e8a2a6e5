"""The texts that the experiments score and calibrate on; see ``data/README.md`` for where they come from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp

from stowax.models import Model

NAMES = ("technical", "novel", "calibration")


def read(name: str) -> str:
    """A text by name, or the contents of a file."""
    if name in NAMES:
        return (resources.files(__package__) / "data" / f"{name}.txt").read_text()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"`text` is {name!r}: neither one of {NAMES} nor a file")
    return path.read_text()


def tokens(model: Model, name: str, count: int | None = None) -> list[int]:
    """The first `count` tokens of a text.

    Raises:
      ValueError: the text is shorter.
    """
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(read(name))
    if count is not None and len(ids) < count:
        raise ValueError(f"`tokens` is {count}, but the text {name!r} has {len(ids)}")
    return ids[:count]


def batches(model: Model, name: str, count: int, length: int) -> list[jax.Array]:
    """`count` windows ``int32[1, length]`` spread evenly over a text."""
    ids = tokens(model, name)
    if len(ids) < length:
        raise ValueError(f"`length` is {length}, but the text {name!r} has {len(ids)} tokens")
    last = len(ids) - length
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return [jnp.asarray(ids[start : start + length], jnp.int32)[None] for start in starts]
