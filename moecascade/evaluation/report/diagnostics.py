"""What rows say beyond speed-ups: the figures behind the report's plots. Pure, like `summary`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moecascade.evaluation.report.speedups import (
    Condition,
    Pairs,
    Unit,
    best_static,
    condition_of,
    interval,
    pair,
    summarise,
    totals,
    units,
)
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row

HINDSIGHT = "best static K"
"""Stands in the place of a policy for the fixed K that was best under a condition."""
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


def step_times(rows: Iterable[Row]) -> list[StepTime]:
    """Return the cost curve of one model: step time by drafts verified.

    A request's steps at K are compared with the steps without drafts of the same prompt under the
    baseline, so that what differs is K alone.
    """
    rows = [row for row in rows if row.concurrency == 1]
    plain: dict[tuple[str, str, float], float] = {}
    for row in rows:
        if row.policy == BASELINE:
            for at in row.by_k:
                if at.drafted == 0:
                    plain[row.run, row.prompt, row.temperature] = at.seconds / at.steps
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        base = plain.get((row.run, row.prompt, row.temperature))
        for at in row.by_k:
            if base and row.policy != BASELINE:
                found[at.drafted].append((at.steps, at.seconds / at.steps / base))
    curve = []
    for k, samples in sorted(found.items()):
        steps = sum(n for n, _ in samples)
        if steps >= FEW:
            costs = np.repeat([cost for _, cost in samples], [n for n, _ in samples])
            low, middle, high = np.percentile(costs, [25, 50, 75]).tolist()
            curve.append(StepTime(k, steps, middle, low, high))
    return curve


@dataclass(frozen=True, slots=True)
class UtilityPoint:
    """A policy on a task under one condition: what its steps promised and what a user saw.

    Attributes:
        condition: Model, temperature, concurrency.
        task: The task.
        policy: The policy.
        utility: ETR over cost, from the steps' tokens and times alone.
        speedup: Measured at the client, over the baseline.

    A prompt weighs what the baseline's answer weighs, in both: sampled answers differ in length.
    """

    condition: Condition
    task: str
    policy: str
    utility: float
    speedup: float


def utility_points(rows: Sequence[Row]) -> list[UtilityPoint]:
    """Return a point for each condition with one request in flight, task and policy."""
    groups: dict[tuple[Condition, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.concurrency == 1 and row.steps and row.decoded:
            groups[condition_of(row), row.task, row.policy].append(row)
    points = []
    for (condition, task, policy), mine in groups.items():
        base = groups.get((condition, task, BASELINE))
        if policy == BASELINE or not base:
            continue
        ratio = pair(units(mine), units(base)).ratio
        utility = pair(_by_steps(mine), _by_steps(base)).ratio
        if ratio is not None and utility is not None:
            points.append(UtilityPoint(condition, task, policy, utility, ratio))
    return points


def foreseen(rows: Sequence[Row], policy: str) -> list[UtilityPoint]:
    """Return a point for each task and condition, one request at a time, of a policy's own view.

    Its utility is the one that the policy expected (`Row.utility`): so much faster it would be. A
    prompt weighs what the baseline's answer weighs, as in what was measured.

    Args:
        rows: As they were measured: utility is of the text that was written.
        policy: Its spec.
    """
    groups: dict[tuple[Condition, str], list[Row]] = defaultdict(list)
    base: dict[tuple[Condition, str], dict[tuple[str, ...], Unit]] = defaultdict(dict)
    for row in rows:
        if row.concurrency == 1:
            if row.policy == policy and row.utility:
                groups[condition_of(row), row.task].append(row)
            elif row.policy == BASELINE:
                base[condition_of(row), row.task] |= {unit.key: unit for unit in units([row])}
    points = []
    for (condition, task), mine in groups.items():
        plain = base[condition, task]
        saw = [
            replace(plain[row.run, row.prompt], seconds=plain[row.run, row.prompt].seconds / u)
            for row in mine
            if (u := row.utility) and (row.run, row.prompt) in plain
        ]
        ratio = pair(units(mine), plain.values()).ratio
        expected = pair(saw, plain.values()).ratio
        if ratio is not None and expected is not None:
            points.append(UtilityPoint(condition, task, policy, expected, ratio))
    return points


def _by_steps(rows: Sequence[Row]) -> list[Unit]:
    """Return the requests as the engine's steps saw them.

    ETR over step time is tokens over the steps' time, and utility is its ratio to the baseline's.
    """
    return [Unit((r.run, r.prompt), r.task, r.emitted, r.step_seconds) for r in rows]


def r_squared(points: Sequence[UtilityPoint]) -> float | None:
    """Return how much of the measured speed-ups' variance utility predicts (as it is, no fit)."""
    if len(points) < 2:
        return None
    measured = np.array([point.speedup for point in points])
    error = measured - np.array([point.utility for point in points])
    spread = float(((measured - measured.mean()) ** 2).sum())
    return 1.0 - float((error**2).sum()) / spread if spread else None


