"""From rows to speed-ups: every policy on every workload, and each of ours over all others.

With `diagnostics` the one pass over rows; what comes of it holds numbers only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moecascade.errors import ConfigError
from moecascade.evaluation.report.roles import HINDSIGHT, OURS, static_k
from moecascade.evaluation.report.statistics import Speedup, Unit, joined, pair, speedup
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row
from moecascade.evaluation.workloads import ALL, REPEATED, workloads


@dataclass(frozen=True, slots=True)
class Condition:
    """A model, a temperature and a concurrency: what policies are compared under."""

    model: str
    temperature: float
    concurrency: int

    @property
    def title(self) -> str:
        """The condition in a few words."""
        flight = "" if self.concurrency == 1 else f", {self.concurrency} requests in flight"
        return f"{self.model}, temperature {self.temperature:g}{flight}"

    @property
    def head(self) -> str:
        """The same in fewer, for the head of a column."""
        flight = "" if self.concurrency == 1 else f", {self.concurrency} at once"
        return f"{self.model}, T = {self.temperature:g}{flight}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A policy on a workload under one condition. None where nothing was measured that would tell.

    Attributes:
        condition: What it was measured under.
        workload: A task or a mix of tasks.
        policy: The policy.
        requests: Requests behind the numbers.
        speedup: Over the baseline.
        tokens_per_second: Tokens decoded over the time of decoding: of one request at a time, or of
            all that are in flight.
        etr: Tokens emitted per decode step.
        mean_k: Mean of the draft length K chosen for a step.
        off_share: Share of steps at K = 0.
    """

    condition: Condition
    workload: str
    policy: str
    requests: int
    speedup: Speedup | None
    tokens_per_second: float | None
    etr: float | None
    mean_k: float | None
    off_share: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy over another, on all that both ran, whatever the temperature.

    Attributes:
        policy: Spec of the one.
        over: Spec of the other, or `HINDSIGHT`.
        concurrency: Requests in flight.
        speedup: Above 1, the first is faster.
        model: The model, "" for all of them.
        workload: The workload.
    """

    policy: str
    over: str
    concurrency: int
    speedup: Speedup
    model: str = ""
    workload: str = ALL


@dataclass(frozen=True, slots=True)
class Speedups:
    """Speed-ups of some runs.

    Attributes:
        cells: Every policy on every workload under every condition.
        workloads: Every policy over the baseline on every workload of a model, one request at a
            time: the paper's worst case is the lowest of its.
        comparisons: Each of ours over every other policy, and the baseline over `PLAIN`.
    """

    cells: tuple[Cell, ...] = ()
    workloads: tuple[Comparison, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def speedups(rows: Sequence[Row]) -> Speedups:
    """Return all speed-ups of some rows.

    Raises:
        ConfigError: No request ran under the baseline.
    """
    return Speedups(cells(rows), tuple(of_models(rows)), tuple(comparisons(rows)))


def condition_of(row: Row) -> Condition:
    """Return the condition under which a row was measured."""
    return Condition(row.model, row.temperature, row.concurrency)


def units(rows: Iterable[Row]) -> list[Unit]:
    """Return the units of one policy's rows under one condition, those without a rate left out."""
    found: list[Unit] = []
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.concurrency > 1:
            blocks.setdefault((row.run, row.block), []).append(row)
        elif row.decoded:
            found.append(unit(row, row.decoded, row.decode_seconds))
    for block in blocks.values():
        tasks = {row.task for row in block}
        found.append(
            Unit(
                key=(block[0].run, *(row.prompt for row in block)),
                task=tasks.pop() if len(tasks) == 1 else "mixed",
                asked=" ".join(_asked(row) for row in block),
                tokens=sum(row.tokens for row in block),
                seconds=block[0].block_seconds,
            )
        )
    return found


def unit(row: Row, tokens: float, seconds: float) -> Unit:
    """Return a request as a unit of so many tokens in such a time."""
    return Unit((row.run, row.prompt), row.task, _asked(row), tokens, seconds)


def _asked(row: Row) -> str:
    return row.prompt.partition(REPEATED)[0]


