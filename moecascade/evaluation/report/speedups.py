"""From measured rows to the numbers that a table or a plot shows. Pure: no clock, no files.

What is compared is a pair: the same prompt under a policy and under a baseline, in the same run;
where several requests are in flight, the same block of prompts. Answers may differ in length (in
bfloat16 a near-tie may fall differently when the batch's shape changes; sampled ones always do), so
what counts is the time for equally many tokens. For pair i let ``n_i`` be the tokens that the
baseline decoded, ``s_i`` its seconds per token and ``p_i`` the policy's. Then

    speed-up = sum_i(n_i * s_i) / sum_i(n_i * p_i)

is the time that the baseline took, over the time that the policy takes for as many tokens. The
interval is a percentile bootstrap over prompts: what is asked is what varies, and the pairs of one
prompt, under several conditions or with several seeds, are no more than one draw (our local models
even write the same text). In a mix, each task's prompts are drawn among themselves, as its shares
are given. Of n prompts n - 1 are drawn, since n draws of n vary too little (Rao and Wu 1988), and
the interval is as much wider than for many prompts as Student's is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecascade.errors import ConfigError
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row
from moecascade.evaluation.workloads import REPEATED, workloads

RESAMPLES = 4000
CONFIDENCE = 0.95


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
        model: The model.
        temperature: Of sampling.
        concurrency: Requests in flight.
        workload: A task or a mix of tasks.
        policy: The policy.
        requests: Requests behind the numbers.
        tokens_per_second: Tokens decoded over the time of decoding: of one request at a time, or of
            all that are in flight.
        speedup: Over the baseline; see the module for its definition.
        low: Lower end of the 95% interval of `speedup`.
        high: Its upper end.
        worst: The lowest speed-up of a single pair, a single measurement each.
        each: The speed-up of every pair.
        etr: Tokens emitted per decode step.
        mean_k: Mean of the draft length K chosen for a step.
        mean_drafted: Mean of the draft tokens verified in a step; drafters may have fewer than K.
        off_share: Share of steps at K = 0.
        first_seconds: Median time to the first token (TTFT).
        gaps: Medians over requests of the percentiles in `Row.gaps`.
        controller: Seconds a step that policies took.
    """

    model: str
    temperature: float
    concurrency: int
    workload: str
    policy: str
    requests: int
    tokens_per_second: float | None
    speedup: float | None
    low: float | None
    high: float | None
    worst: float | None
    each: tuple[float, ...]
    etr: float | None
    mean_k: float | None
    mean_drafted: float | None
    off_share: float | None
    first_seconds: float | None
    gaps: tuple[float, float, float] | None
    controller: float | None

    @property
    def condition(self) -> Condition:
        """What it was measured under."""
        return Condition(self.model, self.temperature, self.concurrency)

    @property
    def verdict(self) -> str:
        """What may be said of it against the baseline: faster, slower, or "cannot tell"."""
        if self.low is None or self.high is None:
            return "cannot tell"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "cannot tell"


@dataclass(frozen=True, slots=True)
class Unit:
    """What is paired: a request, or where several are in flight, a block of them."""

    key: tuple[str, ...]
    task: str
    tokens: int
    seconds: float

    @property
    def asked(self) -> str:
        """Its prompts, those that are repeated with another seed under one name."""
        return " ".join(name.partition(REPEATED)[0] for name in self.key[1:])


def condition_of(row: Row) -> Condition:
    """Return the condition under which a row was measured."""
    return Condition(row.model, row.temperature, row.concurrency)


def units(rows: Iterable[Row]) -> list[Unit]:
    """Return the units of one policy's rows under one condition, those without a rate left out."""
    found: list[Unit] = []
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        if row.concurrency == 1:
            if row.decoded:
                found.append(Unit((row.run, row.prompt), row.task, row.decoded, row.decode_seconds))
        else:
            blocks.setdefault(row.block, []).append(row)
    for block in blocks.values():
        key = (block[0].run, *(row.prompt for row in block))
        tokens = sum(row.tokens for row in block)
        tasks = {row.task for row in block}
        task = tasks.pop() if len(tasks) == 1 else "mixed"
        found.append(Unit(key, task, tokens, block[0].block_seconds))
    return found


