"""Writes down and counts what an engine does, as its configuration asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Generic, TypeVar

from moecascade.core import registry
from moecascade.core.options import CONFIG_KEY, RequestOptions, ServerOptions
from moecascade.core.step import Decision, Proposal, Step
from moecascade.errors import ConfigError
from moecascade.telemetry.live import Live
from moecascade.telemetry.metrics import Metrics, Totals, in_words
from moecascade.telemetry.step_log import StepLog
from moecascade.telemetry.traces import TraceLog

FLUSH_SECONDS = 1.0  # after which logs are flushed also under load
EXPLAINED_EVERY = 16  # steps: what policies expect takes time to say

Kept = TypeVar("Kept", StepLog, TraceLog, Metrics, Live)


class _Kept(Generic[Kept]):
    """A log or a count, or none; given up for good when it fails.

    Args:
        key: The option that asks for it.
        what: It, or None.
        on_fault: Told when it is given up.
    """

    def __init__(self, key: str, what: Kept | None, on_fault: Callable[[str, str], None]) -> None:
        self._key = key
        self._on_fault = on_fault
        self.it: Kept | None = what

    def __call__(self, use: Callable[[Kept], Any]) -> Any:
        """Use it. A full disk must cost neither steps nor drafts."""
        if self.it is None:
            return None
        try:
            return use(self.it)
        except Exception as fault:  # noqa: BLE001 -- the engine must go on
            self.it = None
            self._on_fault(self._key, f"{fault!r}; going on without it")
            return None


class Recorder:
    """Step log, traces, metrics and what the live page shows, of one engine.

    Args:
        options: They say what is wanted, and name files.
        on_fault: Told of what is given up: which, and why.
        facts: What is known of the model (`core.controller.Controller`).
        say: Takes a line for the log now and then.
        now: Gives the time, in seconds from any beginning.

    Raises:
        ConfigError: A file cannot be opened.
    """

    def __init__(
        self,
        options: ServerOptions,
        on_fault: Callable[[str, str], None],
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        def opened(key: str, make: Callable[[str], Kept]) -> _Kept[Kept]:
            path = getattr(options, key)
            try:
                return _Kept(key, make(path) if path else None, on_fault)
            except OSError as error:
                raise ConfigError(
                    f'additional_config["{CONFIG_KEY}"]: {key} {path!r} cannot be written '
                    f"({error.strerror}); choose another file"
                ) from error

        def traces(path: str) -> TraceLog:
            return TraceLog(path, options.trace_tokens, options.trace_drafts)

        self._steps = opened("step_log", StepLog)
        self._traces = opened("trace_log", traces)
        counted = Metrics(options.policy, registry.names(), facts) if options.metrics else None
        self._metrics = _Kept("metrics", counted, on_fault)
        shown = Live(counted) if counted is not None and options.live_page else None
        self._live = _Kept("live_page", shown, on_fault)
        self._say = say
        self._every = options.log_seconds
        self._now = now
        self._flushed = 0.0
        self._said = (now(), Totals())  # when, and what had happened by then
        self._unexplained = 0  # decisions since one was
        self._lock = Lock()  # for `answer`, which is called in another thread

    def wants_reasons(self) -> bool:
        """Return whether the next decisions are to say what is expected of them."""
        if self._steps.it is not None:
            return True
        self._unexplained += 1
        if self._metrics.it is None or self._unexplained < EXPLAINED_EVERY:
            return False
        self._unexplained = 0
        return True

    def begin(
        self, request_id: str, asked: RequestOptions, prompt: Sequence[int], spec: str
    ) -> None:
        """A request begins, under the policy `spec`."""
        self._traces(lambda log: log.begin(request_id, asked.task, prompt))
        with self._lock:
            self._metrics(lambda counts: counts.begin(request_id, asked, spec))

    def propose(self, proposals: Sequence[Proposal]) -> None:
        """Record what the drafter proposes for the next step."""
        self._traces(lambda log: log.propose(proposals))
        with self._lock:
            self._metrics(lambda counts: counts.propose(proposals))

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
        now = self._now()
        with self._lock:
            self._metrics(lambda counts: counts.step(step, decisions, seconds))
            self._live(lambda live: live.step(now, step, decisions))
        if self._every and now - self._said[0] >= self._every:
            self._tell(now, len(step.requests))

    def end(self, request_id: str) -> None:
        """A request ended, however it ended."""
        self._traces(lambda log: log.end(request_id))
        with self._lock:
            self._live(lambda live: live.end(request_id))
            self._metrics(lambda counts: counts.end(request_id))

    def fault(self, what: str) -> None:
        """Count a fault."""
        if self._metrics.it is not None:
            self._metrics.it.fault(what)

    def answer(self, question: Mapping[str, Any], policies: int) -> Any:
        """Return what an API server asks for; None where there is no such thing.

        Any thread may ask.

        Args:
            question: ``{"want": "metrics"}``, ``{"want": "live"}``, or ``{"want": "report", "id":
                ...}`` with the name that a client was given for its request.
            policies: How many are kept.
        """
        counts, wanted = self._metrics.it, question.get("want")
        with self._lock:
            if counts is None:
                return None
            if wanted == "metrics":
                return counts.snapshot(policies)
            if wanted == "report":
                return counts.take_report(str(question.get("id", "")))
            if wanted == "live" and self._live.it is not None:
                return self._live.it.snapshot(self._now())
        return None

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

    def _tell(self, now: float, requests: int) -> None:
        """Say in a line what happened since the last one."""
        counts = self._metrics.it
        if counts is None or self._say is None:
            return
        said, self._said = self._said[1], (now, replace(counts.totals))
        if (line := in_words(said, counts.totals, requests)) is not None:
            self._say(line)
