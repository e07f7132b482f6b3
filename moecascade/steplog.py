"""The step log: one JSON object a line for each step of an engine that had drafts to decide about.

    {"schema": "moecascade.steps/1", "step": 17, "seconds": 0.031, "decode": true, "requests": [
      {"id": "cmpl-1", "policy": "cascade", "k": 3, "why": "test", "drafted": 3, "emitted": 2}]}

``k`` is the draft length that was decided, ``drafted`` what the drafter had of it; see
`moecascade.steps` for the other fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from moecascade.steps import Decision, Step

SCHEMA = "moecascade.steps/1"


class StepLog:
    """Appends steps to a file.

    Args:
        path: The file; it is created, with its folder, or appended to.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._step = 0

    def write(
        self, step: Step, decisions: Mapping[str, Decision], policy_of: Mapping[str, str]
    ) -> None:
        """Append a step; `decisions` and `policy_of` are those in force during it, by request."""
        rows = []
        for part in step.requests:
            decision = decisions.get(part.request_id)
            rows.append(
                {
                    "id": part.request_id,
                    "policy": policy_of.get(part.request_id, ""),
                    "k": decision.k if decision else 0,
                    "why": decision.why if decision else "",
                    "drafted": part.drafted,
                    "emitted": part.emitted,
                }
            )
        line = {
            "schema": SCHEMA,
            "step": self._step,
            "seconds": step.seconds,
            "decode": step.decode,
            "requests": rows,
        }
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._step += 1

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the steps of a log; a last line that is still being written is left out.

    Raises:
        ValueError: A whole line is not a step of this schema.
    """
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            step = json.loads(line)
            if step.get("schema") != SCHEMA:
                raise ValueError(f"{path}: not a step log of schema {SCHEMA!r}: {line[:80]!r}")
            yield step
