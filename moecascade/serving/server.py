"""The life of a vLLM server as our child process.

`Server` runs a `Launch` in the background and surely ends it (see `serving.supervisor`); `run`
does so in the foreground.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from moecascade.errors import SetupError
from moecascade.serving.command import Launch

# What is on this machine is not asked for through a proxy.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of `host` that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise SetupError where a server could not listen at `host` and `port`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SetupError(
                f"port {port} on {host or 'this machine'} cannot be used: {reason}. "
                f"Choose another with --port, or end what uses it (see 'lsof -i :{port}')"
            ) from None


class Server:
    """A vLLM server in the background, for a ``with`` statement.

    Leaving the block ends it with all its children. So does the end of this process, however that
    comes about.

    Args:
        launch: How to start it, see `plan`.
        log: File for what it prints.

    Raises:
        SetupError: On entering: the port is busy.
    """

    stop_seconds = 30.0
    """The supervisor's own deadlines are shorter; this one is for when it is stuck."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Remember how to start; nothing starts yet."""
        self.launch = launch
        self.log = log
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        """The supervisor's process id, 0 while there is none."""
        return self._supervisor.pid if self._supervisor else 0

    def __enter__(self) -> Self:
        """Start the server; `wait_ready` waits until it answers."""
        check_port(self.launch.host, self.launch.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._supervisor = _start(self.launch, output)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server."""
        self.stop()

    def wait_ready(
        self, seconds: float = 900.0, tell: Callable[[str], None] = lambda _line: None
    ) -> None:
        """Wait until the server answers ``/health``.

        Args:
            seconds: Give up after these.
            tell: Called about twice a second with the last line of the server's log.

        Raises:
            SetupError: It ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not self._healthy():
            if self._supervisor is None or self._supervisor.poll() is not None:
                raise SetupError(self._why("the server ended before it was ready"))
            if time.monotonic() > deadline:
                raise SetupError(self._why(f"the server did not answer within {seconds:.0f} s"))
            last = self.log_tail(1)
            tell(last[0] if last else "")
            time.sleep(0.5)

    def log_tail(self, lines: int) -> list[str]:
        """Return the last lines of the server's log that are not empty."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
            text = file.read().decode(errors="replace")
            return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
        return []

    def stop(self) -> None:
        """End the server and all its children; twice is as good as once."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        supervisor.stdin.close()  # the lifeline: from here on it ends without us, too
        try:
            supervisor.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()

    def _healthy(self) -> bool:
        try:
            with _DIRECTLY.open(f"{self.launch.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _why(self, what: str) -> str:
        """Return a message with the part of the log that is most likely to tell the reason."""
        tail = self.log_tail(400)
        reasons = [line for line in tail if "Error: " in line]
        shown = [*reasons[:1], *tail[-12:]] if reasons[:1] != tail[-1:] else tail[-12:]
        body = "\n".join(f"  {line}" for line in shown) or "  (it printed nothing)"
        return (
            f"{what}. Its log {self.log} ends with\n{body}\n"
            "See 'moecascade doctor' for what is missing on this machine"
        )


def run(launch: Launch) -> int:
    """Serve in the foreground until the server ends; return its exit status.

    Signals that end or interrupt us are passed on to the server, which ends in its own way.

    Raises:
        SetupError: The port is busy.
    """
    if not launch.socket_path:
        check_port(launch.host, launch.port)
    supervisor = _start(launch, None)

    def forward(number: int, _frame: FrameType | None) -> None:
        supervisor.send_signal(number)

    before = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        return supervisor.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(launch: Launch, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start the supervisor of a server; its standard input is the lifeline."""
    return subprocess.Popen(
        [sys.executable, "-m", "moecascade.serving.supervisor", *launch.command],
        env={**os.environ, **launch.environment},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,  # the terminal's Ctrl-C is ours to pass on
    )
