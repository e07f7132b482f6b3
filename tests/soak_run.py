"""The soak, which runs beside other tests: `benchmarks/soak.py` on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.matrix_runs import ROOT, Runs


class Soak:
    """Some minutes of soak in a process of lower priority than the tests.

    Args:
        models: The folder of the tiny models.
        folder: For its log and its temporary files.
        after: What it waits for, so that tests have one neighbour at a time.
    """

    def __init__(self, models: Path, folder: Path, after: Runs | None = None) -> None:
        """Start it, or a thread that will."""
        self._log, self._after = folder / "soak.log", after
        self._ended = False
        self._process: subprocess.Popen[str] | None = None
        minutes = "3" if os.environ.get("CI") else "1"
        self._command = ["nice", "-n", "5", sys.executable, "benchmarks/soak.py"]
        self._command += ["--minutes", minutes, "--model", str(models / "target")]
        left_out = "VLLM_ENABLE_V1_MULTIPROCESSING"
        self._environment = {k: v for k, v in os.environ.items() if k != left_out}
        self._environment["TMPDIR"] = str(folder)
        self._starter = threading.Thread(target=self._start, daemon=True)
        self._starter.start()

    def _start(self) -> None:
        if self._after is not None:
            self._after.done()
        if not self._ended:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdout=log,
                    stderr=log,
                    text=True,
                    cwd=ROOT,
                    env=self._environment,
                )

    def wait(self) -> tuple[int, str]:
        """Return its exit status and what it said."""
        self._starter.join()
        assert self._process is not None
        status = self._process.wait(timeout=3000)
        return status, self._log.read_text()

    def end(self) -> None:
        """End it where it still runs: the tests were interrupted."""
        self._ended = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
