"""Lists of numbers on the command line, with commas between."""

from __future__ import annotations

from typing import TypeVar

from moecascade.errors import ConfigError

Kind = TypeVar("Kind", int, float)


def numbers(flag: str, text: str, kind: type[Kind]) -> tuple[Kind, ...]:
    """Return the numbers of a list, none for an empty one; ConfigError where a word is none."""
    what = "whole numbers" if kind is int else "numbers"
    try:
        return tuple(kind(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(
            f"{flag} {text!r}: give {what} with commas between, such as 0,1"
        ) from None
