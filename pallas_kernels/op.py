"""An operation that has an implementation of its own on some platforms, chosen when a program is lowered.

A program that holds one is traced once for all platforms. Kernels are traced where they are used, so a program for the
CPU costs nothing more, and an exported program picks for each platform that it is exported for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Implementation = Callable[..., Any]  # of a pytree of operands, and static options


class Op:
    """``op(operands, **options)``: `default`, or what `on` has for the platform.

    Args:
      name: of the primitive.
      default: works everywhere; the shape of its result is the operation's.
      on: by platform ("cuda", "tpu"), None or another implementation.
      batch: the rule for `jax.vmap`: ``(op, size, operands, is_batched, options) -> result``, its new axis in front.
      stable: whether kernels are kept in exported programs; else those hold `default`.
      context: a context in which kernels are lowered.
      partitioned: False for what would spread over the devices of the program by itself: they are not known where an
        operation is lowered, so that it is lowered as for one.

    Options are hashable. The gradient is that of `default`.
    """

    def __init__(
        self,
        name: str,
        default: Implementation,
        on: dict[str, Implementation],
        batch: Callable[..., Any],
        *,
        stable: bool = True,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        partitioned: bool = True,
    ):
        self.name, self.default, self.batch = name, default, batch
        self.stable, self.context, self.partitioned = stable, context, partitioned
        self.primitive = p = Primitive(name)
        p.multiple_results = True
        p.def_abstract_eval(self._abstract)
        p.def_impl(self._eager)
        batching.primitive_batchers[p] = self._batched
        mlir.register_lowering(p, self._lowering(default, None))
        for platform, implementation in on.items():
            rule = self._lowering(implementation, platform)
            mlir.register_lowering(p, rule, platform=platform)

    def __call__(self, operands: Any, **options: Any) -> Any:
        bind = functools.partial(self._bind, **options)
        default = functools.partial(self.default, **options)
        call = jax.custom_jvp(bind)
        call.defjvp(lambda x, dx: (bind(*x), jax.jvp(default, x, dx)[1]))
        return call(operands)

    def _bind(self, operands: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        out = self.primitive.bind(*leaves, tree=tree, options=tuple(sorted(options.items())))
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        structure = jax.tree.structure(self._result(shapes, tree, tuple(sorted(options.items()))))
        return jax.tree.unflatten(structure, out)

    def _abstract(self, *leaves: Any, tree: Any, options: Any) -> list[Any]:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        out, like = self._result(shapes, tree, options), leaves[0]
        return [
            like.update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in jax.tree.leaves(out)
        ]

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (operations live as long as the program)
    def _result(self, shapes: tuple[Any, ...], tree: Any, options: Any) -> Any:
        """Shapes of the result."""
        run = functools.partial(self.default, **dict(options))
        return jax.eval_shape(run, jax.tree.unflatten(tree, shapes))

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _jitted(self, tree: Any, options: Any) -> Any:
        return jax.jit(functools.partial(self.primitive.bind, tree=tree, options=options))

    def _eager(self, *leaves: Any, tree: Any, options: Any) -> list[jax.Array]:
        """Compiled once for equal operands, not at each call."""
        return self._jitted(tree, options)(*leaves)

    def _batched(
        self, leaves: Sequence[Any], dims: Sequence[Any], *, tree: Any, options: Any
    ) -> tuple[list[jax.Array], list[int]]:
        front = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims)]
        is_batched = [d is not None for d in dims]
        size = next(x.shape[0] for x, b in zip(front, is_batched) if b)
        unflatten = functools.partial(jax.tree.unflatten, tree)
        bind = functools.partial(self._bind, **dict(options))
        out = jax.tree.leaves(self.batch(bind, size, unflatten(front), unflatten(is_batched)))
        return out, [0] * len(out)

    def _lowering(self, implementation: Implementation, platform: str | None) -> Any:
        def run(*leaves: Any, tree: Any, options: Any) -> list[jax.Array]:
            out = implementation(jax.tree.unflatten(tree, leaves), **dict(options))
            return jax.tree.leaves(out)

        lower = mlir.lower_fun(run, multiple_results=True)
        if platform is None:
            return lower
        plain = self._lowering(self.default, None)

        def rule(ctx: Any, *args: Any, **params: Any) -> Any:
            module = ctx.module_context
            if module.lowering_parameters.for_export and not self.stable:
                return plain(ctx, *args, **params)
            # Mosaic GPU refuses modules for several platforms; what is lowered here is for one.
            module = module.replace(platforms=(platform,))
            if not self.partitioned:
                module = module.replace(axis_context=_of_one_device(module.axis_context))
            with self.context():
                return lower(ctx.replace(module_context=module), *args, **params)

        return rule


def _of_one_device(context: Any) -> Any:
    if not hasattr(context, "device_assignment"):  # inside `shard_map`
        return context
    one = (jax.devices()[0],)
    return dataclasses.replace(context, num_devices=1, device_assignment=one, abstract_mesh=None)


def one_by_one(call: Any, size: int, operands: Any, is_batched: Any) -> Any:
    """A batching rule: a loop over the entries of the batched operands."""
    leaves, tree = jax.tree.flatten(operands)
    flags = jax.tree.leaves(is_batched)
    rows = [x for x, b in zip(leaves, flags) if b]

    def entry(row: Any) -> Any:
        rest = iter(row)
        return call(
            jax.tree.unflatten(tree, [next(rest) if b else x for x, b in zip(leaves, flags)])
        )

    return jax.lax.map(entry, rows)
