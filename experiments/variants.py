"""Variants of a model by name: a codec, a solver, and the rules between them.

A variant's name is its codec's, with the solver's behind it unless it rounds: ``int8``, ``int4-g64-gptq``. Two
names are no codec: ``f16`` holds every weight in 16 bits and is what the others are compared with, and ``gguf``
keeps the packed blocks of the model's own file as they are.

All other variants quantize the linear layers only. The embedding, which the output projection shares, stays in the
blocks of the file, so that the figures show what the codec does to the linear layers and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import stowax as sx
from stowax.models import Model

BASELINE = "f16"
FILE = "gguf"
SOLVERS: dict[str, Callable[[Any], Any]] = {
    "clip": lambda calibration: sx.clip_search(),
    "hqq": lambda calibration: sx.hqq(),
    "gptq": sx.gptq,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A model in less memory.

    Attributes:
      name: see the module's docstring.
      params: the packed weights.
      transform: applies to any of the model's functions: ``transform(model.step)`` takes `params`.
      report: the solver's, a row for each weight; None where nothing was solved.
    """

    name: str
    params: Any
    transform: Any
    report: Any = None


def check(names: list[str]) -> None:
    """Refuses unknown names, before any work is done."""
    for name in names:
        if name not in (BASELINE, FILE):
            sx.codecs.get(split(name)[0])


def split(name: str) -> tuple[str, str]:
    """Codec and solver of a variant's name."""
    codec, _, solver = name.rpartition("-")
    return (codec, solver) if solver in SOLVERS else (name, "round")


def build(model: Model, name: str, calibration: list[Any]) -> Variant:
    """Makes a variant.

    Args:
      model: from a GGUF file or a Hugging Face directory.
      name: see the module's docstring.
      calibration: token arrays ``int32[1, T]`` for solvers that look at data.
    """
    if name == BASELINE:
        transform = sx.quantize("f16")
        return Variant(name, transform(model.nll).encode(model.params, calibration[0]), transform)
    keep = sx.quantize(None)
    if name == FILE:
        return Variant(name, sx.import_blocks(model.params, model.blocks), keep)
    codec, solver = split(name)
    chosen = SOLVERS[solver](calibration) if solver in SOLVERS else solver
    transform = sx.quantize({"embed|lm_head": None, "": codec}, solver=chosen)
    fast = transform(model.nll)
    params = _keep_tables(model, fast.encode(model.params, calibration[0]))
    return Variant(name, params, keep, fast.report)


def linear_bits(params: Any) -> float:
    """Bits of a weight of the packed linear layers, scales and zero points counted."""
    packed = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
        if _is_packed(leaf) and "embed" not in str(path) and "lm_head" not in str(path)
    ]
    return 8 * sum(leaf.nbytes for leaf in packed) / max(1, sum(leaf.size for leaf in packed))


def _keep_tables(model: Model, params: Any) -> Any:
    """The embedding as the file has it; 16 bits if the file is not packed."""
    if model.blocks:
        return sx.import_blocks(params, model.blocks, only="embed|lm_head")
    return params


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, sx.Packed)
