"""Low-bit weights: ``sx.quantize("int4-g64")(fn, params=0)``.

In goes a function of float weights, out comes the function of packed weights. Everything else of the program is
preserved: control flow, custom rules, names, dtypes.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Mapping, Sequence

from stowax.pallas_kernels import codecs
from stowax.pallas_kernels.codecs import Codec

from . import solvers
from .rules import check_patterns
from .solvers import Solver
from .transform import Applicable, Claim, Leaf

Spec = str | Codec | None
Rules = tuple[tuple[str, Codec | None], ...]


@dataclasses.dataclass(frozen=True)
class Quantize(Applicable):
    """See `quantize`.

    Attributes:
      rules: pattern and codec; the first pattern found in a leaf's path decides.
      solver: what picks the codes.
    """

    rules: Rules
    solver: Solver

    def __repr__(self) -> str:
        rules = ", ".join(f"{p or 'all'}: {c.name if c else 'keep'}" for p, c in self.rules)
        return f"quantize({rules}, solver={self.solver.name})"

    def claim(self, leaves: Sequence[Leaf], strict: bool) -> dict[str, Claim]:
        claims: dict[str, Claim] = {}
        used: set[str] = set()
        for leaf in leaves:
            for pattern, codec in self.rules:
                if not re.search(pattern, leaf.name):
                    continue
                storage = leaf.storage()
                if codec is None or storage is not None:
                    used.add(pattern)
                    claims[leaf.name] = Claim(codec, self.solver, storage)
                break
        unused = [pattern for pattern, _ in self.rules if pattern not in used]
        if unused:
            _report_unused(unused, leaves, strict)
        return claims


def quantize(
    rules: Spec | Mapping[str, Spec] | Sequence[tuple[str, Spec]], *, solver: str | Solver = "round"
) -> Quantize:
    """Stores weights by codecs.

    Args:
      rules: a codec for every weight (``"int4-g64"``; see `stowax.pallas_kernels.codecs.names`), or
        patterns with a codec each, None to keep: ``{"embed": None, "mlp": "int4-g64", "": "int8"}``. A pattern is
        a regular expression searched in the leaf's path (``layers/mlp/up/weight``); the first one found decides.
      solver: "round", "clip", "hqq", or a solver such as ``sx.gptq(calibration)``.

    Returns:
      A transform: ``quantize(...)(fn, params=0)`` is a `Transformed`.

    Raises:
      ValueError: an unknown codec or solver; when applied, a pattern that takes no weight.

    Example:
      >>> fast = sx.quantize("w4g64")(fn, params=0)
      >>> encoded = fast.encode(params, x)
      >>> y = jax.jit(fast)(encoded, x)
    """
    if rules is None or isinstance(rules, (str, Codec)):
        rules = {"": rules}
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    table = tuple((pattern, None if c is None else codecs.get(c)) for pattern, c in pairs)
    check_patterns(pattern for pattern, _ in table)
    return Quantize(table, solvers.get(solver))


def _report_unused(unused: list[str], leaves: Sequence[Leaf], strict: bool) -> None:
    names = [leaf.name for leaf in leaves if leaf.storage() is not None]
    near = difflib.get_close_matches(unused[0], names, n=3, cutoff=0.2) or names[:3]
    message = (
        f"`rules` has patterns that take no weight: {unused}. Weights here are, for example, "
        f"{near} ({len(names)} in all, of {len(leaves)} leaves)."
    )
    found = [leaf for leaf in leaves if re.search(unused[0], leaf.name) and leaf.uses]
    if found:
        message += f" {unused[0]!r} is found in {found[0].name!r}, which is {found[0].reason()}."
    if strict:
        raise ValueError(message + " Mend the pattern, or pass `strict=False`.")
    warnings.warn(message, stacklevel=4)
