"""The step log: one JSON object a line for each step of an engine that computed anything.

    {"schema": "moecascade.steps/1", "step": 17, "seconds": 0.031, "decode": true, "requests": [
      {"id": "cmpl-1", "policy": "cascade", "k": 3, "why": "test", "drafted": 3, "emitted": 2,
       "utility": 1.21}], "controller": 0.00004, "handover": 0.0009}

``k`` is the draft length that was decided, ``drafted`` what the drafter had of it; see
`core.step` for the other fields. ``controller`` is the time, in seconds, that decision and
observation took, ``handover`` the time that the drafts took from vLLM's worker to its scheduler.
What the policy expected of the step when it decided follows where it says so: ``utility``,
``expected_tokens``, ``expected_seconds``, see `core.step.Expectation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from moecascade.core.step import Decision, Expectation, Step
from moecascade.errors import ConfigError
from moecascade.telemetry.files import Tail, json_line, open_to_append, records

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
        self._file: TextIO = open_to_append(Path(path))
        self._step = 0

    def write(
        self,
        step: Step,
        decisions: Mapping[str, Decision],
        policy_of: Callable[[str], str],
        controller: float,
        handover: float,
    ) -> None:
        """Append a step.

        Args:
            step: What it did.
            decisions: Those in force during it, by request.
            policy_of: Gives the spec of the policy that decides for a request.
            controller: Seconds that deciding took.
            handover: Seconds that the drafts took to get here.
        """
        rows = []
        for part in step.requests:
            decision = decisions.get(part.request_id)
            rows.append(
                {
                    "id": part.request_id,
                    "policy": policy_of(part.request_id),
                    "k": decision.k if decision else 0,
                    "why": decision.why if decision else "",
                    "drafted": part.drafted,
                    "emitted": part.emitted,
                    **_expected(decision.expected if decision else None),
                }
            )
        line = {
            "schema": SCHEMA,
            "step": self._step,
            "seconds": step.seconds,
            "decode": step.decode,
            "requests": rows,
            "controller": controller,
            "handover": handover,
        }
        self._file.write(json_line(line))
        self._step += 1

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def _expected(said: Expectation | None) -> dict[str, float]:
    """Return the entries of a row for what a policy expected."""
    if said is None:
        return {}
    found = {
        "utility": said.utility,
        "expected_tokens": said.tokens,
        "expected_seconds": said.seconds,
    }
    return {key: float(value) for key, value in found.items() if value is not None}


class Reader:
    """Reads a log that is still being written.

    Args:
        path: The file. It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        """Begin at the log's beginning."""
        self._path = path
        self._tail = Tail(path)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yield the steps since the last call; a line that is still being written is left out.

        Raises:
            ConfigError: A whole line is not a step of this schema.
        """
        for step in self._tail():
            yield _checked(step, str(self._path))


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the steps of a log; a last line that was cut is left out with a warning.

    Raises:
        ConfigError: There is no such file, or a whole line is not a step of this schema.
    """
    for place, step in records(path):
        yield _checked(step, place)


def _checked(step: Any, place: str) -> dict[str, Any]:
    if not isinstance(step, dict) or step.get("schema") != SCHEMA:
        raise ConfigError(
            f"{place}: not a step ({step!r:.80}); a line is a JSON object of schema {SCHEMA!r}"
        )
    return step
