"""Every notebook runs from top to bottom."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path, monkeypatch, load_once):
    monkeypatch.setattr("stowax.models.load", load_once)
    monkeypatch.setattr("treescope.basic_interactive_setup", lambda **options: None)
    cells = json.loads(path.read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert names


def test_there_are_some():
    assert NOTEBOOKS
