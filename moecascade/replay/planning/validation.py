"""What others measured, beside what the planner says of it.

``published.json`` holds points: a model, a device, a drafter, and the time of a step with drafts
over one without, drafting included, as it follows from what was published. Whole sources either fit
the constants of `step_time`, or only check them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median

from moecascade.replay.planning import devices
from moecascade.replay.planning.plan import find_drafter, find_model
from moecascade.replay.planning.step_time import Constants, Setup, drafting_time, step_time

CONTEXT = 512  # tokens of a request, where nobody says


@dataclass(frozen=True, slots=True)
class Point:
    """One published measurement.

    Attributes:
        id: Its name.
        source: Whose it is, and what ran.
        where: Where it stands.
        fits: Whether its source fits constants; else it only checks.
        model: As for `find_model`.
        device: As for `devices.find`.
        cards: How many.
        bits: A weight, None for the configuration's.
        drafter: As for `find_drafter`.
        requests: At once.
        k: Tokens verified beside the target's own.
        passes: Of the drafter, None for none.
        length: Tokens a step with drafts gave, where that is published.
        cost: Time of a step with drafts over one without.
        how: How that follows from what was published.
        overlap: Whether the engine's host works ahead of the device while it drafts. vLLM's does;
            SGLang's only where that is asked for, which no source here says, and not with trees.
    """

    id: str
    source: str
    where: str
    fits: bool
    model: str
    device: str
    cards: int
    bits: float | None
    drafter: str
    requests: int
    k: int
    passes: int | None
    length: float | None
    cost: float
    how: str
    overlap: bool = True

    def predicted(self, constants: Constants) -> float:
        """Return what the planner says of it."""
        model = find_model(self.model)
        setup = Setup(devices.find(self.device), self.cards, bits=self.bits, constants=constants)
        load = {"requests": self.requests, "context": CONTEXT}
        drafter = find_drafter(self.drafter, model)
        drafting = drafting_time(drafter, setup, k=self.passes or 0, **load)
        waiting = 0.0 if self.overlap else constants.waiting
        with_drafts = step_time(model, setup, k=self.k, **load).total + drafting + waiting
        return with_drafts / step_time(model, setup, **load).total


@cache
def published() -> tuple[Point, ...]:
    """Return all points."""
    text = (resources.files(__package__) / "published.json").read_text(encoding="utf-8")
    return tuple(Point(**values) for values in json.loads(text))


def errors(points: Sequence[Point], constants: Constants | None = None) -> list[float]:
    """Return by how much predictions are off, as parts of what was published."""
    used = Constants() if constants is None else constants
    return [point.predicted(used) / point.cost - 1.0 for point in points]


def typical(found: Sequence[float]) -> float:
    """Return the median size of errors."""
    return median(map(abs, found))


def signs(points: Sequence[Point], constants: Constants | None = None) -> list[bool]:
    """Return, where it is published, whether it is rightly predicted that drafts pay or do not."""
    used = Constants() if constants is None else constants
    return [
        (point.length > point.predicted(used)) == (point.length > point.cost)
        for point in points
        if point.length is not None
    ]
