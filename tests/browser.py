"""Programs that are not Python's: a headless browser, Prometheus."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def program(*names: str) -> str:
    """Return the path of the first of these that is there; skip the test where none is."""
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        package = {"promtool": "prometheus"}.get(names[0], names[0])
        lacking = f"no {names[0]}; on Debian: apt install {package}"
        if os.environ.get("CI"):
            pytest.fail(lacking)
        pytest.skip(lacking)
    return path


def browser() -> str:
    """Return the path of Chromium or Chrome."""
    return program("chromium", "chromium-browser", "google-chrome", "chrome")


def dumped(
    url: str, profile: Path, wait: float = 4.0, flags: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Return what a page has become, and what it wrote to its console.

    Args:
        url: The page.
        profile: A folder for the browser.
        wait: Seconds that its scripts may take.
        flags: For the browser.
    """
    answer = subprocess.run(
        [
            browser(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--virtual-time-budget={wait * 1000:.0f}",
            "--window-size=1500,1000",
            f"--user-data-dir={profile}",
            *flags,
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return answer.stdout, [line for line in answer.stderr.splitlines() if "CONSOLE" in line]