@dataclass(frozen=True, slots=True)
class Pairs:
    """A policy's units beside a baseline's.

    Attributes:
        before: Seconds of each unit under the baseline, shape (pairs,).
        after: Seconds under the policy for as many tokens, same shape.
        tasks: The task of each pair.
        prompts: What was asked in each; pairs of the same prompt are drawn together.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    tasks: tuple[str, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.tasks)

    @property
    def ratio(self) -> float | None:
        """The speed-up, None where nothing was paired."""
        return float(self.before.sum() / self.after.sum()) if len(self) else None

    @property
    def each(self) -> tuple[float, ...]:
        """The speed-up of every pair."""
        return tuple(float(ratio) for ratio in self.before / self.after)


def pair(policy: Iterable[Unit], baseline: Iterable[Unit]) -> Pairs:
    """Return the units that both have, paired."""
    known = {unit.key: unit for unit in baseline}
    both = [(unit, known[unit.key]) for unit in policy if unit.key in known]
    return Pairs(
        np.array([base.seconds for _, base in both]),
        np.array([base.tokens * unit.seconds / unit.tokens for unit, base in both]),
        tuple(unit.task for unit, _ in both),
        tuple(unit.asked for unit, _ in both),
    )


def interval(pairs: Pairs, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95% interval of the pairs' ratio.

    None where a task has fewer than two prompts, or all of them together have but one to spare: a
    spread seen once says nothing.
    """
    asked = list(zip(pairs.tasks, pairs.prompts, strict=True))
    prompts = list(dict.fromkeys(asked))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    of_pair = [number[prompt] for prompt in asked]
    before = np.bincount(of_pair, pairs.before, len(prompts))
    after = np.bincount(of_pair, pairs.after, len(prompts))
    tasks = np.array([task for task, _ in prompts])
    if not len(pairs) or min(np.unique(tasks, return_counts=True)[1]) < 2:
        return None
    to_spare = len(prompts) - len(set(pairs.tasks))
    if to_spare < 2:
        return None
    random = np.random.default_rng(seed)
    sums = np.zeros((2, RESAMPLES))
    for task in dict.fromkeys(pairs.tasks):
        here = np.flatnonzero(tasks == task)
        n = len(here)
        drawn = here[random.integers(0, n, size=(RESAMPLES, n - 1))]
        sums += n / (n - 1) * np.array([before[drawn].sum(axis=1), after[drawn].sum(axis=1)])
    tail = 100 * (1 - CONFIDENCE) / 2
    ends = np.percentile(sums[0] / sums[1], [tail, 100 - tail])
    found = before.sum() / after.sum()
    low, high = found * (ends / found) ** _wider(to_spare)
    return float(low), float(high)


def _wider(to_spare: int) -> float:
    """Return Student's 97.5% quantile over the normal one, for degrees of freedom of 2 or more.

    By the expansion of Abramowitz and Stegun (26.7.5), within 2% at 2 and 0.3% from 3 on.
    """
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    more: float = sum(term / to_spare**i for i, term in enumerate(terms, 1))
    return 1.0 + more / z


