"""The one family of errors that moecascade raises on purpose.

Each message names the bad value, what is allowed, and the remedy. The command line turns any of
them into exit code 2; nothing else in the package ends a process.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CascadeError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(CascadeError, ValueError):
    """A setting is wrong: an unknown key or policy, a value out of range, a wrong type."""


class SetupError(CascadeError):
    """The machine is not ready: vLLM missing or too old, a busy port, a missing model folder."""


class TooLongError(SetupError):
    """A prompt does not fit into the served model's context."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``' (did you mean ...?)'`` for the allowed name closest to `name`, or ``''``."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
