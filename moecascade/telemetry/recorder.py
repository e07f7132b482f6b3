"""Writes what an engine does to the logs that its configuration asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from moecascade.core.options import CONFIG_KEY, ServerOptions
from moecascade.core.step import Decision, Proposal, Step
from moecascade.errors import ConfigError
from moecascade.telemetry.step_log import StepLog
from moecascade.telemetry.traces import TraceLog

FLUSH_SECONDS = 1.0  # after which logs are flushed also under load

Log = TypeVar("Log", StepLog, TraceLog)


class _Kept(Generic[Log]):
    """A log, or none; given up for good when it cannot be written.

    Args:
        key: The option that names its file.
        path: The file, "" for no log.
        make: Opens it.
        on_fault: Told when it is given up.
    """

    def __init__(
        self, key: str, path: str, make: Callable[[str], Log], on_fault: Callable[[str, str], None]
    ) -> None:
        self._key = key
        self._on_fault = on_fault
        try:
            self.log: Log | None = make(path) if path else None
        except OSError as error:
            raise ConfigError(
                f'additional_config["{CONFIG_KEY}"]: {key} {path!r} cannot be written '
                f"({error.strerror}); choose another file"
            ) from error

    def __call__(self, write: Callable[[Log], None]) -> None:
        """Write to the log. A full disk must cost neither steps nor drafts."""
        if self.log is None:
            return
        try:
            write(self.log)
        except Exception as fault:  # noqa: BLE001 -- the engine must go on
            self.log = None
            self._on_fault(self._key, f"{fault!r}; going on without this log")


class Recorder:
    """Step log and traces of one engine.

    Args:
        options: They name the files.
        on_fault: Told of a log that is given up: which, and why.

    Raises:
        ConfigError: A file cannot be opened.
    """

    def __init__(self, options: ServerOptions, on_fault: Callable[[str, str], None]) -> None:
        def traces(path: str) -> TraceLog:
            return TraceLog(path, options.trace_tokens, options.trace_drafts)

        self._steps = _Kept("step_log", options.step_log, StepLog, on_fault)
        self._traces = _Kept("trace_log", options.trace_log, traces, on_fault)
        self._flushed = 0.0

    @property
    def logs_steps(self) -> bool:
        """Whether what decisions say of themselves is of use to anybody."""
        return self._steps.log is not None

    def begin(self, request_id: str, task: str, prompt: Sequence[int]) -> None:
        """A request begins."""
        self._traces(lambda log: log.begin(request_id, task, prompt))

    def propose(self, proposals: Sequence[Proposal]) -> None:
        """Record what the drafter proposes for the next step."""
        self._traces(lambda log: log.propose(proposals))

    def step(
        self,
        step: Step,
        decisions: Mapping[str, Decision],
        policy_of: Callable[[str], str],
        seconds: tuple[float, float],
    ) -> None:
        """Record a step.

        Args:
            step: What it did.
            decisions: Those in force during it, by request.
            policy_of: Gives the spec of the policy that decides for a request.
            seconds: What controller and handover took of it.
        """
        self._steps(lambda log: log.write(step, decisions, policy_of, *seconds))
        self._traces(lambda log: log.step(step))

    def end(self, request_id: str) -> None:
        """A request ended, however it ended."""
        self._traces(lambda log: log.end(request_id))

    def flush(self, idle: bool) -> None:
        """Hand what was written to the operating system, under load only now and then."""
        now = time.monotonic()
        if idle or now - self._flushed > FLUSH_SECONDS:
            self._flushed = now
            self._steps(lambda log: log.flush())
            self._traces(lambda log: log.flush())

    def close(self) -> None:
        """Close the files."""
        self._steps(lambda log: log.close())
        self._traces(lambda log: log.close())
