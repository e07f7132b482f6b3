"""How the API server asks an engine for what it counts: a socket that only their family can find.

vLLM starts API servers and engines as processes of one launcher, so `multiprocessing` has given all
of them one secret key. Address and handshake come from it: nothing is configured, nobody else can
ask, and on Linux nothing lies in the file system that could be left behind (an abstract socket).
Engines that Ray starts, or another node, have another key and are not asked.

The engine answers in a thread of its own, only when asked: it costs a serving engine nothing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

WAITING = 16  # askers that may wait for an engine
PATIENCE = 1.0  # seconds that one waits for the other

Answering = Callable[[Mapping[str, Any]], Any]


def address(engine: int) -> str:
    """Return the socket's address of an engine of this family of processes."""
    name = f"moecascade-{hashlib.sha256(_key() + b'%d' % engine).hexdigest()[:32]}"
    return f"\0{name}" if sys.platform == "linux" else str(Path(tempfile.gettempdir()) / name)


def ask(engine: int, question: Mapping[str, Any]) -> Any:
    """Return an engine's answer; None where there is no such engine, or it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE)
            asking.connect(address(engine))
            with _connection(asking) as asked:
                connection.answer_challenge(asked, _key())
                connection.deliver_challenge(asked, _key())
                asked.send_bytes(json.dumps(question).encode())
                return json.loads(asked.recv_bytes())
    except (OSError, EOFError, ValueError, multiprocessing.AuthenticationError):
        return None


class Link:
    """Answers what is asked of an engine.

    Args:
        engine: Its number among those of the server.
        answer: Gives the answer to a question, both plain JSON. It is called in another thread.

    Raises:
        OSError: There is an engine of this number already.
    """

    def __init__(self, engine: int, answer: Answering) -> None:
        """Listen."""
        self._answer = answer
        self._address = address(engine)
        self._closed = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX)
        try:
            self._listening.bind(self._address)
            self._listening.listen(WAITING)
        except OSError:
            self._listening.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="moecascade-link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # it may be waiting for somebody
        self._listening.close()
        self._thread.join(PATIENCE)
        if not self._address.startswith("\0"):
            Path(self._address).unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                asking, _ = self._listening.accept()
            except OSError:  # closed, or the process has too many files open
                self._closed.wait(PATIENCE)
                continue
            try:
                with _connection(asking) as asker:
                    connection.deliver_challenge(asker, _key())
                    connection.answer_challenge(asker, _key())
                    answer = self._answer(json.loads(asker.recv_bytes()))
                    asker.send_bytes(json.dumps(answer).encode())
            except Exception:  # noqa: BLE001, S112 -- the next one may be answered
                continue  # whoever asked went away, or is none of us, or asked what fails


def _connection(there: socket.socket) -> connection.Connection:
    """Return a connection over a socket, which never waits for longer than it may.

    Handshakes of `multiprocessing` know no limit: one with a process that was stopped, or that ends
    at this moment, would last for ever.
    """
    there.settimeout(None)  # the descriptor's own limits hold where Python's do not
    limit = struct.pack("ll", int(PATIENCE), int(PATIENCE % 1 * 1e6))
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return connection.Connection(there.detach())


def _key() -> bytes:
    return bytes(multiprocessing.current_process().authkey)