def summarise(rows: Sequence[Row], baseline: str = BASELINE, seed: int = 0) -> list[Cell]:
    """Return a cell for each condition, workload and policy, in order of appearance.

    Args:
        rows: The requests. In a run a prompt appears at most once under a policy and condition.
        baseline: The policy that speed-ups are over.
        seed: Of the bootstrap.

    Raises:
        ConfigError: No request ran under the baseline.
    """
    if all(row.policy != baseline for row in rows):
        raise ConfigError(f"nothing was measured under {baseline!r}, so there is no speed-up")
    cells: list[Cell] = []
    for condition in dict.fromkeys(condition_of(row) for row in rows):
        here = [row for row in rows if condition_of(row) == condition]
        found = list(dict.fromkeys(row.policy for row in here))
        found.sort(key=lambda policy: (policy != baseline, policy != PLAIN))  # stable
        made = workloads(list(dict.fromkeys(row.task for row in here)))
        if condition.concurrency > 1:  # blocks hold all tasks
            made = dict(list(made.items())[-1:])
        for workload, tasks in made.items():
            of_it = [row for row in here if row.task in tasks]
            before = units(row for row in of_it if row.policy == baseline)
            cells += [
                _cell(condition, workload, p, [r for r in of_it if r.policy == p], before, seed)
                for p in found
            ]
    return cells


def _cell(
    condition: Condition,
    workload: str,
    policy: str,
    rows: list[Row],
    baseline: list[Unit],
    seed: int,
) -> Cell:
    measured = units(rows)
    pairs = pair(measured, baseline)
    ends = interval(pairs, seed)
    steps = sum(row.steps for row in rows)
    return Cell(
        model=condition.model,
        temperature=condition.temperature,
        concurrency=condition.concurrency,
        workload=workload,
        policy=policy,
        requests=len(rows),
        tokens_per_second=_ratio(sum(u.tokens for u in measured), sum(u.seconds for u in measured)),
        speedup=pairs.ratio,
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        worst=min(pairs.each, default=None),
        each=pairs.each,
        etr=_ratio(sum(r.emitted for r in rows), steps),
        mean_k=_ratio(sum(r.k_total for r in rows), steps),
        mean_drafted=_ratio(sum(r.drafted for r in rows), steps),
        off_share=_ratio(sum(r.steps_at_0 for r in rows), steps),
        first_seconds=float(np.median([r.first_seconds for r in rows])) if rows else None,
        gaps=_medians([row.gaps for row in rows]),
        controller=_ratio(sum(r.controller_seconds for r in rows), steps),
    )


def _medians(values: Sequence[tuple[float, float, float]]) -> tuple[float, float, float] | None:
    if not values:
        return None
    first, second, third = np.median(np.array(values), axis=0).tolist()
    return first, second, third


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


def by_workload(cells: Iterable[Cell]) -> dict[Condition, dict[str, list[Cell]]]:
    """Return the cells by condition and workload, in order: the last is all tasks together."""
    found: dict[Condition, dict[str, list[Cell]]] = {}
    for cell in cells:
        found.setdefault(cell.condition, {}).setdefault(cell.workload, []).append(cell)
    return found


def totals(cells: Iterable[Cell]) -> dict[Condition, list[Cell]]:
    """Return the cells of all tasks together, by condition."""
    return {condition: list(of.values())[-1] for condition, of in by_workload(cells).items()}


def fastest(cells: Iterable[Cell]) -> str | None:
    """Return the policy whose interval begins above the speed-ups of all others, if one's does.

    None where some were asked more than others: theirs are speed-ups on other prompts.
    """
    known = {cell.policy: cell for cell in cells if cell.speedup is not None}
    best = max(known.values(), key=lambda cell: cell.speedup or 0.0, default=None)
    if best is None or best.policy == BASELINE or best.low is None:
        return None
    if len({len(cell.each) for cell in known.values()}) > 1:
        return None
    others = [cell.speedup or 0.0 for cell in known.values() if cell is not best]
    return best.policy if best.low > max(others, default=1.0) else None


def best_static(cells: Sequence[Cell]) -> Cell | None:
    """Return the fixed K that was best in hindsight among `cells`, None where none was measured.

    Under one condition and workload it is what a table of K by batch size, tuned on this very run,
    would have used: the bar that vLLM's users name. Such a table may say 0, so the baseline is one.
    """
    static = [c for c in cells if c.policy.startswith("static:") and c.speedup is not None]
    base = [c for c in cells if c.policy == BASELINE and c.speedup is not None]
    return max([*static, *base], key=lambda cell: cell.speedup or 0.0) if static else None
