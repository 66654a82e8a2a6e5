"""Formats of weights and caches: a plan's part that `quantize` and `compress_kv` carry out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import recipes
from ..chain import chain
from ..compress_kv import compress_kv
from ..kv import Method
from ..quantize import quantize
from ..transform import Transformed

PLAIN = "as it is"
ON_HOST = "host:"


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight or a cache is stored.

    Attributes:
      kind: "weights" or "cache".
      name: path of the leaf, or what the paths of the cache's leaves have in common.
      how: a codec, or a recipe; "host:" before it where it is in host memory.
      before, nbytes, host: bytes as it was, on the device, and on the host.
    """

    kind: str
    name: str
    how: str
    before: int
    nbytes: int
    host: int


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which arguments of a function hold weights, and which its caches; None for none."""

    params: int
    cache: int | None


def method(name: str) -> Method:
    """The recipe of a name, with its defaults; "host:kv4" has its codes in host memory.

    Raises:
      ValueError: there is no such recipe.
    """
    tier, _, own = name.rpartition(":")
    make = getattr(recipes, own, None)
    if tier not in ("", "host") or own.startswith("_") or not callable(make):
        raise ValueError(f"`caches` has {name!r}; expected a recipe of `sx.recipes`, as 'kv4'")
    try:
        found = make()
    except TypeError:
        found = None
    if not isinstance(found, Method):
        raise ValueError(f"`caches` has {name!r}, which needs arguments; expected one as 'kv4'")
    return recipes.offload(found) if tier else found


def composed(fn: Callable[..., Any], formats: Sequence[Format], roles: Roles) -> Any:
    """`fn` with its weights and caches in these formats; `fn` itself where all are as they were."""
    exactly = lambda f: f"^{re.escape(f.name)}$"
    chosen = [f for f in formats if f.how != PLAIN]
    codecs = {exactly(f): f.how for f in chosen if f.kind == "weights"}
    methods = {exactly(f): method(f.how) for f in chosen if f.kind == "cache"}
    parts: list[Any] = [quantize(codecs)] if codecs else []
    if methods:
        parts.append(compress_kv({**methods, "": None}))
    if not parts:
        return fn
    cache = roles.cache if methods and roles.cache is not None else ()
    return chain(*parts)(fn, params=roles.params, cache=cache)


def converted(fn: Any, args: Sequence[Any], roles: Roles) -> tuple[Any, ...]:
    """The arguments of a `composed` function: weights packed, caches of their recipes and empty.

    Where the weights are shapes all are. Otherwise a cache given as shapes is made, of zeros.
    """
    out: list[Any] = list(args)
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args[roles.params]))
    if isinstance(fn, Transformed):
        out[roles.params] = fn.encode(*args)
    if roles.cache is None:
        return tuple(out)
    cache, rest = args[roles.cache], [x for i, x in enumerate(args) if i != roles.cache]
    if isinstance(fn, Transformed) and fn.cache:
        empty = lambda: fn.init_cache(cache, *rest)
        out[roles.cache] = jax.eval_shape(empty) if shapes else empty()
    elif not shapes:
        out[roles.cache] = _made(cache)
    return tuple(out)


def _made(cache: Any) -> Any:
    zeros = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    return jax.tree.map(zeros, cache)
