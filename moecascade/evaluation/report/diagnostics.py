"""From rows to all else that a report shows: step times, utility, acceptance, foresight, K."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecascade.evaluation.report.roles import OURS, adapts
from moecascade.evaluation.report.speedups import Condition, condition_of, unit, units
from moecascade.evaluation.report.statistics import Unit, pair
from moecascade.evaluation.request_record import BASELINE, AtK, Engine, Row

FEW = 5  # steps at one K below which it is left out


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of steps that verified `k` drafts, one request at a time.

    Attributes:
        k: Drafts verified.
        steps: How many steps.
        cost: Their mean time over the mean of steps without drafts, request by request: the median
            over steps, each with its request's mean.
        low: 25th percentile likewise.
        high: 75th.
    """

    k: int
    steps: int
    cost: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class UtilityPoint:
    """A policy on a task under one condition: what its steps promised and what a user saw.

    Attributes:
        condition: Model, temperature, concurrency.
        task: The task.
        policy: The policy.
        utility: Tokens a step over its time, over the baseline's.
        speedup: Measured at the client, over the baseline.

    A prompt weighs what the baseline's answer weighs, in both: sampled answers differ in length.
    """

    condition: Condition
    task: str
    policy: str
    utility: float
    speedup: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a policy expected of steps that verified `k` drafts, beside what came.

    Attributes:
        k: Drafts verified.
        steps: How many steps that can be judged, see `AtK.judged`.
        expected: Share of the drafts that were expected to be accepted; None at 0.
        accepted: Share that was.
        time_error: Median of ``|expected - measured| / measured`` step time.
    """

    k: int
    steps: int
    expected: float | None
    accepted: float | None
    time_error: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """What of a policy's steps is not the model's, one request at a time.

    Attributes:
        deciding: Share of a step's time that the policy took.
        handover: Share until vLLM's drafts had come from its worker process.
    """

    deciding: float
    handover: float


@dataclass(frozen=True, slots=True)
class Course:
    """K along one request.

    Attributes:
        policy: Who chose.
        prompt: The prompt's name.
        condition: What it ran under.
        steps: Each step's (K, tokens, utility as the policy took it, None where it says nothing).
    """

    policy: str
    prompt: str
    condition: Condition
    steps: tuple[tuple[int, int, float | None], ...]


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What rows say beyond speed-ups, all of one request at a time.

    Attributes:
        step_times: The cost curve of each model.
        utility: Utility beside measured speed-up.
        calibration: What each policy of ours expected and what came, by drafts verified.
        k_shares: Share of steps by drafts verified, for each policy.
        overheads: What is not the model's time, for each policy.
        courses: One request under policies that adapt, one on which K moves.
    """

    step_times: Mapping[str, Sequence[StepTime]]
    utility: Sequence[UtilityPoint]
    calibration: Mapping[str, Sequence[Calibration]]
    k_shares: Mapping[str, Mapping[int, float]]
    overheads: Mapping[str, Overhead]
    courses: Sequence[Course]

    @property
    def r_squared(self) -> float | None:
        """How much of the measured speed-ups' variance utility predicts (as it is, no fit)."""
        if len(self.utility) < 2:
            return None
        measured = np.array([point.speedup for point in self.utility])
        error = measured - np.array([point.utility for point in self.utility])
        spread = float(((measured - measured.mean()) ** 2).sum())
        return 1.0 - float((error**2).sum()) / spread if spread else None


def diagnostics(rows: Sequence[Row], timed: Sequence[Row] = ()) -> Diagnostics:
    """Return what rows say beyond speed-ups; see `analyse` for the others."""
    single = [row for row in rows if row.concurrency == 1]
    policies = list(dict.fromkeys(row.policy for row in single))
    curves = step_times_by_model([*single, *timed])
    expected = {p: calibration(single, p) for p in OURS}
    shares = {p: k_shares(single, p) for p in policies if p != BASELINE}
    overheads = {p: overhead(single, p) for p in policies}
    return Diagnostics(
        step_times={model: curve for model, curve in curves.items() if len(curve) > 1},
        utility=utility_points(single),
        calibration={policy: found for policy, found in expected.items() if found},
        k_shares={policy: found for policy, found in shares.items() if found},
        overheads={policy: found for policy, found in overheads.items() if found},
        courses=courses(single),
    )


def _logged(rows: Iterable[Row], policy: str) -> list[tuple[Row, Engine]]:
    return [(row, row.engine) for row in rows if row.policy == policy and row.engine]


def step_times_by_model(rows: Sequence[Row]) -> dict[str, list[StepTime]]:
    """Return the cost curve of each model, of those requests that were alone."""
    single = [row for row in rows if row.concurrency == 1]
    models = dict.fromkeys(row.model for row in single)
    return {m: step_times([row for row in single if row.model == m]) for m in models}


