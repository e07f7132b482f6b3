"""A small process that stands between us and vLLM, and surely ends vLLM and all its children.

    python -m moecascade.serving.supervisor COMMAND...

vLLM's server is a family: the HTTP server, the engine core, its workers. If the head dies badly the
others may live on, holding memory and port. The supervisor adopts the orphans (it is a *child
subreaper*, see prctl(2)), so it can find and end all of them, whatever became of the head.

Its standard input is the *lifeline*: a pipe of which the starter holds the other end and on which
nothing is ever written. When that end closes, because the starter says so, returns, crashes or is
killed with SIGKILL, the supervisor ends the family: SIGTERM to the head, `GRACE_SECONDS` later
SIGKILL to all. So asking it to stop and dying unawares are one code path. Other signals are passed
on to the head. It exits as the head does (128 + N where signal N killed that).

Needs psutil, which vLLM brings.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

import psutil

GRACE_SECONDS = 5.0
"""How long the head may take to end after SIGTERM, before all are killed."""

ORPHAN_GRACE_SECONDS = 3.0
"""How long the rest may take once the head is gone."""

KILL_SECONDS = 5.0
"""How long the system may take over a process that was killed; it gives gigabytes back first."""

POLL_SECONDS = 0.1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(command: list[str], lifeline: int) -> int:
    """Run `command` until it ends or the lifeline closes; return its exit status.

    Args:
        command: The program and its arguments.
        lifeline: File descriptor of the pipe's reading end.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    head: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before there was a head to pass them to

    def forward(number: int, _frame: FrameType | None) -> None:
        if head is None:
            early.append(number)
        else:
            head.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    head = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own: see `_end_family`
        preexec_fn=_die_with_parent,  # noqa: PLW1509 -- safe, there is one thread
    )
    for missed in early:
        head.send_signal(missed)
    try:
        while head.poll() is None and not _closed(lifeline):
            pass
        if head.poll() is None:
            head.terminate()
            with suppress(subprocess.TimeoutExpired):
                head.wait(GRACE_SECONDS)
    finally:
        _end_family(head)
    status = head.wait()
    _bury()
    return status if status >= 0 else 128 - status


def _closed(lifeline: int) -> bool:
    """Wait a moment for the lifeline to close; return whether it has."""
    readable, _, _ = select.select([lifeline], [], [], POLL_SECONDS)
    return bool(readable) and not os.read(lifeline, 1)


def _end_family(head: subprocess.Popen[bytes]) -> None:
    """End every process that descends from us, those too that are born meanwhile."""
    if head.poll() is not None:  # the rest may be about to end by itself
        survivors = _descendants()
        for survivor in survivors:
            with suppress(psutil.NoSuchProcess):
                survivor.terminate()
        psutil.wait_procs(survivors, ORPHAN_GRACE_SECONDS)
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline and (survivors := _descendants()):
        # Where there are no subreapers (not Linux), the group still holds what kept to it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(head.pid, signal.SIGKILL)
        for survivor in survivors:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        head.poll()
        psutil.wait_procs([p for p in survivors if p.pid != head.pid], POLL_SECONDS)


def _bury() -> None:
    """Wait until the last of our children is gone for good.

    A process counts as a zombie while its threads are still ending, with memory and ports in hand.
    """
    deadline = time.monotonic() + KILL_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(POLL_SECONDS / 5)


def _descendants() -> list[psutil.Process]:
    """Return our living children, their children and so on."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _die_with_parent() -> None:
    """Have the kernel send the head SIGTERM should the supervisor itself be killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    """Call prctl(2) where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main() -> None:
    """Supervise the command given as arguments, standard input being the lifeline."""
    sys.exit(supervise(sys.argv[1:], sys.stdin.fileno()))


if __name__ == "__main__":
    main()
