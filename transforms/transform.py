"""Transforms: what the user composes, and the function that comes out.

A transform looks at the weights of a program and claims some of them, each with a codec and a solver. `Transformed`
is the original function with the claims of its transforms carried out: `encode` packs the weights offline, one leaf
at a time; calling it rewrites the program and runs it; `explain` says what happened to every leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import Codec, Packed

from . import kv, storage
from .calibrate import calibrate
from .core import Interpreter, Recorder, Use, compat, is_packed, named_leaves, replace_leaves, trace
from .core.program import Program, logical, of_arrays, position, prefixes, select
from .explain import EncodeReport, EncodeRow, Explanation, Row
from .solvers import Solver, solve_storage
from .storage import Storage


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of an argument that holds weights.

    Attributes:
      name: its path, as ``layers/attn/q/weight``.
      value: the array, its shape, or a `Packed`.
      uses: how the program uses it; None where no program was looked at.
    """

    name: str
    value: Any
    uses: tuple[Use, ...] | None

    def storage(self) -> Storage | None:
        """How to store it as a weight; None if it is not one."""
        if not _is_float(self.value):
            return None
        if self.uses is None:
            return storage.from_name(self.name, self.value.ndim)
        return storage.from_uses(self.value.ndim, self.uses)

    def reason(self) -> str:
        """Why it is kept, where it is not a weight."""
        if not _is_float(self.value):
            return f"no weight: its dtype is {self.value.dtype.name}"
        why = lambda use: f" ({use.reason})" if use.kind == "other" and use.reason else ""
        words = [use.op + why(use) for use in self.uses or ()]
        return f"no weight: used by {', '.join(dict.fromkeys(words)) or 'nothing'}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a transform does with a leaf: `codec` None keeps it as it is."""

    codec: Codec | None
    solver: Solver
    storage: Storage | None = None


class Transform(Protocol):
    """A function transform: what `quantize` and `chain` give."""

    def claim(self, leaves: Sequence[Leaf], strict: bool) -> dict[str, Claim]:
        """The leaves that this transform takes, by name. Raises ValueError for rules without a leaf."""
        ...

    def __call__(
        self,
        fn: Callable[..., Any],
        *,
        params: int | str | Sequence[int | str] = 0,
        cache: int | str | Sequence[int | str] = (),
        strict: bool = True,
    ) -> Transformed:
        """The function with this transform applied; see `Transformed`."""
        ...


class Applicable:
    """Gives a transform its ``transform(fn, params=0, cache=2)``."""

    def __call__(
        self: Any,
        fn: Callable[..., Any],
        *,
        params: int | str | Sequence[int | str] = 0,
        cache: int | str | Sequence[int | str] = (),
        strict: bool = True,
    ) -> Transformed:
        """Applies the transform to `fn`.

        Args:
          fn: any JAX function; it is traced, never patched.
          params: position or name of the argument that holds the weights, or several of them.
          cache: the same for KV caches; needed where a transform compresses them.
          strict: rules that match nothing, and constructs that can't be rewritten, are errors.
        """
        if kv_rules(self) and cache == ():
            raise ValueError(
                "`cache` is not given: say which argument holds the KV cache, as in "
                f"`{type(self).__name__.lower()}(...)(step, params=0, cache=2)`"
            )
        roles = lambda keys: (keys,) if isinstance(keys, (int, str)) else tuple(keys)
        return Transformed(fn, self, roles(params), strict, roles(cache))


