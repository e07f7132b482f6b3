"""Programs that run beside the tests, one after the other, and are asked about at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = "VLLM_ENABLE_V1_MULTIPROCESSING"  # that tests share a process with their engine


class Awaited(Protocol):
    """What can be waited for."""

    def done(self) -> None:
        """Wait until it has ended."""


class Beside:
    """A Python program, with its own log and temporary files, of lower priority than the tests.

    Args:
        command: Its arguments, the script first.
        folder: Its own.
        after: What it waits for, so that tests have few neighbours at a time.
    """

    def __init__(self, command: Sequence[str], folder: Path, after: Awaited | None = None) -> None:
        """Start it, or a thread that will."""
        folder.mkdir()
        self._log, self._after = folder / "said.log", after
        self._ended = False
        self._process: subprocess.Popen[str] | None = None
        self._command = ["nice", "-n", "5", sys.executable, *command]
        self._environment = {k: v for k, v in os.environ.items() if k != LEFT_OUT}
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

    def done(self) -> None:
        """Wait until it has ended."""
        self._starter.join()
        if self._process is not None:
            self._process.wait(timeout=3000)

    def wait(self) -> tuple[int, str]:
        """Return its exit status and what it said."""
        self.done()
        assert self._process is not None
        return self._process.returncode, self._log.read_text()

    def end(self) -> None:
        """End it where it still runs: the tests were interrupted."""
        self._ended = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
