"""Imports run downhill: which room may know which, and what a room's door may hold."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# room -> the other rooms that it may import. `facade` stands for the names of `stowax` itself.
ALLOWED = {
    "pallas_kernels": set(),
    "memory_planner": set(),
    "models": set(),
    "transforms": {"pallas_kernels", "memory_planner"},
    "experiments": {"transforms", "pallas_kernels", "memory_planner", "models", "facade"},
    "stowax": {"transforms", "pallas_kernels", "memory_planner", "models"},
}
ROOMS = [room for room in ALLOWED if room != "stowax"]

FILES = [
    pytest.param(room, path, id=str(path.relative_to(ROOT)))
    for room in ALLOWED
    for path in sorted((ROOT / room).glob("*.py" if room == "stowax" else "**/*.py"))
]


def imported_modules(source: str, package: str) -> set[str]:
    """Full dotted names of all that `source`, a module of `package`, imports anywhere in it.

    `from a import b` gives `a.b`: whether b is a module or a name makes no difference here.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *base.split(".")] if base else parents)
            names |= {f"{base}.{alias.name}".strip(".") for alias in node.names}
    return names


def package_of(room: str, path: pathlib.Path) -> str:
    folders = path.parent.relative_to(ROOT / room).parts
    return ".".join(["stowax", *([] if room == "stowax" else [room]), *folders])


def complaint(room: str, name: str) -> str | None:
    """Why a module of `room` may not import `name`, or None when it may."""
    top, *rest = name.split(".")
    if top in ROOMS:
        return f"{name}: write stowax.{name}"
    if top == "absl" and rest and rest[0] in ("flags", "app") and room != "experiments":
        return f"{name}: flags are read in experiments only"
    if top != "stowax":
        return None
    target = rest[0] if rest and rest[0] in ROOMS else "facade"
    if target == room or (room, target) == ("stowax", "facade"):
        return None
    if target not in ALLOWED[room]:
        return f"{name}: {room} may import {sorted(ALLOWED[room]) or 'no other room'}"
    private = [part for part in rest if part.startswith("_") and not part.startswith("__")]
    return f"{name}: {private[0]} is private to {target}" if private else None


@pytest.mark.parametrize(("room", "path"), FILES)
def test_imports_run_downhill(room, path):
    names = imported_modules(path.read_text(), package_of(room, path))
    assert not [text for name in sorted(names) if (text := complaint(room, name))]


@pytest.mark.parametrize("door", [*ROOMS, "stowax"])
def test_a_door_only_reexports(door):
    path = ROOT / door / "__init__.py"
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module), f"{path}: say in one line what the room holds"
    for node in module.body[1:]:
        constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__")
        assert constant or isinstance(node, ast.Import | ast.ImportFrom), (
            f"{path}:{node.lineno}: `{ast.unparse(node)[:60]}` belongs in a module of its own"
        )


@pytest.mark.parametrize("room", ROOMS)
def test_the_facade_links_to_the_room(room):
    link = ROOT / "stowax" / room
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{room}"


@pytest.mark.parametrize(
    ("room", "source", "ok"),
    [
        ("transforms", "from stowax.pallas_kernels import codecs", True),
        ("transforms", "from .solvers import table", True),
        ("transforms", "import jax, numpy", True),
        ("transforms", "from stowax.models import llama", False),
        ("transforms", "import stowax as sx", False),
        ("transforms", "from stowax import quantize", False),
        ("transforms", "from stowax import pallas_kernels", True),
        ("transforms", "from .. import quantize", False),
        ("transforms", "from ..models import llama", False),
        ("transforms", "from stowax.pallas_kernels import _private", False),
        ("transforms", "def f():\n  from models import llama", False),
        ("models", "from stowax import transforms", False),
        ("models", "from absl import flags", False),
        ("experiments", "from absl import app, flags\nimport stowax as sx", True),
        ("stowax", "from stowax.experiments import demo", False),
        ("stowax", "from .transforms import quantize as quantize", True),
    ],
)
def test_the_checker_itself(room, source, ok):
    package = "stowax" if room == "stowax" else f"stowax.{room}"
    complaints = [complaint(room, name) for name in imported_modules(source, package)]
    assert (not any(complaints)) == ok
