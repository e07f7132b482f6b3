"""A request played against a policy with given costs and acceptance: what property tests drive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.policies import Policy

BASE = 0.025  # seconds of a step without drafts; any positive number will do


@dataclass(frozen=True)
class Played:
    """What happened: the decision of each step, tokens and time in baseline steps."""

    ks: list[int]
    why: list[str]
    tokens: float
    time: float

    @property
    def slowdown(self) -> float:
        """Time lost against no speculation, as a share of it."""
        return self.time / self.tokens - 1

    def phases(self) -> list[tuple[str, int, int]]:
        """Runs of equal decisions as (why, K, steps)."""
        runs = groupby(zip(self.why, self.ks, strict=True))
        return [(why, k, len(list(run))) for (why, k), run in runs]


def play(
    policy: Policy,
    steps: int,
    cost: Callable[[int, int], float],
    emitted: Callable[[int, int], float],
    max_k: int = 8,
    request_id: str = "r",
) -> Played:
    """Play one request for `steps` steps; `cost` and `emitted` are functions of step and K.

    Tokens per step may be fractions: then they are the expectation, free of noise.
    """
    policy.add(request_id, max_k)
    ks, why = [], []
    tokens = time = 0.0
    for i in range(steps):
        (decision,) = policy.decide([Proposal(request_id)])
        k = decision.k
        gained, spent = emitted(i, k), cost(i, k)
        part = RequestStep(request_id, k, gained)  # type: ignore[arg-type]
        policy.observe(Step(spent * BASE, True, (part,)))
        ks.append(k)
        why.append(decision.why)
        tokens += gained
        time += spent
    policy.drop(request_id)
    return Played(ks, why, tokens, time)


def curve(costs: Sequence[float]) -> Callable[[int, int], float]:
    """Return a cost function that reads the curve by K."""
    return lambda _step, k: costs[k]