class Transformed:
    """A function whose weights are stored by a plan. Call it, jit it, differentiate it, export it.

    Attributes:
      fn: the original function.
      transform: what is applied to it.
      params: which arguments hold weights.
      cache: which arguments hold KV caches.
      report: what the last `encode` did to each leaf, with its errors; None before.
    """

    def __init__(
        self,
        fn: Any,
        transform: Transform,
        params: tuple[int | str, ...],
        strict: bool,
        cache: tuple[int | str, ...] = (),
    ):
        if not callable(fn):
            raise TypeError(
                f"`fn` must be a function; got {type(fn).__name__}. Wrap a Flax module with sx.flax."
            )
        functools.update_wrapper(self, fn, updated=())
        self.fn, self.transform, self.params, self.strict = fn, transform, params, strict
        self.cache = cache
        self.report: EncodeReport | None = None

    def __repr__(self) -> str:
        return f"{self.transform}({getattr(self.fn, '__name__', self.fn)}, params={self.params})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function on encoded weights."""
        program = self._trace(args, kwargs)
        self._check_encoded(program)
        if any(is_packed(leaf) and leaf.guessed for leaf in program.leaves):
            self._check_guesses(program)
        try:
            if kv_rules(self.transform) is not None:
                out = kv.run(program, kv_rules(self.transform), self.strict)
            else:
                run = Interpreter(strict=self.strict)
                out = run.run_arrays(None, program.jaxpr, program.leaves)
        except NotImplementedError:
            _analyse(program, strict=self.strict)  # says the same, with the names of the weights
            raise
        return jax.tree_util.tree_unflatten(program.out_tree, out)

    def _trace(self, args: Any, kwargs: Any) -> Program:
        return trace(self.fn, args, kwargs, self.params, self.cache)

    def init_cache(self, cache: Any, *args: Any, **kwargs: Any) -> Any:
        """The compressed cache in the place of the model's own, empty.

        ``init_cache(cache)`` goes by names and shapes; the first call lays it out anew where the program does not
        agree. ``init_cache(cache, *rest)``, with the other arguments of a call (arrays or shapes), reads the layout
        from the program, and leaves what is no cache of an attention as it is.

        Args:
          cache: the model's own empty cache, as arrays or ``jax.ShapeDtypeStruct`` (nothing of its size is
            allocated); leaves other than keys and values are kept, or zeros.

        Returns:
          The same pytree with a `KVState` for the first leaf of each attention's cache and `Moved` for the others.
        """
        rules = kv_rules(self.transform)
        if rules is None:
            raise ValueError(f"{self!r} compresses no cache; add `sx.compress_kv(recipe)`")
        if not args and not kwargs:
            return kv.guess(cache, rules)
        args = self._with_cache(cache, args)
        program = self._trace(args, kwargs)
        return kv.init(cache, program, rules, self.strict)

    def _with_cache(self, cache: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of a call, the cache among them."""
        if len(self.cache) != 1:
            raise ValueError(f"`cache` names {len(self.cache)} arguments: pass shapes of one cache")
        at = position(self.fn, self.cache[0])
        if not isinstance(at, int):
            raise ValueError(f"`cache` {at!r} is a keyword: give `compress_kv` its position")
        at %= len(args) + 1
        return (*args[:at], cache, *args[at:])

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Packs the weights, one leaf at a time.

        ``encode(params)`` packs by convention: names and ranks of leaves say which are weights and which axes
        are contracted. ``encode(params, *rest)``, with the other arguments of a call (arrays or shapes), reads
        that from the program instead; it is what a calibrated solver does by itself with its calibration data.

        Returns:
          The argument that holds the weights, its leaves replaced by `Packed` where claimed (a tuple, if there are
          several such arguments). `report` has the errors of each leaf.

        Raises:
          ValueError: a rule that matches nothing, a weight with NaN or infinity, both by path.
        """
        weights = self._weights(args, kwargs)
        calibration = self._calibration()
        if calibration is not None:
            batches = [_with_rest(weights, kwargs, batch) for batch in calibration]
            weights = self._weights(batches[0], kwargs)
            leaves = _analyse(self._trace(batches[0], kwargs))
        elif _is_whole_call(self.fn, args, kwargs, len(weights)):
            leaves = _analyse(self._trace(args, kwargs))
        else:
            leaves = _by_name(weights)
        claims = self.transform.claim(leaves, self.strict)
        solved: dict[str, Any] = {}
        if calibration is not None:
            solved = calibrate(self.fn, batches, kwargs, self.params, claims)
        rows: list[EncodeRow] = []
        encoded = _encode_leaves(leaves, claims, solved, rows)
        self.report = EncodeReport(rows)
        prefix = prefixes(weights)
        trees = [replace_leaves(tree, encoded, prefix[key]) for key, tree in weights.items()]
        return trees[0] if len(trees) == 1 else tuple(trees)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What is done to every leaf in this call: codec, bytes, kernel at each use, or why not.

        Takes the arguments of a call, with encoded or plain weights, as arrays or shapes.
        """
        program = self._trace(args, kwargs)
        leaves = _analyse(program)
        plain = [leaf for leaf in leaves if not is_packed(leaf.value)]
        claims = self.transform.claim(plain, False) if len(plain) == len(leaves) else {}
        rows = [_explain_row(leaf, claims.get(leaf.name)) for leaf in leaves]
        rules = kv_rules(self.transform)
        return Explanation(rows, None if rules is None else kv.explain(program, rules))

    def jaxprs(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The jaxpr of the original function and of the rewritten one, for the same call."""
        program = self._trace(args, kwargs)
        flat, leaves = of_arrays(self, args, kwargs)
        return program.jaxpr, jax.make_jaxpr(flat)(*leaves.values())

    def _check_encoded(self, program: Program) -> None:
        plain = [n for n, leaf in zip(program.names, program.leaves) if n and not is_packed(leaf)]
        if not self.strict or not plain or len(plain) < sum(map(bool, program.names)):
            return
        claims = self.transform.claim(_analyse(program), False).values()
        if any(claim.codec is not None for claim in claims):
            raise ValueError(
                f"no leaf of `params` is encoded (first: {plain[0]!r}). Call "
                "`encoded = fast.encode(params, ...)` once and pass `encoded`."
            )

    def _check_guesses(self, program: Program) -> None:
        wrong = [
            leaf
            for leaf in _analyse(program)
            if is_packed(leaf.value) and leaf.value.guessed and leaf.uses
            and not any(use.kind != "other" for use in leaf.uses)
        ]  # fmt: skip
        if not wrong:
            return
        what = "; ".join(f"{leaf.name!r} (used by {_ops(leaf.uses or ())})" for leaf in wrong)
        message = (
            f"encoded by its name, but the program does not use it as a weight: {what}. Pass the call's other "
            "arguments to `encode`, as in `fast.encode(params, x)`, or keep it with a rule `{path: None}`."
        )
        if self.strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)

    def _calibration(self) -> list[Any] | None:
        """The calibration batches of the transform's solvers; they must be one set."""
        sets: list[Any] = [
            getattr(s, "calibration", ()) for s in _solvers(self.transform) if "hessian" in s.needs
        ]
        if not sets:
            return None
        if any([*map(id, other)] != [*map(id, sets[0])] for other in sets):
            raise ValueError(
                "the transforms in this chain have different calibration sets; use one"
            )
        batches = list(sets[0])
        if not batches:
            raise ValueError(
                "`calibration` is empty; give at least one batch of the function's arguments"
            )
        return batches

    def _weights(self, args: Any, kwargs: Any) -> dict[int | str, Any]:
        """The arguments that hold weights, by position or keyword; `args` may be those alone."""
        if not kwargs and len(args) == len(self.params):
            return dict(zip([position(self.fn, key) for key in self.params], args))
        chosen = select(self.fn, args, kwargs, self.params)
        return {key: args[key] if isinstance(key, int) else kwargs[key] for key in chosen}


