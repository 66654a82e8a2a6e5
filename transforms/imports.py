"""Weights that a file already holds in a low-bit format, taken over bit by bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import Packed

from .core import named_leaves, replace_leaves


class Block(Protocol):
    """A tensor as a file stores it, ``uint8[*shape[:-1], bytes of a row]``, blocks along the last axis."""

    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def data(self) -> Any: ...


def import_blocks(params: Any, blocks: Mapping[str, Block], *, only: str = "") -> Any:
    """Replaces leaves of `params` by the packed blocks that they were made from.

    Args:
      params: pytree of arrays.
      blocks: for a leaf's path, its bytes in the file, such as the ``blocks`` of ``sx.models.load``. Types that
        are no low-bit codec (``f32``) are left alone.
      only: a regular expression; paths in which it is not found are left alone.

    Returns:
      `params` with `Packed` leaves, ready for any function that ``sx.quantize`` has been applied to.

    Raises:
      ValueError: a block whose shape is not its leaf's, or nothing to import.

    Example:
      >>> model = sx.models.load("model.gguf")
      >>> fast = sx.quantize(None)(model.step)
      >>> logits, cache = fast(sx.import_blocks(model.params, model.blocks), tokens, cache)
    """
    known = set(codecs.names())
    packed: dict[str, Packed] = {}
    for name, leaf in named_leaves(params):
        if name not in blocks or not re.search(only, name):
            continue
        block = blocks[name]
        if block.type in known and block.type not in ("f32", "f16", "bf16"):
            packed[name] = _import_block(name, leaf, block)
    if not packed:
        raise ValueError(
            f"`blocks` has nothing to import for the {len(named_leaves(params))} leaves of `params` with "
            f"`only`={only!r}; it holds {list(blocks)[:3]}..."
        )
    return replace_leaves(params, packed)


def _import_block(name: str, leaf: Any, block: Block) -> Packed:
    if tuple(leaf.shape) != tuple(block.shape):
        raise ValueError(f"`blocks[{name!r}]` has shape {block.shape}; the leaf has {leaf.shape}")
    lead, inner = tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)
    view = codecs.storage_view(leaf.shape, jnp.dtype(leaf.dtype).name, lead, inner)
    codec = codecs.get(block.type)
    shapes = codec.part_shapes(view.storage_shape)
    (part,) = shapes
    if tuple(block.data.shape) != shapes[part].shape:
        raise ValueError(
            f"`blocks[{name!r}]` of type {block.type} has bytes {block.data.shape}; expected "
            f"{shapes[part].shape}"
        )
    return Packed({part: jax.device_put(block.data)}, codec, view)
