"""`CompressKV`: a rule for each cache, and what `Transformed` does with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from stowax.pallas_kernels.codecs import LayoutError

from ..core.program import Program, named_leaves, replace_leaves
from . import emit, fused, prefill, store
from .find import Caches, can_hold_rows, find
from .method import Method
from .report import CacheRow, CacheTable
from .spec import Group, Site, Stream
from .state import KVState, Moved, is_state

Rules = tuple[tuple[str, Method | None], ...]


@dataclasses.dataclass(frozen=True)
class CompressKV:
    """See `stowax.transforms.compress_kv`.

    Attributes:
      rules: pattern and method; the first pattern found in the path of an attention's cache decides.
    """

    rules: Rules

    def __repr__(self) -> str:
        rules = ", ".join(f"{p or 'all'}: {m.name if m else 'keep'}" for p, m in self.rules)
        return f"compress_kv({rules})"

    def claim(self, leaves: Sequence[Any], strict: bool) -> dict[str, Any]:
        """No weight is taken."""
        return {}


def methods_of(groups: Sequence[Group], rules: Rules) -> dict[str, Method]:
    """The method of each group that a rule compresses, by the path of its first leaf.

    Groups are layers, in the order in which the program reads them.
    """
    found = {}
    chosen = [next((m for p, m in rules if re.search(p, g.name)), None) for g in groups]
    for i, (group, rule) in enumerate(zip(groups, chosen)):
        if rule is None:
            continue
        place, count = i, len(groups)
        if rule.merge is not None:  # among the layers that are merged alike
            alike = [g for g, m in zip(groups, chosen) if m == rule and g.layers == 1]
            _check_alike(rule, alike)
            place, count = (alike.index(group), len(alike)) if group.layers == 1 else (0, 1)
        found[group.leaves[0][0]] = store.fitted(rule, group, place, count)
    return found


def _check_alike(method: Method, groups: Sequence[Group]) -> None:
    """Raises where layers that are merged have different geometries."""
    of = lambda g: (g.batch, g.heads, g.length, [(s.role, s.width, s.dtype) for s in g.streams])
    other = next((g for g in groups if of(g) != of(groups[0])), None)
    if other is not None:
        raise ValueError(
            f"{groups[0].name} and {other.name} have different heads, lengths or widths, so {method.name} can't merge "
            "them: give each kind a rule of its own"
        )


def chosen(caches: Caches, methods: dict[str, Method]) -> Caches:
    """Only the groups that a rule compresses."""
    groups = tuple(g for g in caches.groups if g.leaves[0][0] in methods)
    leaves = {name for g in groups for name, _, _ in g.leaves}
    outputs = {leaf: i for leaf, i in caches.outputs.items() if leaf in leaves}
    return dataclasses.replace(caches, groups=groups, outputs=outputs)


def look(
    program: Program, rules: Rules, *, masks: bool = False
) -> tuple[Caches, dict[str, Method]]:
    """What a program does with its caches, and the method of each group."""
    sources = any(m is not None and m.input for _, m in rules)
    found = find(program, program.caches, masks=masks, sources=sources)
    methods = methods_of(found.groups, rules)
    inputs = [g for g in found.groups if (m := methods.get(g.leaves[0][0])) and m.input]
    new = {g.name: dataclasses.replace(g, source=_source(found, g)) for g in inputs}
    groups = tuple(new.get(g.name, g) for g in found.groups)
    return dataclasses.replace(found, groups=groups), methods


def _source(found: Caches, group: Group) -> Stream:
    """The stream that keys and values of a group are made of. Raises ValueError where there is none."""
    try:
        source = found.sources[group.name]()
    except LayoutError as error:
        raise ValueError(
            f"{group.name}: {error}. Give it a method that stores keys and values, or keep it with a rule "
            f"`{{{group.name!r}: None}}`."
        ) from None
    return Stream(group.leaves[0][0], (), "input", source.width, group.streams[0].dtype)


def run(program: Program, rules: Rules, strict: bool) -> list[Any]:
    """The results of a call on compressed caches."""
    found, methods = look(program, rules)
    _check(found, rules, methods, strict)
    caches = chosen(found, methods)
    leaves = [
        _usable(leaf, name, caches, methods) for leaf, name in zip(program.leaves, program.caches)
    ]
    program = dataclasses.replace(program, leaves=tuple(leaves))
    return emit.run(program, list(program.caches), caches, methods, strict)


def _check(caches: Caches, rules: Rules, methods: dict[str, Method], strict: bool) -> None:
    for group in caches.groups:
        method = methods.get(group.leaves[0][0])
        if method is not None:
            check_fit(method, group, caches)
    if not strict:
        return
    if not caches.groups:
        why = (
            "; ".join(f"{r.leaf}: {r.reason}" for r in caches.refused)
            or "`cache` has no array of rows"
        )
        raise ValueError(
            f"no attention over a cache was found ({why}). Check `cache=`, or pass `strict=False` to leave the "
            "caches as they are."
        )
    for pattern, _ in rules:
        if not any(re.search(pattern, g.name) for g in caches.groups):
            names = [g.name for g in caches.groups]
            raise ValueError(
                f"`rules` has the pattern {pattern!r}, which takes no cache. Caches here are {names[:4]}. "
                "Mend the pattern, or pass `strict=False`."
            )


def check_fit(method: Method, group: Group, caches: Caches) -> None:
    """Raises where a method can't keep a group."""
    escaping = [name for name, _, _ in group.leaves if name in caches.escapes]
    if method.selector is not None and escaping:
        raise ValueError(
            f"{group.name}: its rows or attention weights are also used outside the attention, so tokens can't be "
            f"evicted. Use a recipe without a selector for it, or keep it with a rule `{{{group.name!r}: None}}`."
        )
    if group.paged and not method.private_pages:
        raise ValueError(
            f"{group.name} is a pool of pages. Compressed, each row of the batch has tokens of its own, so pages that "
            "rows share (a common prefix), or that change hands with their contents, would be lost: pass "
            "`private_pages=True` to `compress_kv` if no page does that, or keep it with a rule "
            f"`{{{group.name!r}: None}}`."
        )
    store.check(method, group)


