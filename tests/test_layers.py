"""The house: each package imports only from the floors below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moecascade

ROOT = Path(moecascade.__file__).parent
FLOORS = (
    ("errors",),
    ("core",),
    ("policies", ""),  # the public faces of core
    ("telemetry",),
    ("replay", "localmodel"),
    ("vllm",),  # whose first guess of costs is replay.planning's
    ("serving",),
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
CORE_MAY_IMPORT = {"numpy", "numba"}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            if node.module == "moecascade":
                yield from (f"moecascade.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """Return the package or module at the top that a file belongs to; "" for the top itself."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path):
    room = room_of(path)
    for module in imported(path):
        parts = module.split(".")
        if parts[0] != "moecascade" or len(parts) == 1 or parts[1] not in FLOOR:
            continue
        other = parts[1]
        assert other == room or FLOOR[other] < FLOOR[room], f"{room or 'moecascade'}: {module}"


def test_the_core_needs_the_standard_library_and_numpy_alone():
    allowed = {*sys.stdlib_module_names, *CORE_MAY_IMPORT, "moecascade"}
    for path in FILES:
        if room_of(path) in {"core", "errors", "policies", ""}:
            found = {module.split(".")[0] for module in imported(path)}
            assert found <= allowed, f"{path}: {found - allowed}"


def test_what_takes_long_to_import_is_not_imported_with_the_core():
    code = "import sys, moecascade.core.controller; print({'numba', 'torch'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_the_first_corridor_is_short_and_every_room_says_what_it_is_for():
    top = [p for p in ROOT.iterdir() if not p.name.startswith("_") and p.name != "py.typed"]
    assert len(top) <= 10
    for package in ROOT.rglob("__init__.py"):
        words = (ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or "").split()
        assert len(words) >= 10, package
