"""The processes of `tests.matrix`, which run beside other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import tiny
from tests.beside import ROOT

PARTS = (("first",), ("second", "sync"), ("second", "async"))


class Runs:
    """Both model runners, each in processes with one thread, at a lower priority than the tests.

    Args:
        models: The folder of the tiny models.
        logs: Where their logs go.
    """

    def __init__(self, models: Path, logs: Path) -> None:
        """Start them."""
        self._models, self._logs = models, logs
        self._running: dict[str, subprocess.Popen[str]] = {}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        for part in PARTS:
            name = " ".join(part)
            command = ["nice", "-n", "5", sys.executable, "-m", "tests.matrix", str(models), *part]
            with (
                (logs / f"{name}.json").open("w") as out,
                (logs / f"{name}.log").open("w") as log,
            ):
                self._running[name] = subprocess.Popen(
                    command, stdout=out, stderr=log, text=True, cwd=ROOT, env=environment
                )

    def done(self) -> None:
        """Wait until all have ended."""
        for process in self._running.values():
            process.wait(timeout=3000)

    def wait(self) -> dict[str, Any]:
        """Return what the engines did, by case, once all have ended."""
        self.done()
        found: dict[str, Any] = {}
        for name in self._running:
            for line in (self._logs / f"{name}.json").read_text().splitlines():
                if line.startswith("{"):
                    case = json.loads(line)
                    found[case.pop("case")] = case
            found[f"{name} log"] = (self._logs / f"{name}.log").read_text()[-3000:]
        found["circles"] = json.loads((self._models / tiny.CIRCLES).read_text())
        return found

    def end(self) -> None:
        """End what still runs: the tests were interrupted."""
        for process in self._running.values():
            process.kill()
            process.wait()