def _usable(leaf: Any, name: str, caches: Caches, methods: dict[str, Method]) -> Any:
    """A cache's leaf as the program's own analysis wants it."""
    group = caches.group_of(name) if name else None
    if group is None:
        if is_state(leaf):
            if getattr(leaf, "guessed", True) or isinstance(leaf, Moved):
                return jnp.zeros(leaf.shape, leaf.dtype)
            raise ValueError(
                f"{name}: the program does not attend to this cache; make it with init_cache(cache, *rest)"
            )
        return leaf
    owner = group.leaves[0][0]
    method = methods[owner]
    if isinstance(leaf, KVState) and (leaf.group, leaf.method) == (group, method) and name == owner:
        return leaf
    if is_state(leaf) and not (isinstance(leaf, KVState) and not leaf.guessed):
        if isinstance(leaf, KVState):
            _check_unused(leaf, name)
        return KVState(store.empty(method, group), group, method) if name == owner else leaf
    if isinstance(leaf, KVState):
        raise ValueError(
            f"{name}: this compressed cache was made for another program or method: it is {leaf}, and the call "
            f"wants {method.name} of {group}. Make it with `fast.init_cache`."
        )
    raise ValueError(
        f"{name}: `cache` holds the model's own array {leaf.dtype}{list(leaf.shape)}; the rewritten function takes a "
        "compressed cache. Make it once with `fast.init_cache(cache)`."
    )


def _check_unused(state: KVState, name: str) -> None:
    """A cache whose layout was guessed wrong is made anew, so it must not hold rows yet.

    Inside `jit` that can't be seen: there only a cache that was used by another function could be lost.
    """
    arrays = jax.tree.leaves(state.arrays)
    known = not any(isinstance(x, (Tracer, jax.ShapeDtypeStruct)) for x in arrays)
    if known and store.is_used(state.arrays):
        raise ValueError(
            f"{name}: this cache holds rows of a program with another layout; make one for this program with "
            "`fast.init_cache(cache, *rest)`"
        )


def init(cache: Any, program: Program, rules: Rules, strict: bool) -> Any:
    """The compressed cache of a program, empty."""
    found, methods = look(program, rules)
    _check(found, rules, methods, strict)
    return _replaced(cache, found.groups, methods, False)


