"""Speed-ups of paired measurements, with intervals. Pure: numbers in, numbers out.

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

`scipy.stats.bootstrap` knows neither strata nor n - 1, so the forty lines are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Unit:
    """What is paired: a request, or where several are in flight, a block of them.

    Attributes:
        key: Run and prompts: what it is paired by.
        task: The task, that intervals draw within.
        asked: The prompts, repetitions with another seed under one name: what is drawn.
        tokens: Tokens decoded.
        seconds: In this time.
    """

    key: tuple[str, ...]
    task: str
    asked: str
    tokens: float
    seconds: float


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


@dataclass(frozen=True, slots=True)
class Speedup:
    """How much faster one policy is than another.

    Attributes:
        value: The ratio of their times; above 1, the first is faster.
        low: Lower end of its 95% interval, None where there were too few prompts.
        high: Upper end.
        prompts: How many prompts are behind it.
        each: The ratio of every pair, a single measurement each.
    """

    value: float
    low: float | None
    high: float | None
    prompts: int
    each: tuple[float, ...]

    @property
    def pairs(self) -> int:
        """How many pairs are behind it."""
        return len(self.each)

    @property
    def verdict(self) -> str:
        """What may be said of it: faster, slower, or "" where it cannot be told."""
        if self.low is None or self.high is None:
            return ""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else ""


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


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Return the pairs of several conditions together."""
    return Pairs(
        np.concatenate([np.empty(0), *(part.before for part in parts)]),
        np.concatenate([np.empty(0), *(part.after for part in parts)]),
        tuple(task for part in parts for task in part.tasks),
        tuple(prompt for part in parts for prompt in part.prompts),
    )


def speedup(pairs: Pairs, *, pooled: bool = False, seed: int = 0) -> Speedup | None:
    """Return the speed-up of pairs with its interval, None where there are none.

    Args:
        pairs: What was measured.
        pooled: Whether tasks with a single prompt are drawn with all others rather than not at all.
        seed: Of the bootstrap.
    """
    if pairs.ratio is None:
        return None
    ends = interval(pairs, seed)
    if ends is None and pooled:
        ends = interval(replace(pairs, tasks=("",) * len(pairs)), seed)
    low, high = ends or (None, None)
    each = tuple((pairs.before / pairs.after).tolist())
    return Speedup(pairs.ratio, low, high, len(set(pairs.prompts)), each)


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
