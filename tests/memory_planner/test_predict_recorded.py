"""Predictions against what compilers were recorded to need, on the table of `docs/memory_planner.md`."""

import json
import statistics
from pathlib import Path

import pytest

from stowax import memory_planner
from stowax.experiments.planner_programs import PROGRAMS

RECORDED = json.loads((Path(__file__).parent / "data" / "peaks.json").read_text())
MIB = 2**20


def errors(device: str) -> dict[str, float]:
    """Of each program, as a share of the peak."""
    found = {}
    for name, (alive, _) in RECORDED[device]["peaks"].items():
        fn, args, donate = PROGRAMS[name].build()
        predicted = memory_planner.predict(fn, *args, donate=donate, device=device).peak
        found[name] = predicted / MIB / alive - 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", ["v5e", "h100"])
def test_the_table_is_as_good_as_the_rules_say(device):
    found = errors(device)
    sizes = sorted(map(abs, found.values()))
    rules = memory_planner.rules_for(memory_planner.device(device).backend)
    assert len(sizes) >= 16
    assert sum(not PROGRAMS[name].tuned for name in found) >= len(sizes) // 2 - 1
    assert statistics.median(sizes) <= rules.median_error + 0.0005
    assert sizes[-1] <= rules.worst_error + 0.0005, found