def guess(cache: Any, rules: Rules) -> Any:
    """The compressed cache by names and shapes alone."""
    groups = _guess_groups(cache)
    methods = methods_of(groups, rules)
    for group in groups:
        if (method := methods.get(group.leaves[0][0])) is not None:
            _check_guessable(method, group)
            store.check(method, group)
    return _replaced(cache, groups, methods, True)


def _check_guessable(method: Method, group: Group) -> None:
    if method.input:
        raise ValueError(
            f"{group.name}: {method.name} stores what keys and values are made of, whose width only the program tells: "
            "pass the other arguments of a call too, as in `fast.init_cache(cache, params, tokens)`"
        )


def _replaced(
    cache: Any, groups: Sequence[Group], methods: dict[str, Method], guessed: bool
) -> Any:
    new: dict[str, Any] = {}
    held = {
        name for group in groups if group.leaves[0][0] in methods for name, _, _ in group.leaves
    }
    for name, leaf in named_leaves(cache):
        new[name] = leaf if name in held else _zeros(leaf)
    for group in groups:
        owner = group.leaves[0][0]
        method = methods.get(owner)
        if method is None:
            continue
        for name, shape, dtype in group.leaves:
            _check_empty(name, new[name])
            new[name] = Moved(owner, shape, dtype)
        new[owner] = KVState(store.empty(method, group), group, method, guessed)
    return replace_leaves(cache, new)


def _check_empty(name: str, leaf: Any) -> None:
    if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) or not bool(jnp.any(leaf != 0)):
        return
    raise ValueError(
        f"{name}: `cache` already holds rows; the compressed cache begins empty. Pass the model's empty cache or its "
        "shapes (`jax.eval_shape`), and read the text again through the rewritten function."
    )


def _zeros(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return leaf


def _guess_groups(cache: Any) -> list[Group]:
    """Pairs of neighbouring leaves of one shape: keys and values, ``[..., B, S, K, H]`` or ``[..., B, K, S, H]``."""
    leaves = [(n, x) for n, x in named_leaves(cache) if hasattr(x, "shape") and can_hold_rows(x)]
    groups, i = [], 0
    while i < len(leaves):
        (name, x), *rest = leaves[i:]
        if rest and rest[0][1].shape == x.shape and len(x.shape) >= 3:
            groups.append(_guess_group(name, rest[0][0], x))
            i += 1
        i += 1
    return groups


def _guess_group(key: str, value: str, x: Any) -> Group:
    shape = tuple(x.shape)
    stack, inner = (shape[:-4], shape[-4:]) if len(shape) > 4 else ((), shape)
    sizes: list[int] = list(inner)
    batch, middle, width = sizes[0], sizes[1:-1], sizes[-1]
    length = max(middle)
    heads = 1 if len(middle) == 1 else min(middle)
    dtype = jnp.dtype(x.dtype).name
    if _is_value(key) and not _is_value(value):
        key, value = value, key
    streams = (Stream(key, (), "key", width, dtype), Stream(value, (), "value", width, dtype))
    leaves = ((key, shape, dtype), (value, shape, dtype))
    return Group(leaves, streams, stack, batch, heads, length)


def _is_value(name: str) -> bool:
    return name.rsplit("/", 1)[-1].lower().startswith("v") or "value" in name.lower()


def explain(program: Program, rules: Rules) -> CacheTable:
    """A row for each cache of a program, compressed or not."""
    found, methods = look(program, rules, masks=True)
    rows = []
    for group in found.groups:
        method = methods.get(group.leaves[0][0])
        sites = [s for s in found.sites if s.group == group.name]
        if method is not None:
            sites = [_described(s, method, group) for s in sites]
        rows.append(CacheRow.of(group, method, sites))
    shapes = {n: x for n, x in zip(program.caches, program.leaves) if n}
    rows += [CacheRow.kept(r.leaf, shapes[r.leaf], r.reason) for r in found.refused]
    return CacheTable(rows)


def _described(site: Site, method: Method, group: Group) -> Site:
    attends = (prefill if site.rows > 1 else fused).describe(site, method, group)
    return dataclasses.replace(site, path=attends, keeps=fused.keeper(site, method, group))
