"""Bytes over time by tensor: the largest groups of equal buffers by name, everything else together."""

from __future__ import annotations

import dataclasses

from stowax.memory_planner import PackingError, PackingTimeout, Prediction, Span

NAMED = 6  # groups that are named
_POINTS = 400  # moments of a timeline; of longer programs, of each stretch the fullest
_BOXES = 300


@dataclasses.dataclass(frozen=True)
class Band:
    """The bytes of one group of buffers at each moment."""

    name: str
    nbytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Box:
    """A buffer where it can lie: alive from `start` to `end`, shares of the program, at `offset` bytes."""

    name: str
    start: float
    end: float
    offset: int
    nbytes: int


def bands(prediction: Prediction) -> tuple[Band, ...]:
    """The timeline of a program, arguments and outputs first; the sum of all at a moment is what is alive then."""
    moments = _moments(prediction)
    base = prediction.arguments + prediction.outputs
    total = [prediction.timeline[i].nbytes for i in moments]
    found = [Band("arguments and outputs", (base,) * len(moments))]
    for name in _named(prediction):
        own = [b for b in prediction.buffers if _group(b) == name]
        alive = lambda i, own=own: sum(b.nbytes for b in own if b.start <= i < b.end)
        found.append(Band(name, tuple(round(prediction.correction * alive(i)) for i in moments)))
    sums = map(sum, zip(*(band.nbytes for band in found)))
    found.append(Band("others", tuple(max(0, t - s) for t, s in zip(total, sums))))
    return tuple(found)


def boxes(prediction: Prediction) -> tuple[Box, ...]:
    """The largest temporaries, packed; none where no packing was found."""
    try:
        offsets = prediction.offsets(time_limit=1.0)
    except (PackingError, PackingTimeout):
        return ()
    names, end = _named(prediction), max(1, len(prediction.operations))
    pairs = sorted(zip(prediction.buffers, offsets), key=lambda pair: -pair[0].nbytes)[:_BOXES]
    name = lambda b: _group(b) if _group(b) in names else "others"
    return tuple(
        Box(name(b), b.start / end, b.end / end, o, b.nbytes) for b, o in pairs if b.nbytes
    )


def _moments(prediction: Prediction) -> list[int]:
    line = [moment.nbytes for moment in prediction.timeline]
    step = max(1, -(-len(line) // _POINTS))
    parts = [range(i, min(i + step, len(line))) for i in range(0, len(line), step)]
    return [max(part, key=lambda i: line[i]) for part in parts]


def _named(prediction: Prediction) -> list[str]:
    """The groups that are largest at the peak."""
    sizes: dict[str, int] = {}
    for buffer in prediction.at_peak:
        sizes[_group(buffer)] = sizes.get(_group(buffer), 0) + buffer.nbytes
    return sorted(sizes, key=lambda name: -sizes[name])[:NAMED]


def _group(buffer: Span) -> str:
    """What makes it, and its type: layers are alike."""
    name, _, kind = repr(buffer.value).rpartition(":")
    return f"{name.rpartition('.')[0] or name} {kind}"
