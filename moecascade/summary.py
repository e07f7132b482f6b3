"""From measured requests to the numbers that a table or a plot shows. Pure: no clock, no files.

Requests are compared in pairs: the same prompt under a policy and under the baseline, `off`. Their
answers may differ in length (in bfloat16 a near-tie may fall differently when the batch's shape
changes), so what is compared is the time for equally many tokens. For prompt i let ``n_i`` be the
tokens that the baseline decoded, ``s_i`` its seconds per token and ``p_i`` the policy's. Then

    speed-up = sum_i(n_i * s_i) / sum_i(n_i * p_i)

is the time that the baseline took, over the time that the policy takes for as many tokens. The
interval is a percentile bootstrap over prompts; pairs stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecascade.errors import ConfigError

BASELINE = "off"
ALL = "all"
"""The name of the mix: the requests of all tasks taken together."""

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Row:
    """One measured request.

    Attributes:
        request: Its name, as in the step log.
        prompt: The prompt's name.
        task: The prompt's task.
        policy: Spec of the policy that it ran under.
        place: Which it was among the policies on this prompt, from 0; rotated, so drift cancels.
        seed: Seed of its sampling.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens generated.
        decoded: Tokens generated after the first message of the stream.
        first_seconds: From sending to the first message.
        decode_seconds: From the first message to the last.
        finish_reason: Why it ended.
        steps: Decode steps that it took part in, from the step log.
        emitted: Tokens that those steps gave it.
        drafted: Draft tokens that those steps verified.
        k_total: Sum over those steps of the draft length K that the policy chose.
        steps_at_0: How many of them the policy ran at K = 0.
        step_seconds: Their time as the engine measured it; `decode_seconds` is what a user saw.
        text: What the model wrote.
    """

    request: str
    prompt: str
    task: str
    policy: str
    place: int
    seed: int
    prompt_tokens: int
    tokens: int
    decoded: int
    first_seconds: float
    decode_seconds: float
    finish_reason: str
    steps: int
    emitted: int
    drafted: int
    k_total: int
    steps_at_0: int
    step_seconds: float
    text: str

    @property
    def seconds_per_token(self) -> float:
        """Decode time per token (TPOT), in seconds; needs a second token."""
        return self.decode_seconds / self.decoded


@dataclass(frozen=True, slots=True)
class Cell:
    """A policy on a task, in numbers. None where nothing was measured that would tell.

    Attributes:
        task: The task, or `ALL`.
        policy: The policy.
        requests: Requests behind the numbers.
        tokens_per_second: Tokens decoded over the time of decoding, for one request at a time.
        speedup: Over the baseline; see the module for its definition.
        low: Lower end of the 95% interval of `speedup`.
        high: Its upper end.
        worst: The lowest speed-up of a single prompt, a single measurement each.
        each: The speed-up of every prompt.
        etr: Tokens emitted per decode step.
        mean_k: Mean of the draft length K chosen for a step.
        mean_drafted: Mean of the draft tokens verified in a step; drafters may have fewer than K.
        off_share: Share of steps at K = 0.
    """

    task: str
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


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Cell]:
    """Return a cell for each task and policy, in order of appearance, `ALL` last.

    Args:
        rows: The requests. A prompt appears at most once under a policy.
        seed: Of the bootstrap.

    Raises:
        ConfigError: No request ran under the baseline.
    """
    if all(row.policy != BASELINE for row in rows):
        raise ConfigError(f"nothing was measured under {BASELINE!r}, so there is no speed-up")
    tasks = list(dict.fromkeys(row.task for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    policies.sort(key=lambda policy: policy != BASELINE)  # stable: the baseline first
    cells: list[Cell] = []
    for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
        of_task = [row for row in rows if task in (ALL, row.task)]
        baseline = {row.prompt: row for row in of_task if row.policy == BASELINE}
        cells += [
            _cell(task, policy, [r for r in of_task if r.policy == policy], baseline, seed)
            for policy in policies
        ]
    return cells


def _cell(task: str, policy: str, rows: list[Row], baseline: dict[str, Row], seed: int) -> Cell:
    pairs = [
        (row, baseline[row.prompt])
        for row in rows
        if row.decoded and row.prompt in baseline and baseline[row.prompt].decoded
    ]
    before = np.array([base.decode_seconds for _, base in pairs])
    after = np.array([base.decoded * row.seconds_per_token for row, base in pairs])
    low, high = interval(before, after, seed) if len(pairs) > 1 else (None, None)
    each = tuple(float(ratio) for ratio in before / after)
    steps = sum(row.steps for row in rows)
    return Cell(
        task=task,
        policy=policy,
        requests=len(rows),
        tokens_per_second=_ratio(sum(r.decoded for r in rows), sum(r.decode_seconds for r in rows)),
        speedup=_ratio(float(before.sum()), float(after.sum())),
        low=low,
        high=high,
        worst=min(each, default=None),
        each=each,
        etr=_ratio(sum(r.emitted for r in rows), steps),
        mean_k=_ratio(sum(r.k_total for r in rows), steps),
        mean_drafted=_ratio(sum(r.drafted for r in rows), steps),
        off_share=_ratio(sum(r.steps_at_0 for r in rows), steps),
    )


def interval(
    before: NDArray[np.float64], after: NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """Return the 95% interval of ``sum(before) / sum(after)`` by paired bootstrap.

    Args:
        before: Seconds of each prompt under the baseline, shape (prompts,).
        after: Seconds under the policy for as many tokens, same shape.
        seed: Of the resampling.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(before), size=(RESAMPLES, len(before)))
    ratios = before[chosen].sum(axis=1) / after[chosen].sum(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


def cell_of(cells: Iterable[Cell], task: str, policy: str) -> Cell:
    """Return the cell of a task and a policy; KeyError where there is none."""
    for cell in cells:
        if (cell.task, cell.policy) == (task, policy):
            return cell
    raise KeyError((task, policy))
