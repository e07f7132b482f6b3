"""The baseline: step time without our drafts, measured online (the paper's K = 0 iterations)."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from statistics import median


@dataclass(slots=True)
class _Reading:
    """What is known of the baseline at one batch shape."""

    samples: deque[float]
    value: float | None = None
    age: int = 0
    renewing: bool = False


class Baseline:
    """Step time without our drafts, measured online, by the number of positions in the step.

    Positions are what the step computes besides our drafts: one for each request, plus whatever
    drafts requests under other policies verify. A batch of n requests of ours alone has n.

    Each value is the median of the latest samples (robust to pauses, and to the one step that
    already pays for drafting the first drafts of what comes next). After `refresh` steps without a
    sample a value is *due* (the paper refreshes about every 100 iterations): it stays in use until
    `steps` new samples have replaced it.

    Args:
        steps: Samples that make a value.
        refresh: Age in steps at which a value is due.
    """

    window = 16  # samples kept while speculation is off anyway and they come for free
    reach = 1.5  # interpolate between two batch sizes at most this factor apart

    def __init__(self, steps: int, refresh: int) -> None:
        self._steps = steps
        self._refresh = refresh
        self._readings: dict[int, _Reading] = {}
        self._known: list[int] = []

    def observe(self, positions: int, seconds: float) -> None:
        """Take a step without our drafts as a sample."""
        reading = self._reading(positions)
        if reading.age >= self._refresh and not reading.renewing:
            reading.samples.clear()
            reading.renewing = True
        reading.samples.append(seconds)
        if len(reading.samples) >= self._steps:
            if reading.value is None:
                self._known.insert(bisect_left(self._known, positions), positions)
            reading.value = median(reading.samples)
            reading.age = 0
            reading.renewing = False

    def tick(self, positions: int) -> None:
        """Count a step with drafts: the value at `positions` grows older."""
        self._reading(positions).age += 1

    def due(self, positions: int) -> bool:
        """Return whether a sample at `positions` is wanted: nothing is known, or it is old."""
        reading = self._readings.get(positions)
        old = reading is not None and reading.age >= self._refresh
        return old or self.at(positions) is None

    def at(self, positions: int) -> float | None:
        """Return seconds per step at `positions`, interpolated where near sizes are known."""
        reading = self._readings.get(positions)
        if reading is not None and reading.value is not None:
            return reading.value
        i = bisect_left(self._known, positions)
        if i == 0 or i == len(self._known):
            return None
        low, high = self._known[i - 1], self._known[i]
        below, above = self._readings[low].value, self._readings[high].value
        if high > low * self.reach or below is None or above is None:
            return None
        return below + (above - below) * (positions - low) / (high - low)

    def _reading(self, positions: int) -> _Reading:
        reading = self._readings.get(positions)
        if reading is None:
            reading = self._readings[positions] = _Reading(
                deque(maxlen=max(self.window, self._steps))
            )
        return reading