def step_times(rows: Sequence[Row]) -> list[StepTime]:
    """Return the cost curve of one model: step time by drafts verified.

    A request's steps at K are compared with the steps without drafts of the same prompt under the
    baseline, so that what differs is K alone.
    """
    plain: dict[tuple[str, str, float], float] = {}
    for row, engine in _logged(rows, BASELINE):
        for at in engine.by_k:
            if at.drafted == 0 and at.seconds:
                plain[row.run, row.prompt, row.temperature] = at.seconds / at.steps
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        base = plain.get((row.run, row.prompt, row.temperature))
        if base and row.engine and row.policy != BASELINE:
            for at in row.engine.by_k:
                if at.seconds is not None:
                    found[at.drafted].append((at.steps, at.seconds / at.steps / base))
    curve = []
    for k, samples in sorted(found.items()):
        steps = sum(n for n, _ in samples)
        if steps >= FEW:
            costs = np.repeat([cost for _, cost in samples], [n for n, _ in samples])
            low, middle, high = np.percentile(costs, [25, 50, 75]).tolist()
            curve.append(StepTime(k, steps, middle, low, high))
    return curve


def _by_task(rows: Iterable[Row]) -> dict[tuple[Condition, str, str], list[Row]]:
    found: dict[tuple[Condition, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.decoded:
            found[condition_of(row), row.task, row.policy].append(row)
    return found


def utility_points(rows: Iterable[Row]) -> list[UtilityPoint]:
    """Return a point for each condition, task and policy.

    ETR over step time is tokens over the steps' time, and utility is its ratio to the baseline's.
    """
    points = []
    groups = _by_task(row for row in rows if row.engine and row.engine.seconds)
    for (condition, task, policy), mine in groups.items():
        base = groups.get((condition, task, BASELINE))
        if policy != BASELINE and base:
            ratio = pair(units(mine), units(base)).ratio
            utility = pair(_by_steps(mine), _by_steps(base)).ratio
            if ratio is not None and utility is not None:
                points.append(UtilityPoint(condition, task, policy, utility, ratio))
    return points


def _by_steps(rows: Iterable[Row]) -> list[Unit]:
    """Return the requests as the engine's steps saw them."""
    return [
        unit(row, row.engine.emitted, row.engine.seconds)
        for row in rows
        if row.engine and row.engine.seconds
    ]


def calibration(rows: Iterable[Row], policy: str) -> list[Calibration]:
    """Return how well a policy foresees acceptance and step time, by drafts verified."""
    found: dict[int, list[AtK]] = defaultdict(list)
    for _, engine in _logged(rows, policy):
        for at in engine.by_k:
            if at.expected_tokens is not None and at.seconds_error is not None:
                found[at.drafted].append(at)
    made = []
    for k, parts in sorted(found.items()):
        steps = sum(at.judged for at in parts)
        if steps >= FEW:
            expected = sum(at.expected_tokens or 0.0 for at in parts) - steps
            accepted = sum(at.judged_emitted for at in parts) - steps
            errors = np.repeat([at.seconds_error for at in parts], [at.judged for at in parts])
            made.append(
                Calibration(
                    k,
                    steps,
                    expected / (k * steps) if k else None,
                    accepted / (k * steps) if k else None,
                    float(np.median(errors)),
                )
            )
    return made


def k_shares(rows: Iterable[Row], policy: str) -> dict[int, float]:
    """Return the share of a policy's steps by drafts verified."""
    counts: Counter[int] = Counter()
    for _, engine in _logged(rows, policy):
        for at in engine.by_k:
            counts[at.drafted] += at.steps
    return {k: n / counts.total() for k, n in sorted(counts.items())}


def overhead(rows: Iterable[Row], policy: str) -> Overhead | None:
    """Return what of a policy's steps is not the model's; None where no step has a time."""
    timed = [(engine, engine.seconds) for _, engine in _logged(rows, policy) if engine.seconds]
    if not timed:
        return None
    whole = sum(seconds for _, seconds in timed)
    return Overhead(
        deciding=sum(engine.controller_seconds for engine, _ in timed) / whole,
        handover=sum(engine.handover_seconds for engine, _ in timed) / whole,
    )


def courses(rows: Iterable[Row], most: int = 3) -> list[Course]:
    """Return one prompt's requests under policies that adapt: one on which K moves."""
    asked: dict[tuple[str, Condition, str], list[Course]] = defaultdict(list)
    for row in rows:
        if row.engine and row.engine.series and adapts(row.policy):
            steps = tuple((k, tokens, utility) for k, tokens, _, utility in row.engine.series)
            course = Course(row.policy, row.prompt, condition_of(row), steps)
            asked[row.run, course.condition, row.prompt].append(course)

    def telling(mine: Sequence[Course]) -> float:
        return (
            sum(min(len({k for k, *_ in course.steps}), 6) for course in mine[:most])
            + len(mine[0].steps) / 1000
        )

    chosen = max(asked.values(), key=telling, default=[])
    chosen.sort(key=lambda course: course.policy not in OURS)  # stable
    return chosen[:most]