def acceptance(rows: Iterable[Row]) -> list[float]:
    """Return the share of verified draft tokens that were accepted, by place in the draft."""
    accepted: dict[int, int] = defaultdict(int)
    drafted: dict[int, int] = defaultdict(int)
    for row in rows:
        for place, count in enumerate(row.accepted_at):
            accepted[place] += count
        for place, count in enumerate(row.drafted_at):
            drafted[place] += count
    return [accepted[place] / drafted[place] for place in sorted(drafted) if drafted[place] >= FEW]


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


def calibration(rows: Iterable[Row], policy: str) -> list[Calibration]:
    """Return how well a policy foresees acceptance and step time, by drafts verified."""
    found: dict[int, list[tuple[int, int, float, float]]] = defaultdict(list)
    for row in rows:
        if row.policy == policy and row.concurrency == 1:
            for at in row.by_k:
                if at.expected_tokens is not None and at.seconds_error is not None:
                    n, emitted = at.steps, at.emitted
                    if at.judged:
                        n, emitted = at.judged, at.judged_emitted
                    found[at.drafted].append((n, emitted, at.expected_tokens, at.seconds_error))
    made = []
    for k, parts in sorted(found.items()):
        steps = sum(n for n, *_ in parts)
        if steps < FEW:
            continue
        expected = sum(e for _, _, e, _ in parts) - steps
        accepted = sum(a for _, a, _, _ in parts) - steps
        errors = np.repeat([error for *_, error in parts], [n for n, *_ in parts])
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


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of speeds and its 95% interval.

    Attributes:
        value: Above 1, the first is faster.
        low: Lower end, None where there were too few prompts.
        high: Upper end.
        pairs: Pairs behind it, and
        prompts: of how many prompts they are.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int
    prompts: int


def ratio(rows: Sequence[Row], policy: str, other: str) -> Ratio | None:
    """Return how much faster `policy` is than `other`, over all that both ran; None where nothing.

    Tasks are strata of the interval, so their differences do not widen it; in a run too short for
    that, with a single prompt of some task, all prompts are drawn together.
    """
    parts: list[Pairs] = []
    for condition in dict.fromkeys(condition_of(row) for row in rows):
        here = [row for row in rows if condition_of(row) == condition]
        of = {name: units(row for row in here if row.policy == name) for name in (policy, other)}
        parts.append(pair(of[policy], of[other]))
    if not parts:
        return None
    both = Pairs(
        np.concatenate([part.before for part in parts]),
        np.concatenate([part.after for part in parts]),
        tuple(task for part in parts for task in part.tasks),
        tuple(prompt for part in parts for prompt in part.prompts),
    )
    if both.ratio is None:
        return None
    ends = interval(both) or interval(replace(both, tasks=("",) * len(both)))
    low, high = ends or (None, None)
    return Ratio(both.ratio, low, high, len(both), len(set(both.prompts)))


def hindsight(rows: Sequence[Row]) -> dict[Condition, str]:
    """Return the fixed K that was best over all tasks, for each condition, as a policy's spec.

    Where some K were asked more than others they are compared on what most of them were asked.
    """
    best = {}
    for condition, cells in totals(summarise(of_static(rows))).items():
        found = best_static(cells)
        if found is not None:
            best[condition] = found.policy
    return best


def of_static(rows: Sequence[Row]) -> list[Row]:
    """Return the rows under a fixed K and under the baseline that compare like with like.

    Of each condition those of the run that has most K, and of runs that have the same.
    """
    rows = [row for row in rows if row.policy == BASELINE or row.policy.startswith("static:")]
    ran: dict[Condition, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        ran[condition_of(row)][row.run].add(row.policy)
    most = {condition: max(runs.values(), key=len) for condition, runs in ran.items()}
    return [row for row in rows if ran[condition_of(row)][row.run] == most[condition_of(row)]]


def with_hindsight(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `hindsight`'s choices under the name `HINDSIGHT`, to compare with."""
    best = hindsight(rows)
    return [
        replace(row, policy=HINDSIGHT) for row in rows if best.get(condition_of(row)) == row.policy
    ]


def presence(rows: Sequence[Row]) -> Ratio | None:
    """Return the speed of our engine at K = 0 over vLLM without us; None if not measured."""
    return ratio(rows, BASELINE, PLAIN)
