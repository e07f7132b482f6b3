"""The rows of a run as they are measured, kept in a file, so that it can be interrupted."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from moecascade.errors import ConfigError
from moecascade.evaluation.request_record import Row, from_json

LOCK = ".in-use"


class Journal:
    """The rows of a run as they come, one JSON object a line, so that it can be interrupted.

    Args:
        path: The file; created with its folder where it is missing.
        about: What the run measures. A file about something else is refused.
        fresh: Begin anew, whatever the file is about.

    Raises:
        ConfigError: The file is about another run, or is none of ours; or another run writes into
            this folder now.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Read what there is; a last line that was cut short is dropped."""
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = _alone_in(path.parent)
        try:
            self._file = self._opened(path, about, fresh)
        except BaseException:
            os.close(self._folder)
            raise

    def _opened(self, path: Path, about: Mapping[str, Any], fresh: bool) -> TextIO:
        if fresh:
            path.unlink(missing_ok=True)
        head = json.dumps({"moecascade": "journal", **about})
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0].rstrip("\n") != head:
            raise ConfigError(
                f"{path} is of a run that measures something else, or of other prompts; choose "
                "another folder with --out, or begin anew with --fresh (make bench: FRESH=1)"
            )
        self.rows = [from_json(json.loads(line)) for line in whole[1:]]
        text = "".join(whole) or head + "\n"
        if text != "".join(lines):
            path.write_text(text, encoding="utf-8")
        return path.open("a", encoding="utf-8")

    @property
    def done(self) -> frozenset[str]:
        """The names of the requests that have been measured."""
        return frozenset(row.request for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append a block's rows."""
        self.rows.extend(rows)
        self._file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file, and let others into the folder; twice is as good as once."""
        if not self._file.closed:
            self._file.close()
            os.close(self._folder)


def _alone_in(folder: Path) -> int:
    """Return an open file that keeps other runs out of a folder until it is closed."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"{folder} is in use: another run writes its results there; wait until it has ended, "
            "or choose another folder with --out"
        ) from None
    except OSError:  # a file system without locks: then it is up to the user
        pass
    return handle
