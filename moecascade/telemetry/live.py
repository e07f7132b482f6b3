"""What the live page shows: the last minutes of an engine's requests, and why K is what it is.

Bounded: a number for each second of two minutes, of so many requests. No text of anybody is in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moecascade.core.cost import middle
from moecascade.core.step import Decision, Expectation, Step
from moecascade.telemetry.metrics import Metrics

SECONDS = 120  # of each request that are kept
REQUESTS = 64  # shown at once; more are counted
ENDED = 12  # that are shown on for a while, so that short ones can be seen at all
LINGER = 20.0  # seconds for which they are
LEAST = 8  # drafts that the cost curve reaches at least


@dataclass(slots=True)
class _Shown:
    """One request.

    Attributes:
        policy: Its policy's label.
        seconds: A row for each second in which it did something: the second, steps, drafts
            verified, tokens given.
        last: The last decision that said what it expected.
        ended: When it ended.
        speedup: What it was by then.
    """

    policy: str
    seconds: deque[list[int]] = field(default_factory=lambda: deque(maxlen=SECONDS))
    last: Decision | None = None
    ended: float | None = None
    speedup: float | None = None


class Live:
    """The last minutes of one engine.

    Args:
        metrics: What the engine counts.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Begin with nothing to show."""
        self._metrics = metrics
        self._shown: dict[str, _Shown] = {}
        self._hidden = 0  # requests that there was no room for
        self._batch = 0
        self._now = 0.0

    def step(self, now: float, step: Step, decisions: Mapping[str, Decision]) -> None:
        """Take a step, after the metrics have.

        Args:
            now: The time, in seconds from any beginning.
            step: What it did.
            decisions: Those in force during it, by request.
        """
        self._now, self._batch, second = now, len(step.requests), int(now)
        self._hidden = 0
        parts = self._metrics.parts
        for said in step.requests:
            part = parts.get(said.request_id)
            if part is None or not said.emitted:
                continue
            if (shown := self._shown.get(said.request_id)) is None:
                if len(self._shown) >= REQUESTS:
                    self._hidden += 1
                    continue
                shown = self._shown[said.request_id] = _Shown(part.policy)
            if not shown.seconds or shown.seconds[-1][0] != second:
                shown.seconds.append([second, 0, 0, 0])
            row = shown.seconds[-1]
            row[1] += 1
            row[2] += said.drafted
            row[3] += said.emitted
            decision = decisions.get(said.request_id)
            if decision is not None and decision.expected is not None:
                shown.last = decision

    def end(self, request_id: str) -> None:
        """A request ends, before the metrics forget it; it is shown a little longer."""
        if (shown := self._shown.get(request_id)) is not None:
            shown.ended = self._now
            if (part := self._metrics.parts.get(request_id)) is not None:
                shown.speedup = part.speedup
        over = [name for name, one in self._shown.items() if one.ended is not None]
        for name in over[: max(0, len(over) - ENDED)]:
            del self._shown[name]

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return what the page shows, plain JSON. Asked in another thread.

        Args:
            now: As for `step`.
        """
        requests: list[dict[str, Any]] = []
        for name, one in list(self._shown.items()):
            if one.ended is not None and now - one.ended > LINGER:
                self._shown.pop(name, None)
                continue
            part = self._metrics.parts.get(name)
            requests.append(
                {
                    "id": name,
                    "policy": one.policy,
                    "ended": one.ended is not None,
                    "speedup": one.speedup if part is None else part.speedup,
                    "seconds": [[int(now) - row[0], *row[1:]] for row in one.seconds],
                    "why": None if one.last is None else in_words(one.last, self._batch),
                }
            )
        return {
            "requests": requests,
            "span": SECONDS,
            "hidden": self._hidden,
            "batch": self._batch,
            "acceptance": self._metrics.acceptance(),
            **self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        """Return cost by drafts for the present batch: the curve, and what was measured of it."""
        n, costs = max(1, self._batch), self._metrics.costs
        if (base := costs.seconds(n)) is None:
            return {"curve": [], "points": [], "baseline": None}
        points = [
            [middle(bucket) - n, seconds / base, steps]
            for bucket, seconds, steps in costs.measured()
            if middle(bucket) >= n
        ]
        most = int(max([LEAST, *(drafts for drafts, _, _ in points)]))
        times = [costs.seconds(n + drafts) or 0.0 for drafts in range(most + 1)]
        return {"curve": [time / base for time in times], "points": points, "baseline": base}


def in_words(decision: Decision, batch: int) -> str:
    """Return why K is what it is, for people.

    Args:
        decision: With what was expected of it.
        batch: Requests in the step.
    """
    said, k = decision.expected or Expectation(), decision.k
    survival = said.parts.get("survival")
    if survival is None:
        utility = "" if said.utility is None else f", utility {said.utility:.2f} so far"
        return f"K = {k} ({decision.why}{utility})."
    if not survival:
        return "K = 0: there is no draft."
    costs, rate = said.parts["costs"], said.parts["lambda"]

    def needed(place: int) -> float:
        """Return the chance with which a draft's token has to be right to be worth its time."""
        return float(rate * batch * (costs[place + 1] - costs[place]))

    def further(place: int) -> str:
        chance, least = survival[place], needed(place)
        token = f"token {place + 1} is accepted with chance {chance:.2f}"
        if chance < least:
            return f"{token} and would pay from {least:.2f} on"
        return f"{token}, but drafts have cost this request {said.parts['lost']:.1%} already"

    if not k:
        return f"K = 0: {further(0)}."
    first = ", ".join(f"{chance:.2f}" for chance in survival[:k])
    words = f"K = {k}: accepted with chance {first}"
    if said.tokens is not None and said.utility is not None:
        words += f"; {said.tokens:.1f} tokens expected, speed-up {said.utility:.2f}"
    if k < len(survival) and k + 1 < len(costs):
        words += f". Not {k + 1}: {further(k)}"
    return words + "."