def _by_condition(rows: Iterable[Row]) -> dict[Condition, list[Row]]:
    found: dict[Condition, list[Row]] = defaultdict(list)
    for row in rows:
        found[condition_of(row)].append(row)
    return found


def _by_policy(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by policy: the baseline, vLLM itself, then in order of appearance."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.policy].append(row)
    order = sorted(found, key=lambda policy: (policy != BASELINE, policy != PLAIN))  # stable
    return {policy: found[policy] for policy in order}


def _workloads(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    return workloads(list(dict.fromkeys(row.task for row in rows)))


def cells(rows: Sequence[Row], baseline: str = BASELINE) -> tuple[Cell, ...]:
    """Return a cell for each condition, workload and policy, in order of appearance.

    Args:
        rows: The requests. In a run a prompt appears at most once under a policy and condition.
        baseline: The policy that speed-ups are over.

    Raises:
        ConfigError: No request ran under the baseline.
    """
    if all(row.policy != baseline for row in rows):
        raise ConfigError(f"nothing was measured under {baseline!r}, so there is no speed-up")
    made: list[Cell] = []
    for condition, here in _by_condition(rows).items():
        across = _workloads(here)
        if condition.concurrency > 1:  # blocks hold all tasks
            across = dict([*across.items()][-1:])
        policies = _by_policy(here)
        for name, tasks in across.items():
            before = units(row for row in policies.get(baseline, ()) if row.task in tasks)
            made += [
                _cell(condition, name, policy, [row for row in mine if row.task in tasks], before)
                for policy, mine in policies.items()
            ]
    return tuple(made)


def _cell(
    condition: Condition, workload: str, policy: str, rows: list[Row], baseline: list[Unit]
) -> Cell:
    measured = units(rows)
    logged = [row.engine for row in rows if row.engine]
    steps = sum(engine.steps for engine in logged)
    return Cell(
        condition=condition,
        workload=workload,
        policy=policy,
        requests=len(rows),
        speedup=speedup(pair(measured, baseline)),
        tokens_per_second=_ratio(sum(u.tokens for u in measured), sum(u.seconds for u in measured)),
        etr=_ratio(sum(engine.emitted for engine in logged), steps),
        mean_k=_ratio(sum(engine.k_total for engine in logged), steps),
        off_share=_ratio(sum(engine.steps_at_0 for engine in logged), steps),
    )


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


@dataclass(frozen=True, slots=True)
class Standing:
    """How a policy stands while a run goes on; None where there is nothing to compare yet.

    Attributes:
        policy: The policy.
        by_task: Its speed-up over the baseline on prompts that both were asked, by task.
        speedup: The same, all tasks together.
        tokens_per_second: Of one request.
    """

    policy: str
    by_task: dict[str, float | None]
    speedup: float | None
    tokens_per_second: float | None


def standings(rows: Sequence[Row], policies: Sequence[str], tasks: Sequence[str]) -> list[Standing]:
    """Return how policies stand: no intervals, so it is quick."""

    def ratio(policy: str, of: Sequence[str]) -> float | None:
        pairs = [
            units(row for row in rows if row.policy == name and row.task in of)
            for name in (policy, BASELINE)
        ]
        return pair(*pairs).ratio if all(pairs) else None

    found = []
    for policy in policies:
        mine = units(row for row in rows if row.policy == policy)
        rate = _ratio(sum(u.tokens for u in mine), sum(u.seconds for u in mine))
        by_task = {task: ratio(policy, [task]) for task in tasks}
        found.append(Standing(policy, by_task, ratio(policy, tasks), rate))
    return found


def by_workload(found: Iterable[Cell]) -> dict[Condition, dict[str, list[Cell]]]:
    """Return the cells by condition and workload, in order: the last is all tasks together."""
    made: dict[Condition, dict[str, list[Cell]]] = {}
    for cell in found:
        made.setdefault(cell.condition, {}).setdefault(cell.workload, []).append(cell)
    return made


def totals(found: Iterable[Cell]) -> dict[Condition, list[Cell]]:
    """Return the cells of all tasks together, by condition."""
    return {condition: list(of.values())[-1] for condition, of in by_workload(found).items()}


def fastest(found: Iterable[Cell]) -> str | None:
    """Return the policy whose interval begins above the speed-ups of all others, if one's does.

    None where some were asked more than others: theirs are speed-ups on other prompts.
    """
    known = {cell.policy: cell.speedup for cell in found if cell.speedup is not None}
    best = max(known, key=lambda policy: known[policy].value, default=BASELINE)
    if best == BASELINE or len({of.pairs for of in known.values()}) > 1:
        return None
    others = [of.value for policy, of in known.items() if policy != best]
    low = known[best].low
    return best if low is not None and low > max(others, default=1.0) else None


def compare(rows: Sequence[Row], policy: str, other: str) -> Speedup | None:
    """Return how much faster `policy` is than `other`, over all that both ran; None where nothing.

    Tasks are strata of the interval, so their differences do not widen it; in a run too short for
    that, with a single prompt of some task, all prompts are drawn together.
    """
    parts = []
    for here in _by_condition(row for row in rows if row.policy in (policy, other)).values():
        of = {name: units(row for row in here if row.policy == name) for name in (policy, other)}
        parts.append(pair(of[policy], of[other]))
    return speedup(joined(parts), pooled=True)


def comparisons(rows: Sequence[Row]) -> Iterable[Comparison]:
    """Yield each of ours over every other policy, and the baseline over vLLM without us."""
    for concurrency in sorted({row.concurrency for row in rows}):
        here = [row for row in rows if row.concurrency == concurrency]
        ran = list(_by_policy(here))
        pairs = [(policy, other) for policy in OURS for other in ran if other != policy]
        if concurrency == 1 or sum(static_k(policy) is not None for policy in ran) > 1:
            here = [*here, *with_hindsight(here)]
            pairs += [(policy, HINDSIGHT) for policy in OURS]
        for policy, other in (*pairs, (BASELINE, PLAIN)):
            if found := compare(here, policy, other):
                yield Comparison(policy, other, concurrency, found)


def of_models(rows: Iterable[Row]) -> Iterable[Comparison]:
    """Yield every policy on every workload of each model, one request at a time."""
    rows = [row for row in rows if row.concurrency == 1]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        for name, tasks in _workloads(mine).items():
            of_it = [row for row in mine if row.task in tasks]
            for policy in _by_policy(of_it):
                if policy != BASELINE and (found := compare(of_it, policy, BASELINE)):
                    yield Comparison(policy, BASELINE, 1, found, model, name)


def best_static(rows: Sequence[Row]) -> dict[Condition, dict[int, float]]:
    """Return the speed-up over all tasks of each fixed K, for each condition; that of none is 1.

    Where some K were asked more than others they are compared on what most of them were asked:
    counted are, of each condition, the runs that have most of them.
    """
    made = {}
    for condition, here in _by_condition(rows).items():
        ran: dict[str, set[str]] = defaultdict(set)
        for row in here:
            if row.policy == BASELINE or static_k(row.policy) is not None:
                ran[row.run].add(row.policy)
        most = max(ran.values(), key=len, default=set())
        policies = _by_policy(row for row in here if ran.get(row.run) == most)
        base = units(policies.get(BASELINE, ()))
        found = {
            k: ratio
            for policy, mine in policies.items()
            if (k := static_k(policy)) is not None and (ratio := pair(units(mine), base).ratio)
        }
        if found:
            made[condition] = {**found, 0: 1.0}
    return made


def with_hindsight(rows: Sequence[Row]) -> list[Row]:
    """Return the rows under the best fixed K of each condition, its policy named `HINDSIGHT`."""
    best = {
        condition: max(speeds, key=speeds.__getitem__)
        for condition, speeds in best_static(rows).items()
    }
    return [
        replace(row, policy=HINDSIGHT)
        for row in rows
        if (k := best.get(condition_of(row))) is not None
        and (row.policy == BASELINE if k == 0 else static_k(row.policy) == k)
    ]
