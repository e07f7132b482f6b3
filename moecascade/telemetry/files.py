"""Files: JSON Lines are read and written here and nowhere else; files appear whole or not at all.

What people have is taken as it is: a UTF-8 byte order mark at the head, packed by gzip, a JSON
array in place of lines, and a last line that was cut because its writer was killed.
"""

from __future__ import annotations

import gzip
import json
import logging
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from moecascade.errors import ConfigError

logger = logging.getLogger("moecascade")

_GZIP = b"\x1f\x8b"  # what packed files begin with, whatever they are called
_MARK = b"\xef\xbb\xbf"


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


def json_line(value: Any) -> str:
    """Return a value as a line of JSON Lines."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def open_to_append(path: Path, private: bool = False) -> TextIO:
    """Open a file of JSON Lines to append to; it is created with its folder where it is missing.

    A last line that was cut is dropped, for what is appended to it would be lost with it. One that
    only lacks its line end is kept.

    Args:
        path: The file.
        private: Whether nobody but its owner may read it, if it is created.

    Raises:
        OSError: The file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    last = b""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as old, mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as text:
            whole = text.rfind(b"\n") + 1
            last = text[whole:]
    if last.startswith(b"{") and not _is_json(last):
        logger.warning("%s: its last line was cut; it is dropped", path)
        os.truncate(path, whole)
        last = b""
    if private:
        path.touch(mode=0o600)
    file = path.open("a", encoding="utf-8")
    if last:
        file.write("\n")
    return file


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield what a file of JSON Lines, or of one JSON array, holds, each with its place in words.

    A last line that was cut is left out, with a warning that names it, where others came before.

    Raises:
        ConfigError: The file cannot be read, or is not JSON in UTF-8; names file and line.
    """
    try:
        with Path(path).open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path) if packed else Path(path).open("rb") as file:
            first = True
            for number, line in enumerate(file, 1):
                if not (said := line.removeprefix(_MARK).strip()):
                    continue
                if first and said.startswith(b"["):
                    yield from _of_array(line + file.read(), path)
                    return
                place = f"{path}, line {number}"
                try:
                    row = _parsed(line, place)
                except ConfigError:
                    if line.endswith(b"\n") or first:
                        raise
                    logger.warning("%s: it was cut; what comes before it is used", place)
                    return
                first = False
                yield place, row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {str(path)!r}: {reason}; give a JSON Lines file") from None


def _of_array(text: bytes, path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array; they have no lines of their own, so they are counted."""
    for number, row in enumerate(_parsed(text, str(path)), 1):
        yield f"{path}, record {number}", row


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.removeprefix(_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{place}: not UTF-8 (byte {error.object[error.start]:#x}); convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error}); mend or remove it") from None


class Tail:
    """Reads JSON Lines that are still being written.

    Args:
        path: The file. It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        """Begin at the file's beginning."""
        self._path = Path(path)
        self._at = 0
        self._lines = 0

    def __call__(self) -> Iterator[Any]:
        """Yield what was written since the last call; a line that is not whole yet is left.

        Raises:
            ConfigError: A whole line is not JSON in UTF-8; names file and line.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                self._lines += 1
                yield _parsed(line, f"{self._path}, line {self._lines}")
