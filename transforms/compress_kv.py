"""`sx.compress_kv`: KV caches in less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .kv import CompressKV, Method
from .rules import check_patterns
from .transform import Applicable


@dataclasses.dataclass(frozen=True)
class KVTransform(Applicable, CompressKV):
    """See `compress_kv`."""

    __repr__ = CompressKV.__repr__


def compress_kv(
    rules: Method | Mapping[str, Method | None], *, private_pages: bool = False
) -> KVTransform:
    """Keeps the KV caches of a model compressed.

    Args:
      rules: a method for every cache (see `stowax.recipes`), or patterns with a method each, None to keep:
        ``{"layers/0/": None, "": sx.recipes.kv4()}``. A pattern is a regular expression searched in the path that
        the leaves of an attention's cache have in common (``layers/0/k+v``); the first one found decides.
      private_pages: that pages of a paged pool belong to one row of the batch each, and are empty when they go to
        another. Compressed, each row has tokens of its own, so without this promise a pool is an error.

    Returns:
      A transform: ``compress_kv(...)(step, params=0, cache=2)`` is a `Transformed` whose cache argument and result are
      what ``fast.init_cache(shapes)`` gives.

    Raises:
      TypeError: `rules` is no method.

    Example:
      >>> fast = sx.compress_kv(sx.recipes.kivi(bits=2))(step, params=0, cache=2)
      >>> cache = fast.init_cache(jax.eval_shape(lambda: init_cache(1, 32_768)))
      >>> logits, cache = jax.jit(fast)(params, tokens, cache)
    """
    if isinstance(rules, Method):
        rules = {"": rules}
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"`rules` is {type(rules).__name__}; expected a recipe such as `sx.recipes.kivi(bits=2)`, or a mapping of "
            "patterns to recipes"
        )
    for pattern, method in rules.items():
        if not isinstance(method, (Method, type(None))):
            raise TypeError(
                f"`rules[{pattern!r}]` is {type(method).__name__}; expected a recipe or None"
            )
    check_patterns(rules)
    told = lambda m: m and dataclasses.replace(m, private_pages=m.private_pages or private_pages)
    return KVTransform(tuple((pattern, told(method)) for pattern, method in rules.items()))
