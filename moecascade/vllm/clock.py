"""What time steps took, and how much of it went into deciding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepClock:
    """Times the steps of one engine.

    A step lasts from the end of the one before it to its own end. Where none was under way before,
    it lasts from the moment at which it is scheduled.

    Args:
        now: Gives the time, in seconds from any beginning.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began: float | None = None  # the step under way
        self._processed: float | None = None  # when the last step had been processed
        self._controller = 0.0  # since these were last taken
        self._handover = 0.0

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return self._began is None

    def begin(self) -> None:
        """A step is scheduled."""
        if self._began is None:
            self._began = self._now()

    def end(self, busy: bool) -> float | None:
        """Return the seconds of the step that ends, None where they are not known.

        Args:
            busy: Whether there is something left to do, so that the next step begins now.
        """
        now, began = self._now(), self._began
        self._began = now if busy else None
        # A clock that stands still or goes back says nothing of a step.
        return None if began is None or now <= began else now - began

    def stop(self) -> None:
        """The engine pauses: what passes until it schedules again is no step's time."""
        self._began = None

    def processed(self) -> None:
        """The step that ended has been processed; its drafts are on their way."""
        self._processed = self._now()

    def handed_over(self) -> None:
        """The drafts have come."""
        if self._processed is not None:
            self._handover += self._now() - self._processed

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Count what is done within as time of the controller."""
        began = self._now()
        try:
            yield
        finally:
            self._controller += self._now() - began

    def take(self) -> tuple[float, float]:
        """Return the seconds of controller and handover since they were last taken."""
        taken = self._controller, self._handover
        self._controller = self._handover = 0.0
        return taken
