"""A plan: what becomes of the values that a program carries over; applied, shown, and written down."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from stowax.memory_planner import device as device_of
from stowax.memory_planner import format_bytes, gap_of
from stowax.pallas_kernels import codecs

from ..core.program import path_string
from ..report import text_table
from . import rewrite
from .flat import Flat, flatten
from .formats import Format, Roles, composed, converted
from .memory import HOST, host_type
from .residuals import Numbers, Place, numbers, places
from .timeline import Band, Box


@dataclasses.dataclass(frozen=True)
class Kept:
    """A value that is carried over.

    Attributes:
      name: the place, the number of the equation there, and its primitive.
      what: dtype and shape (of one layer, where a scan stacks it).
      how: "keep", "offload" or "encode".
      nbytes: before it is encoded, of all layers.
    """

    name: str
    what: str
    how: str
    nbytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What becomes of the values that a program carries from its first half to its second.

    Attributes:
      device: for which device.
      budget: bytes of device memory, all that the program needs; None for a named baseline.
      strategy: "optimal", or the name of a baseline.
      kept: what is carried over; everything else that is needed later is made again.
      again: names of what is made again.
      before, after: predicted peak of the program as it is and by the plan, bytes.
      seconds: of recomputation, traffic of what is kept, and transfers that are not hidden; what is made least.
      bound: no choice within the same bytes for what is kept takes less.
      step_before, step_after: seconds of one run by the device's peak rates; see `Prediction.seconds`.
      host: bytes of host memory that are used.
      codec: of encoded values; "" where there are none.
      fingerprint: of the program; `apply` takes no other.
      timelines: bytes over the operations by tensor, before and after.
      boxes: where the largest temporaries can lie, after.
      accuracy: how far off predictions are for this device, in words.
      measured: peak of the compiled program, bytes; None where it was not compiled.
      formats: of weights and caches, where some were allowed.
      roles: which arguments hold these; None without formats.
      streamed: arguments that live on the host and are fetched part by part, by path; see `place`.
    """

    device: str
    budget: int | None
    strategy: str
    kept: tuple[Kept, ...]
    again: tuple[str, ...]
    before: int
    after: int
    seconds: float
    bound: float
    step_before: float
    step_after: float
    host: int
    codec: str
    fingerprint: str
    timelines: tuple[tuple[Band, ...], tuple[Band, ...]] = ((), ())
    boxes: tuple[Box, ...] = ()
    accuracy: str = ""
    measured: int | None = None
    streamed: tuple[str, ...] = ()
    formats: tuple[Format, ...] = ()
    roles: Roles | None = None

    @property
    def peak(self) -> int:
        """Bytes of device memory: the compiler's figure where there is one, else what is predicted."""
        return self.after if self.measured is None else self.measured

    @property
    def correction(self) -> float:
        """The compiler's peak as a share of what was predicted; 1 where it was not compiled."""
        return self.peak / self.after if self.after else 1.0

    @property
    def gap(self) -> float:
        """How far `seconds` can be from the least, as a share."""
        return gap_of(self.seconds, self.bound)

    def apply(self, fn: Callable[..., Any]) -> Planned:
        """The function that obeys the plan: operations and results are `fn`'s where nothing is encoded.

        `fn` is the function that was planned, called with arguments of the same shapes. What comes out is an ordinary
        function for `jax.jit`; it is not to be differentiated (plan the gradient, or use `remat`).
        """
        return Planned(self, fn)

    def place(self, *args: Any) -> tuple[Any, ...]:
        """The arguments with those that the plan streams in host memory. Once; then `apply` takes them."""
        return self.placed(args, lambda x: jax.device_put(x, HOST))

    def placed(self, args: tuple[Any, ...], move: Callable[[Any], Any]) -> tuple[Any, ...]:
        """The arguments, `move` applied to those that are streamed."""
        there = lambda path, x: move(x) if path_string(path) in self.streamed else x
        return jax.tree_util.tree_map_with_path(there, args)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError where the text is none."""
        try:
            fields = json.loads(text)
            fields["kept"] = tuple(Kept(**k) for k in fields["kept"])
            fields["again"], fields["streamed"] = tuple(fields["again"]), tuple(fields["streamed"])
            band = lambda b: Band(b["name"], tuple(b["nbytes"]))
            fields["timelines"] = tuple(tuple(map(band, line)) for line in fields["timelines"])
            fields["boxes"] = tuple(Box(**b) for b in fields["boxes"])
            fields["formats"] = tuple(Format(**f) for f in fields["formats"])
            fields["roles"] = None if fields["roles"] is None else Roles(**fields["roles"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`text` is no plan ({error}); expected what `to_json` gives"
            ) from None

    def save_picture(self, path: str | Path) -> None:
        """Bytes over time by tensor, before and after, and offsets; SVG or PNG by the ending of `path`."""
        from .picture import draw

        draw(self, Path(path))

    def _repr_html_(self) -> str:
        from .picture import html

        return html(self)

    def __repr__(self) -> str:
        return str(self)

    @property
    def evidence(self) -> str:
        """What the peak rests on, in words."""
        if self.measured is None:
            return (
                f"the peak is predicted, not compiled ({self.accuracy}); where {self.device} is, `measure=True` keeps "
                "to the budget as compiled"
            )
        return f"the peak is the compiler's; {format_bytes(self.after)} were predicted (x {self.correction:.3f})"

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" of {format_bytes(self.budget)}"
        lines = [
            f"{self.strategy} plan for {self.device}: peak {format_bytes(self.before)} -> {format_bytes(self.peak)}"
            f"{budget}, a step {1e3 * self.step_before:.2f} -> {1e3 * self.step_after:.2f} ms at peak rates",
            self.evidence,
            f"keeping and making again: {1e3 * self.seconds:.3f} ms, no less than {1e3 * self.bound:.3f}"
            f" (gap {self.gap:.1%})",
        ]
        kept = sorted(self.kept, key=lambda k: (k.how, -k.nbytes))
        rows = [(k.name, k.what, k.how, format_bytes(k.nbytes)) for k in kept]
        if rows:
            lines += ["", text_table(("value", "what", "how", "bytes"), rows)]
        lines.append(
            f"\n{len(self.again)} operations run again; {format_bytes(self.host)} on the host"
        )
        if self.formats:
            stored = [
                (f.kind, f.name, f.how, *map(format_bytes, (f.before, f.nbytes, f.host)))
                for f in self.formats
            ]
            header = ("what", "name", "stored", "before", "device", "host")
            lines += ["", text_table(header, stored)]
        if self.streamed:
            lines.append(
                f"on the host, fetched part by part (see `place`): {', '.join(self.streamed)}"
            )
        return "\n".join(lines)


class Planned:
    """A function by a plan; see `Plan.apply`."""

    def __init__(self, plan: Plan, fn: Callable[..., Any]):
        self.plan = plan
        self.fn = fn if plan.roles is None else composed(fn, plan.formats, plan.roles)
        functools.update_wrapper(self, fn, updated=())

    def prepare(self, *args: Any) -> tuple[Any, ...]:
        """The arguments of a call as the plan has them: weights packed, caches of their recipes and empty, in place.

        For the first call. The cache that is given may be shapes; shapes of weights give shapes.
        """
        args = args if self.plan.roles is None else converted(self.fn, args, self.plan.roles)
        shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
        return self.plan.placed(args, host_type) if shapes else self.plan.place(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = flatten(self.fn, args, kwargs)
        if flat.fingerprint != self.plan.fingerprint:
            raise ValueError(
                f"the plan was made for another program ({self.plan.fingerprint}; this is {flat.fingerprint}): other "
                "shapes, or another function. Plan it again with `sx.plan`."
            )
        leaves = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "shape")]
        return jax.tree.unflatten(flat.out_tree, execute(flat, self.plan, leaves))


def execute(flat: Flat, plan: Plan, leaves: Sequence[Any]) -> list[Any]:
    """The results of a flat program by a plan."""
    found = places(flat)
    how = {k.name: k.how for k in plan.kept}
    labels = numbers(found, device_of("cpu"))  # only names are asked for
    decisions = decided(found, labels, {i: how[n] for i, n in enumerate(labels.names) if n in how})
    return rewrite.run(flat, decisions, codecs.get(plan.codec) if plan.codec else None, leaves)


def decided(
    found: Sequence[Place], labels: Numbers, how: Mapping[int, str]
) -> list[rewrite.Decisions]:
    """A choice, by number of the value, as decisions for each place."""
    own: list[dict[Any, str]] = [{} for _ in found]
    for i, word in how.items():
        place, var = labels.variables[i]
        own[place][var] = word
    return [rewrite.Decisions(place, how) for place, how in zip(found, own)]
