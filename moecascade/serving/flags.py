"""The vLLM flags that a user gave, in whichever spelling vLLM takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecascade.errors import ConfigError

_SHORT = {
    "-sc": "speculative-config",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dcp": "decode-context-parallel-size",
}
_SAME = {  # other ways to say what a default of ours says
    "spec-method": "speculative-config",
    "spec-model": "speculative-config",
    "spec-tokens": "speculative-config",
    "no-enforce-eager": "enforce-eager",
    "no-async-scheduling": "async-scheduling",
}
_OURS = (
    "speculative-config",
    "scheduler-cls",
    "additional-config",
    "enforce-eager",
    "dtype",
    "max-model-len",
    "served-model-name",
    "async-scheduling",
    "pipeline-parallel-size",
    "data-parallel-size",
    "decode-context-parallel-size",
)


class Flags:
    """The vLLM flags that a user gave, by their canonical names; vLLM's own spellings all count.

    ``--max_model_len=4``, ``--max-model-len 4``, an unambiguous beginning of a name that matters
    here, and the keys of a ``--config`` file are all the same to vLLM, so they are here.

    Raises:
        ConfigError: The ``--config`` file cannot be read.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """Read `arguments`."""
        self._values: dict[str, str] = {}
        for i, argument in enumerate(arguments):
            if not argument.startswith("-"):
                continue
            name, equals, value = argument.partition("=")
            follows = i + 1 < len(arguments) and not arguments[i + 1].startswith("--")
            if not equals and follows:
                value = arguments[i + 1]
            dotted = "." in name  # --additional-config.cascade.policy=off
            self._values[self.canonical(name)] = "" if dotted else value
        if path := self.value("config"):
            for key, value in self._read_file(path).items():
                self._values.setdefault(self.canonical(f"--{key}"), value)

    def __contains__(self, name: str) -> bool:
        """Return whether the flag was given."""
        return name in self._values

    def value(self, name: str, default: str = "") -> str:
        """Return the flag's value on the command line, `default` where there is none."""
        return self._values.get(name) or default

    @staticmethod
    def canonical(name: str) -> str:
        """Return a flag's name as it is kept here, whichever spelling was given."""
        if name in _SHORT:
            return _SHORT[name]
        plain = name.lstrip("-").partition(".")[0].replace("_", "-")
        if plain in _SAME:
            return _SAME[plain]
        begun = [ours for ours in _OURS if ours.startswith(plain) and len(plain) >= 4]
        return begun[0] if len(begun) == 1 else plain

    @staticmethod
    def _read_file(path: str) -> dict[str, str]:
        import yaml  # type: ignore[import-untyped]  # comes with vLLM

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(
                f"--config {path}: {error.strerror}; give a YAML file that exists"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: not YAML ({error}); mend the file") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--config {path}: not a mapping of flags to values; mend the file")
        return {
            str(key): to_json(value) if isinstance(value, dict) else str(value)
            for key, value in values.items()
        }


def to_json(value: Any) -> str:
    """Return a value as JSON for a command line."""
    return json.dumps(value, separators=(",", ":"))
