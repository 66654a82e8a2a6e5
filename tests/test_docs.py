"""The Python in the pages runs, block after block."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/transforms.md",
    "docs/kernels.md",
    "docs/memory_planner.md",
    "docs/plans.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_in_a_page_runs(page, capsys, monkeypatch, load_once):
    monkeypatch.setattr("stowax.models.load", load_once)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out
