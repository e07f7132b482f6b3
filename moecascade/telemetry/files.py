"""Files that appear whole or not at all, and files that are read while they grow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write `text` to a file; its folder is made, what was there stays until all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


class Tail:
    """Reads JSON Lines that are still being written.

    Args:
        path: The file. It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        """Begin at the file's beginning."""
        self._path = Path(path)
        self._at = 0

    def __call__(self) -> Iterator[Any]:
        """Yield what was written since the last call; a line that is not whole yet is left."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                yield json.loads(line)
