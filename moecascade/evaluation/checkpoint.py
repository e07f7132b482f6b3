"""The rows of a run as they are measured, kept in a file, so that it can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moecascade.errors import ConfigError
from moecascade.evaluation.request_record import Row, from_json
from moecascade.telemetry.files import json_line, open_to_append, records

if TYPE_CHECKING:
    from filelock import BaseFileLock

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
        self._lock = _alone_in(path.parent)
        try:
            self._file = self._opened(path, about, fresh)
        except BaseException:
            self._lock.release()
            raise

    def _opened(self, path: Path, about: Mapping[str, Any], fresh: bool) -> TextIO:
        if fresh:
            path.unlink(missing_ok=True)
        file = open_to_append(path)
        head = json_line({"moecascade": "journal", **about})
        lines = [row for _, row in records(path)]
        if not lines:
            file.write(head)
        elif lines[0] != json.loads(head):
            file.close()
            raise ConfigError(
                f"{path} is of a run that measures something else, or of other prompts; choose "
                "another folder with --out, or begin anew with --fresh (make bench: FRESH=1)"
            )
        self.rows = [from_json(row) for row in lines[1:]]
        return file

    @property
    def done(self) -> frozenset[str]:
        """The names of the requests that have been measured."""
        return frozenset(row.request for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append a block's rows."""
        self.rows.extend(rows)
        self._file.write("".join(json_line(asdict(row)) for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file, and let others into the folder; twice is as good as once."""
        if not self._file.closed:
            self._file.close()
            self._lock.release()


def _alone_in(folder: Path) -> BaseFileLock:
    """Return a lock, held, that keeps other runs out of a folder until it is released."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, is_singleton=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{folder} is in use: another run writes its results there; wait until it has ended, "
            "or choose another folder with --out"
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks: then it is up to the user
        pass
    return lock
