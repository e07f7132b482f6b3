"""Traces: what requests said, so that policies can be replayed on it without an engine.

A trace is JSON Lines, one request a line:

    {"id": "code-1", "task": "code", "prompt_token_ids": [...], "output_token_ids": [...]}

Further keys are allowed and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moecascade.errors import ConfigError

KEYS = ("id", "task", "prompt_token_ids", "output_token_ids")


@dataclass(frozen=True, slots=True)
class Trace:
    """One request.

    Attributes:
        id: Its name.
        task: What kind of request it is; results are broken down by it.
        prompt: Token ids of the prompt.
        output: Token ids of the answer, at least one.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]


def read(paths: Iterable[str | Path]) -> Iterator[Trace]:
    """Yield the requests of trace files, without those that say nothing.

    Raises:
        ConfigError: A file cannot be read, or a line is not a trace; names file and line.
    """
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read trace {str(path)!r}: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                trace = Trace(
                    str(row["id"]),
                    str(row["task"]),
                    tuple(int(token) for token in row["prompt_token_ids"]),
                    tuple(int(token) for token in row["output_token_ids"]),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a trace ({error!r}); "
                    f"a line is a JSON object with {', '.join(KEYS)}"
                ) from None
            if trace.output:
                yield trace
