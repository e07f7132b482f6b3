"""The life of a vLLM server as our child process.

`Server` runs a `Launch` in the background and surely ends it (see `serving.supervisor`); `run`
does so in the foreground.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from moecascade.errors import SetupError
from moecascade.serving.command import Launch

_TAIL = 64 * 1024
_WHO = re.compile(r"^\(\w+ pid=\d+\) ")  # how vLLM begins the lines of some processes


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
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
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
        import httpx  # vLLM brings it

        try:  # what is on this machine is not asked for through a proxy
            answer = httpx.get(f"{self.launch.url}/health", timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

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
        SetupError: The port is busy; or the server ended by an exception of its own, which is
            repeated, for it may stand at the end of many lines.
    """
    if not launch.socket_path:
        check_port(launch.host, launch.port)
    supervisor = _start(launch, None)
    passed_on: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        passed_on.append(number)
        supervisor.send_signal(number)

    before = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        said = _passed_through(supervisor.stderr)
        status = supervisor.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 1 and not passed_on and (reason := exception_in(said)):
        raise SetupError(f"vLLM ended with this error: {reason}")
    return status


def _passed_through(errors: IO[bytes] | None) -> str:
    """Print what comes through a pipe until it ends, at once and unchanged; return its end."""
    assert errors is not None
    tail = b""
    while piece := os.read(errors.fileno(), _TAIL):
        tail = (tail + piece)[-_TAIL:]
        with suppress(OSError):  # nobody listens any more; the server goes on
            sys.stderr.buffer.write(piece)
            sys.stderr.buffer.flush()
    return tail.decode(errors="replace")


def exception_in(text: str) -> str:
    """Return the last exception whose traceback is printed in a text, on one line; "" if none is.

    One that only says that the cause stands above it is passed over.
    """
    found: list[str] = []
    within = False
    for line in (_WHO.sub("", line) for line in text.splitlines()):
        if line.startswith("Traceback (most recent call last):"):
            found.append("")
            within = True
        elif within and found[-1]:  # its message may go on, further in
            within = line.startswith(" ") and "For further information" not in line
            found[-1] += f" {line.strip()}" * within
        elif within and not line.startswith(" "):
            found[-1] = line
    causes = [reason for reason in found if "root cause above" not in reason]
    return next(reversed(causes or found), "")


def _start(launch: Launch, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start the supervisor of a server; its standard input is the lifeline.

    What it prints goes to `output`; if that is None, to our output, and errors into a pipe.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "moecascade.serving.supervisor", *launch.command],
        env={**os.environ, **launch.environment},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output else subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is ours to pass on
    )
