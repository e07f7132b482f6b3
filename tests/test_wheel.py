"""What `pip install` gives: a wheel with all that the package reads, which works anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built as a release would build it."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    subprocess.run([*PIP, "wheel", *options, str(ROOT)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    package = ROOT / "moecascade"
    ours = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == ours


def test_installed_elsewhere_it_serves_its_commands_and_its_data(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}

    def python(*words: str) -> str:
        ran = subprocess.run(
            [sys.executable, *words],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        return ran.stdout

    where = "import moecascade, moecascade.vllm; print(moecascade.__file__, moecascade.__version__)"
    file, version = python("-c", where).split()
    assert Path(file).is_relative_to(target)
    assert version in wheel.name
    assert "serve" in python("-m", "moecascade", "--help")
    prompts = "from moecascade.evaluation import workloads as w; print(len(w.own('code')))"
    assert int(python("-c", prompts)) > 0
