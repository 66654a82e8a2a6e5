"""Predicts the peak memory of a program from its jaxpr, before anything is compiled.

The rules are those of XLA's compilers for TPU and GPU: simplify, decide what is written to memory (`fusion`), put it in
order (`schedule`), and see what is alive together (`liveness`). Compilers change, so a prediction can be corrected by
one measurement, and the correction be carried over to variants of the program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from .cost import seconds
from .devices import Device, device
from .graph import HOST, Graph, Value, trace
from .liveness import Span, donations, lifetimes, totals
from .packing import Buffer, pack
from .report import MemoryReport, format_bytes
from .rules import Rules, rules_for
from .simplify import simplify


@dataclasses.dataclass(frozen=True)
class Moment:
    """A point of a program's timeline: an operation that writes, and the bytes alive with it, arguments included."""

    op: str
    scope: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted memory of a program on one device, in bytes.

    Attributes:
      device: for which device.
      arguments: device buffers that the caller passes in.
      outputs: device buffers that the program returns, those in donated arguments left out.
      buffers: the temporaries: name, bytes, lifespan in moments of the timeline.
      operations: for each moment, the operation and its name scopes.
      correction: factor on the temporaries, from a measurement; 1 without one.
      seconds: of one run by the device's peak rates, what is fused moving no bytes: a floor that programs reach to a
        share, so that plans compare.
      rules: where the compiler's rules come from.
    """

    device: Device
    arguments: int
    outputs: int
    buffers: tuple[Span, ...]
    operations: tuple[tuple[str, str], ...]
    correction: float
    seconds: float
    rules: str

    @property
    def temporaries(self) -> int:
        """The most bytes that temporaries take at once."""
        return round(self.correction * max(self._totals, default=0))

    @property
    def peak(self) -> int:
        """Device bytes needed at once: arguments + outputs outside of them + temporaries."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device has so much memory."""
        return self.peak <= self.device.hbm_bytes

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """Bytes over program order. The body of a loop stands once in its place."""
        base = self.arguments + self.outputs
        return tuple(
            Moment(op, scope, base + round(self.correction * total))
            for (op, scope), total in zip(self.operations, self._totals)
        )

    @property
    def at_peak(self) -> tuple[Span, ...]:
        """The temporaries alive at the peak, the largest first."""
        if not self._totals:
            return ()
        step = self._totals.index(max(self._totals))
        alive = [b for b in self.buffers if b.start <= step < b.end and b.nbytes]
        return tuple(sorted(alive, key=lambda buffer: -buffer.nbytes))

    def offsets(self, capacity: int | None = None, *, time_limit: float = 10.0) -> tuple[int, ...]:
        """Where each of `buffers` can lie so that all fit: a proof that the peak is not lost to gaps.

        Args:
          capacity: bytes for them; None is what the device has beside arguments and outputs.
          time_limit: seconds of search, where greedy packing is not enough.

        Returns:
          An offset for each buffer, in bytes; 0 for an empty one.

        Raises:
          PackingError: it is proven that there is no packing, and which buffers are enough for that.
          PackingTimeout: neither was found in time.
        """
        if capacity is None:
            capacity = self.device.hbm_bytes - self.arguments - self.outputs
        own = [i for i, b in enumerate(self.buffers) if b.nbytes and b.end > b.start]
        spans = [self.buffers[i] for i in own]
        items = [Buffer(i, s.start, s.end, s.nbytes) for i, s in zip(own, spans)]
        found = dict(zip(own, pack(items, max(1, capacity), time_limit=time_limit)))
        return tuple(found.get(i, 0) for i in range(len(self.buffers)))

    def corrected(self, measured: MemoryReport | int) -> Prediction:
        """This prediction with its temporaries scaled to a measured peak.

        For variants of the program (another remat policy, another batch) pass on the factor:
        ``predict(variant, ..., correction=prediction.corrected(report).correction)``.

        Args:
          measured: `memory_report` of the compiled program, or its peak in bytes.

        Raises:
          ValueError: less was measured than arguments and outputs take, so it is another program.
        """
        peak = measured.peak if isinstance(measured, MemoryReport) else measured
        temporaries, predicted = peak - self.arguments - self.outputs, max(self._totals, default=0)
        if temporaries < 0:
            raise ValueError(
                f"`measured` has a peak of {format_bytes(peak)}, but arguments and outputs alone take"
                f" {format_bytes(self.arguments + self.outputs)}: measure the same program."
            )
        return dataclasses.replace(self, correction=temporaries / predicted if predicted else 1.0)

    @functools.cached_property
    def _totals(self) -> list[int]:
        return totals(self.buffers, len(self.operations))

    def __str__(self) -> str:
        share = f"{self.peak / self.device.hbm_bytes:.0%} of {self.device.name}"
        rows = [
            ("arguments", self.arguments, ""),
            ("outputs", self.outputs, "outside donated arguments"),
            ("temporaries", self.temporaries, ""),
            ("peak", self.peak, share),
        ]
        rows += [(f"  {b.name}", b.nbytes, _kind(b.value)) for b in self.at_peak[:8]]
        left = max(len(name) for name, _, _ in rows)
        right = max(len(format_bytes(size)) for _, size, _ in rows)
        lines = [f"{n:<{left}}  {format_bytes(size):>{right}}  {what}" for n, size, what in rows]
        return "\n".join(line.rstrip() for line in lines)


def predict(
    fn: Callable[..., Any] | Any,
    *args: Any,
    donate: int | Sequence[int] = (),
    device: str | Device = "v5e",
    rules: Rules | None = None,
    correction: float = 1.0,
) -> Prediction:
    """Predicts what XLA will need to run a function.

    Args:
      fn: a function of arrays; a closed jaxpr, and then `args` are left out; or a `Graph`.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      donate: numbers of the donated arguments.
      device: name or `Device`; its backend chooses the compiler's rules.
      rules: other rules than the backend's.
      correction: factor on the temporaries, from `Prediction.corrected`.

    Raises:
      ValueError: unknown device, or `donate` names an argument that isn't there.
      NotImplementedError: the program has a higher-order primitive that the planner can't look into.

    Example:
      >>> predict(lambda x: x @ x, jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)).peak
      4194304
    """
    target = _device(device)
    rules = rules or rules_for(target.backend)
    graph = fn if isinstance(fn, Graph) else trace(fn, *args, donate=donate)
    if rules.fuses:
        block = simplify(graph, rules)
        graph = dataclasses.replace(graph, ops=block.ops, outputs=block.outputs)
    lives = lifetimes(graph, rules)
    inside = donations(graph)
    blocks = [graph, *(block for op in graph.walk() for block in op.blocks)]
    written = {span.value for span in lives.spans}
    written |= {v for block in blocks for v in (*block.inputs, *block.outputs)}
    return Prediction(
        device=target,
        arguments=_nbytes(graph.inputs),
        outputs=_nbytes(graph.outputs) - _nbytes(inside),
        buffers=lives.spans,
        operations=tuple((op.name, op.scope) for op in lives.ops),
        correction=correction,
        seconds=seconds(graph, target, written),
        rules=rules.source,
    )


def _device(name: str | Device) -> Device:
    return name if isinstance(name, Device) else device(name)


def _nbytes(values: Any) -> int:
    return sum(v.nbytes for v in values if v.space != HOST)


def _kind(value: Value) -> str:
    return repr(value).rpartition(":")[2]
