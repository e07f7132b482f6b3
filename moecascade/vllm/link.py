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
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

WAITING = 16  # askers that may wait for an engine
PATIENCE = 1.0  # seconds that one waits for an answer

Answering = Callable[[Mapping[str, Any]], Any]


def address(engine: int) -> str:
    """Return the socket's address of an engine of this family of processes."""
    name = f"moecascade-{hashlib.sha256(_key() + b'%d' % engine).hexdigest()[:32]}"
    return f"\0{name}" if sys.platform == "linux" else str(Path(tempfile.gettempdir()) / name)


def ask(engine: int, question: Mapping[str, Any]) -> Any:
    """Return an engine's answer; None where there is no such engine, or it does not answer."""
    try:
        with connection.Client(address(engine), "AF_UNIX", authkey=_key()) as asked:
            asked.send_bytes(json.dumps(question).encode())
            return json.loads(asked.recv_bytes()) if asked.poll(PATIENCE) else None
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
        self._engine = engine
        self._answer = answer
        self._listener = connection.Listener(
            address(engine), "AF_UNIX", backlog=WAITING, authkey=_key()
        )
        self._closed = False
        threading.Thread(target=self._serve, name="moecascade-link", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._closed = True
        ask(self._engine, {})  # the thread waits for somebody
        self._listener.close()

    def _serve(self) -> None:
        while not self._closed:
            try:
                with self._listener.accept() as asker:
                    if not self._closed and asker.poll(PATIENCE):
                        answer = self._answer(json.loads(asker.recv_bytes()))
                        asker.send_bytes(json.dumps(answer).encode())
            except Exception:  # noqa: BLE001, S112 -- the next one may be answered
                continue  # whoever asked went away, or is none of us, or asked what fails


def _key() -> bytes:
    return bytes(multiprocessing.current_process().authkey)
