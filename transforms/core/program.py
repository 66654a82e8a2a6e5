"""A function as a program: its jaxpr, the tree of its arguments, and which leaves hold what.

In goes any JAX function and its arguments, some leaves of which may be `Packed`. Out comes the jaxpr of the
function on the tensors that those stand for. Leaves that are no arrays (activation functions in an Equinox
module, flags, strings) are static: they stay with the function.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from stowax.pallas_kernels.codecs import Packed

from . import compat


class Stored:
    """A leaf that stands for an array of `shape` and `dtype` and holds something else (see ``kv.state``)."""

    shape: Any
    dtype: Any


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def is_stored(x: Any) -> bool:
    """Whether `x` is one leaf of a program, whatever arrays it holds."""
    return isinstance(x, (Packed, Stored))


def path_string(path: Sequence[Any]) -> str:
    """A pytree path as ``layers/attn/q/weight``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Path and leaf of each leaf of `tree`, a `Packed` counted as one leaf; `prefix` begins each path.

    Raises:
      ValueError: two leaves with one path, as of ``{"a/b": x, "a": {"b": y}}``.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stored)
    names = ["/".join(filter(None, (prefix, path_string(path)))) for path, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves have the path {twice!r}: rename a key that holds a `/`")
    return [(name, leaf) for name, (_, leaf) in zip(names, found)]


def replace_leaves(tree: Any, new: Mapping[str, Any], prefix: str = "") -> Any:
    """`tree` with the leaves at some paths replaced."""
    names = iter([name for name, _ in named_leaves(tree, prefix)])
    return jax.tree.map(lambda leaf: new.get(next(names), leaf), tree, is_leaf=is_stored)


def prefixes(weights: Mapping[int | str, Any]) -> dict[int | str, str]:
    """What begins the paths in each argument that holds weights: nothing, where one has them all."""
    bare = lambda tree: jax.tree_util.all_leaves([tree], is_leaf=is_stored)
    return {k: str(k) if len(weights) > 1 or bare(v) else "" for k, v in weights.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
      jaxpr: of the traced leaves, in order.
      leaves: the traced leaves as they were given (arrays, shapes or `Packed`).
      names: the path of each leaf that holds weights, "" for the others.
      out_tree: structure of the result.
      caches: the path of each leaf of a cache, "" for the others.
    """

    jaxpr: Any
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    out_tree: Any
    caches: tuple[str, ...] = ()


def trace(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: tuple[int | str, ...],
    cache: tuple[int | str, ...] = (),
) -> Program:
    """Traces `fn` as it is, every stored leaf replaced by the tensor that it stands for."""
    flat, leaves = of_arrays(fn, args, kwargs, is_leaf=is_stored)
    jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*map(logical, leaves.values()))
    names = _role_names(fn, args, kwargs, params)
    caches = _role_names(fn, args, kwargs, cache, "cache")
    pick = lambda found: tuple(found[i] for i in leaves)
    out_tree = jax.tree.structure(shapes)
    return Program(jaxpr, tuple(leaves.values()), pick(names), out_tree, pick(caches))


def of_arrays(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Any = None
) -> tuple[Callable[..., Any], dict[int, Any]]:
    """`fn` as a function of the array leaves of a call, and those, by their place among all leaves."""
    found, tree = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_leaf)
    arrays = {i: v for i, v in enumerate(found) if is_stored(v) or compat.is_array(v)}

    def flat(*values: Any) -> Any:
        given = dict(zip(arrays, values, strict=True))
        leaves = [given.get(i, leaf) for i, leaf in enumerate(found)]
        call_args, call_kwargs = jax.tree_util.tree_unflatten(tree, leaves)
        return fn(*call_args, **call_kwargs)

    return flat, arrays


def logical(leaf: Any) -> Any:
    """The tensor that a leaf stands for, as a shape where it is not the tensor itself."""
    if not is_stored(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _role_names(
    fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], role: Any, what: str = "params"
) -> list[str]:
    """The path of every leaf inside an argument that has a role; "" for other leaves."""
    given = dict([*enumerate(args), *sorted(kwargs.items())])
    prefix = prefixes({k: given[k] for k in select(fn, args, kwargs, role, what)})
    names: list[str] = []
    for key, arg in given.items():
        if key in prefix:
            names += [name for name, _ in named_leaves(arg, prefix[key])]
        else:
            names += [""] * len(jax.tree.leaves(arg, is_leaf=is_stored))
    return names


def select(
    fn: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Sequence[int | str],
    what: str = "params",
) -> list[int | str]:
    """Which positions and keywords of this call a role means (a name may be passed by position)."""
    chosen: list[int | str] = []
    for key in params:
        if isinstance(key, str) and key not in kwargs:
            key = position(fn, key)
        if (isinstance(key, int) and not -len(args) <= key < len(args)) or (
            isinstance(key, str) and key not in kwargs
        ):
            raise ValueError(
                f"`{what}` names argument {key!r}, but the call has {len(args)} positional "
                f"arguments and keywords {sorted(kwargs)}: pass it there, or change `{what}`"
            )
        chosen.append(key % len(args) if isinstance(key, int) else key)
    return chosen


def position(fn: Any, name: int | str) -> int | str:
    """The position of the argument called `name`, where the signature of `fn` tells."""
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return name
    return names.index(name) if name in names else name
