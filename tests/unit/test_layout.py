"""The house: rooms import only from rooms before them, files stay small, torch comes late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qll"
# in the order data walks through them
ROOMS = (
    "errors",
    "_register",
    "callable_room",
    "options",
    "config",
    "store",
    "load",
    "tn",
    "model",
    "runtime",
    "calibrate",
    "train",
    "convert",
    "evaluate",
    "lens",
    "saetrain",
    "bytelm",
    "report",
    "scale",
    "runfolder",
    "runjobs",
    "runtexts",
    "runmodel",
    "runsaes",
    "runplan",
    "needs",
    "pipeline",
    "rungenerate",
    "runbench",
    "saejob",
    "lmjob",
    "api",
    "flags",
    "cli",
)
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 500
MEDIAN_LINES = 150


def room_of(path: Path) -> str:
    """The room of a file: its folder below qll/, or its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            direct = node.module == "qll"
            names = [f"qll.{alias.name}" for alias in node.names] if direct else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("qll.")}
    return found


def test_every_room_is_listed():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in ("__init__", "_register"):
        return  # the package root names public functions lazily, by string
    later = {other for other in imported_rooms(path) if ROOMS.index(other) > ROOMS.index(room)}
    assert not later
    if room == "tn":
        assert imported_rooms(path) <= {"tn", "errors"}


def test_files_stay_small():
    sizes = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {path: size for path, size in sizes.items() if size > MOST_LINES} == {}
    assert sorted(sizes.values())[len(sizes) // 2] <= MEDIAN_LINES


def test_no_relative_or_star_imports_and_no_utils():
    for path in FILES:
        assert path.stem not in ("utils", "misc", "helpers")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                assert all(alias.name != "*" for alias in node.names), path


@pytest.mark.parametrize("code", ["import qll", "from qll import cli; cli.main(['--help'])"])
def test_torch_is_not_imported_before_it_is_needed(code):
    check = f"{code}\nimport sys\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_every_public_name_resolves():
    import qll

    for name in qll.__all__:
        assert getattr(qll, name) is not None
    for verb in ("load", "convert", "evaluate"):
        assert callable(getattr(qll, verb)), verb
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qll.nonsense
