"""From the tensors of a checkpoint to the parameters of a model.

One table says what each parameter is called in a GGUF file and in a Hugging Face checkpoint.
Everything is compared with the model's own shapes first; all that is missing, unknown or of another
shape is reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .gguf_file import GgufFile
from .llama import LlamaConfig, Params, param_shapes

_LAYER = "layers/"

# parameter path: (name in GGUF, name in Hugging Face checkpoints)
_TOP_NAMES = {
    "embed/weight": ("token_embd.weight", "model.embed_tokens.weight"),
    "final_norm/weight": ("output_norm.weight", "model.norm.weight"),
    "lm_head/weight": ("output.weight", "lm_head.weight"),
}
_LAYER_NAMES = {
    "attn_norm/weight": ("attn_norm.weight", "input_layernorm.weight"),
    "attn/q/weight": ("attn_q.weight", "self_attn.q_proj.weight"),
    "attn/k/weight": ("attn_k.weight", "self_attn.k_proj.weight"),
    "attn/v/weight": ("attn_v.weight", "self_attn.v_proj.weight"),
    "attn/o/weight": ("attn_output.weight", "self_attn.o_proj.weight"),
    "attn/q/bias": ("attn_q.bias", "self_attn.q_proj.bias"),
    "attn/k/bias": ("attn_k.bias", "self_attn.k_proj.bias"),
    "attn/v/bias": ("attn_v.bias", "self_attn.v_proj.bias"),
    "mlp_norm/weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "mlp/gate/weight": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "mlp/up/weight": ("ffn_up.weight", "mlp.up_proj.weight"),
    "mlp/down/weight": ("ffn_down.weight", "mlp.down_proj.weight"),
}


class Source(Protocol):
    """The tensors of a checkpoint."""

    @property
    def label(self) -> str:
        """What error messages call it."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> row-major shape of every tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor as float32."""
        ...


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """A GGUF file as a `Source`."""

    file: GgufFile

    @property
    def label(self) -> str:
        return str(self.file.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.file.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.file.dequantize(name)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where one parameter comes from.

    Attributes:
      path: of the parameter, for example ``layers/attn/q/weight``.
      shape: of the parameter.
      names: the file's tensors: one for each layer of a stacked parameter, otherwise one.
      stacked: the parameter has a leading layer axis.
      rotary_heads: number of heads whose rows the file orders for rotary positions on neighbouring
        pairs (h, h+1) and the model for pairs (h, h + H/2); None where the order is the same.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    rotary_heads: int | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    def reorder(self, rows: np.ndarray) -> np.ndarray:
        """The rows of one of the file's tensors (values or stored bytes) in the model's order."""
        if self.rotary_heads is None:
            return rows
        pairs = rows.reshape(self.rotary_heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def leaves(config: LlamaConfig, source: Source, *, scan: bool, style: str) -> dict[str, Leaf]:
    """Where each parameter comes from, by path.

    Args:
      config: of the model.
      source: the checkpoint; only how many tensors it has matters here.
      scan: layers are stacked.
      style: ``hf``; ``gguf``; or ``gguf-interleaved``, whose q and k rows are ordered for rotary
        positions on neighbouring pairs (architecture "llama").
    """
    n_tensors = len(source.shapes())
    if config.layers > n_tensors:
        raise ValueError(f"{source.label}: {config.layers} layers but only {n_tensors} tensors.")
    column = 1 if style == "hf" else 0
    prefix = "model.layers.{}." if style == "hf" else "blk.{}."
    found = {}
    shapes = jax.tree_util.tree_leaves_with_path(param_shapes(config, scan=scan))
    for keys, leaf in shapes:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        names, stacked = _names(path, config.layers, scan, column, prefix)
        heads = _rotary_heads(path, config) if style == "gguf-interleaved" else None
        found[path] = Leaf(path, tuple(leaf.shape), names, stacked, heads)
    return found


def load_params(source: Source, plan: dict[str, Leaf], *, ignore: set[str], dtype: Any) -> Params:
    """Reads every parameter of `plan`.

    Args:
      source: the checkpoint.
      plan: from `leaves`.
      ignore: tensors of the checkpoint that no parameter takes, known to be harmless.
      dtype: of the parameters.

    Raises:
      ValueError: tensors that are missing, unknown or of another shape, all of them by name.
    """
    check_tensors(source, plan, ignore=ignore)
    params: Params = {}
    for path, leaf in plan.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(_read_leaf(source, leaf, dtype))
    return params


def check_tensors(source: Source, plan: dict[str, Leaf], *, ignore: set[str]):
    """Compares names and shapes with what the model wants; see `load_params`."""
    wanted = {name: leaf.tensor_shape for leaf in plan.values() for name in leaf.names}
    there = source.shapes()
    problems = [f"missing: {n} {list(s)}" for n, s in wanted.items() if n not in there]
    problems += [
        f"unexpected: {n} {list(s)}"
        for n, s in there.items()
        if n not in wanted and n not in ignore
    ]
    problems += [
        f"wrong shape: {n} is {list(there[n])}, the model's config says {list(s)}"
        for n, s in wanted.items()
        if n in there and there[n] != s
    ]
    if problems:
        raise ValueError(
            f"{source.label}: {len(problems)} tensors don't fit the model:\n  "
            + "\n  ".join(problems)
        )


def _read_leaf(source: Source, leaf: Leaf, dtype: Any) -> np.ndarray:
    """One parameter; only one tensor of the file exists in float32 at a time."""
    out = np.empty(leaf.shape, dtype)
    slots = out if leaf.stacked else out[None]
    for slot, name in zip(slots, leaf.names):
        slot[...] = leaf.reorder(source.read(name))
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A parameter as the file stores it.

    Attributes:
      type: GGUF type, for example ``q4_1``.
      shape: of the parameter, ``(out, in)`` or ``(layers, out, in)``; blocks lie along ``in``.
      data: ``uint8[*shape[:-1], bytes of a row]``, the file's bytes, rows in the parameter's order.
    """

    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.data.nbytes


class Blocks(Mapping[str, Block]):
    """The stored bytes of each parameter by path; made when asked for, from the mapped file.

    Iterating gives every parameter. A parameter whose layers are stored in different types can't be
    one `Block`: asking for it is a ``ValueError``; `types` tells which those are.
    """

    def __init__(self, file: GgufFile | None, plan: dict[str, Leaf]):
        if file is None and plan:
            raise ValueError("`file` is needed: `plan` names tensors of it.")
        self._file, self._plan = file, plan

    def types(self, path: str) -> tuple[str, ...]:
        """The types that `path` is stored in: one for each layer of a stacked parameter."""
        names = self._plan[path].names
        assert self._file is not None
        return tuple(self._file.tensors[name].type_name for name in names)

    def __getitem__(self, path: str) -> Block:
        leaf, types = self._plan[path], sorted(set(self.types(path)))
        if len(types) > 1:
            raise ValueError(
                f"`{path}` is stored in several types over the layers ({', '.join(types)}) and"
                " can't be stacked as it is; load with scan=False for the blocks of each layer."
            )
        assert self._file is not None
        rows = [leaf.reorder(np.asarray(self._file.raw(name))) for name in leaf.names]
        return Block(types[0], leaf.shape, np.stack(rows) if leaf.stacked else rows[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)


def _names(path: str, n_layers: int, scan: bool, column: int, prefix: str):
    """The file's tensors for `path`, and whether they are stacked."""
    if not path.startswith(_LAYER):
        return (_TOP_NAMES[path][column],), False
    rest = path.removeprefix(_LAYER)
    if scan:
        name = _LAYER_NAMES[rest][column]
        return tuple(prefix.format(i) + name for i in range(n_layers)), True
    layer, rest = rest.split("/", 1)
    return (prefix.format(layer) + _LAYER_NAMES[rest][column],), False


def _rotary_heads(path: str, config: LlamaConfig) -> int | None:
    if "/attn/q/" in path:
        return config.heads
    return config.kv_heads if "/attn/k/" in path else None