def kv_rules(transform: Any) -> Any:
    """What a transform does with KV caches; None for nothing. At most one of a chain may say."""
    parts = getattr(transform, "transforms", (transform,))
    found = [part.rules for part in parts if isinstance(part, kv.CompressKV)]
    if len(found) > 1:
        raise ValueError("a chain has two `compress_kv`; give one of them rules for all caches")
    return found[0] if found else None


def _with_rest(weights: Mapping[int | str, Any], kwargs: Any, batch: Any) -> tuple[Any, ...]:
    """A call's positional arguments: the weights, and the others from a calibration batch."""
    batch = batch if isinstance(batch, tuple) else (batch,)
    placed = {key: v for key, v in weights.items() if key not in kwargs}
    total = len(batch) + len(placed)
    placed = {key % total: v for key, v in placed.items() if isinstance(key, int)}
    rest = iter(batch)
    return tuple(placed[i] if i in placed else next(rest) for i in range(total))


def _by_name(weights: Mapping[int | str, Any]) -> list[Leaf]:
    """The leaves with a role where no program was given."""
    prefix = prefixes(weights)
    found = [leaf for key, tree in weights.items() for leaf in named_leaves(tree, prefix[key])]
    return [Leaf(name, value, None) for name, value in found if compat.is_array(value)]


def _is_whole_call(fn: Any, args: Any, kwargs: Any, weights: int) -> bool:
    """Whether there is more than the weights, or the weights are all that `fn` takes."""
    if len(args) + len(kwargs) > weights:
        return True
    try:
        signature = inspect.signature(fn)
        signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return all(p.kind != p.VAR_POSITIONAL for p in signature.parameters.values())


def _solvers(transform: Any) -> Iterator[Solver]:
    for part in getattr(transform, "transforms", (transform,)):
        if (solver := getattr(part, "solver", None)) is not None:
            yield solver


def _analyse(program: Program, strict: bool = False) -> list[Leaf]:
    """The leaves with a role and their uses in the program."""
    recorder = Recorder()
    run = Interpreter(strict=strict, recorder=recorder)
    values = [
        _labelled(leaf, name) if name and _is_float(leaf) else logical(leaf)
        for leaf, name in zip(program.leaves, program.names)
    ]
    jax.eval_shape(lambda vs: run.run_arrays(None, program.jaxpr, vs), values)
    uses: dict[str, list[Use]] = {}
    for use in recorder.uses:
        uses.setdefault(use.name, []).append(use)
    return [
        Leaf(name, leaf, tuple(uses.get(name, ())))
        for name, leaf in zip(program.names, program.leaves)
        if name
    ]


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _labelled(leaf: Any, name: str) -> Any:
    """A leaf that an analysis can follow: itself under its name, all axes still free."""
    if is_packed(leaf):
        return dataclasses.replace(leaf, name=name)
    axes = tuple(range(len(leaf.shape)))
    view = codecs.storage_view(leaf.shape, jnp.dtype(leaf.dtype).name, axes, ())
    whole: Any = jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype)
    return Packed({"values": whole}, codecs.get("f32"), view, name=name)


def _encode_leaves(
    leaves: Sequence[Leaf],
    claims: Mapping[str, Claim],
    solved: Mapping[str, Any],
    rows: list[EncodeRow],
) -> dict[str, Packed]:
    encoded: dict[str, Packed] = {}
    for leaf in leaves:
        claim = claims.get(leaf.name)
        if claim is None or claim.codec is None or is_packed(leaf.value):
            continue
        packed, info = solved.get(leaf.name) or encode_leaf(leaf.name, leaf.value, claim)
        encoded[leaf.name] = packed
        rows.append(EncodeRow.of(leaf, packed, claim.solver.name, info))
    return encoded


def encode_leaf(name: str, value: jax.Array, claim: Claim) -> tuple[Packed, dict[str, Any]]:
    """One leaf, packed by its claim's solver; a shape gives a `Packed` of shapes."""
    assert claim.codec is not None
    assert claim.storage is not None
    lead, inner = claim.storage.lead, claim.storage.inner
    batch_dims = len(claim.storage.batch)
    view = codecs.storage_view(value.shape, jnp.dtype(value.dtype).name, lead, inner)
    if isinstance(value, jax.ShapeDtypeStruct):
        parts: Any = claim.codec.part_shapes(view.storage_shape, batch_dims=batch_dims)
        info: dict[str, Any] = {}
    else:
        codecs.validate(value, name)
        folded = codecs.fold(value, lead, inner)
        solved = solve_storage(claim.solver, folded, claim.codec, batch_dims=batch_dims)
        parts, info = solved.parts, solved.info
    return Packed(parts, claim.codec, view, guessed=claim.storage.guessed), info


def _ops(uses: Sequence[Use]) -> str:
    return ", ".join(sorted({use.op for use in uses})) or "nothing"


def _explain_row(leaf: Leaf, claim: Claim | None) -> Row:
    uses = list(leaf.uses or ())
    if is_packed(leaf.value):
        return Row.of(leaf, leaf.value.codec.name, leaf.value.nbytes, "", uses)
    if claim is not None and claim.codec is not None and claim.storage is not None:
        shape = leaf.value.shape
        view = codecs.storage_view(shape, "float32", claim.storage.lead, claim.storage.inner)
        after = claim.codec.nbytes(view.storage_shape, batch_dims=len(claim.storage.batch))
        return Row.of(leaf, claim.codec.name, after, "not encoded yet", uses)
    if claim is not None:
        kept = "kept by a rule"
    else:
        kept = "no rule takes it" if leaf.storage() is not None else leaf.reason()
    return Row.of(leaf, "", None, kept, uses)
