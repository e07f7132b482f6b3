"""Policy `bandit`: every K an arm, the one with the highest upper confidence bound is pulled.

Source: BanditSpec (Hou et al., arXiv 2505.15141) with UCBSpec as its code has it: arms K = 1 to 4,
each tried twice first; the reward of a step is its throughput; an arm's bound is its mean reward
plus ``sqrt(6 ln t / n)`` for n pulls of it in t steps. One K for the batch.

Departures: the unit of throughput decides how much is explored, and the paper's code leaves it
open; here it is tokens per request and baseline step, with the shortest mean time of an arm as
baseline. State goes on from request to request, as in a server there is no first one. Where the
drafter had nothing for any request no arm was pulled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, sqrt

from moecascade.core.peers.uniform import OneForAll
from moecascade.core.settings import check_ranges
from moecascade.core.step import RequestStep


@dataclass(frozen=True, slots=True)
class BanditSettings:
    """The paper's constants.

    Attributes:
        first_arm: Lowest K among the arms; the paper has no 0.
        last_arm: Highest K.
        rounds: How often each arm is pulled to begin with.
        exploration: Factor under the root.
    """

    first_arm: int = 1
    last_arm: int = 4
    rounds: int = 2
    exploration: float = 6.0

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        check_ranges(self, "bandit", first_arm=(0, self.last_arm))
        check_ranges(self, "bandit", rounds=(1, inf), exploration=(0, inf))


@dataclass(slots=True)
class _Arm:
    """What is known of one K."""

    k: int
    pulls: int = 0
    tokens: float = 0.0  # per request, summed over pulls
    seconds: float = 0.0


class Bandit(OneForAll):
    """One K for the batch, by UCB."""

    name = "bandit"
    Settings = BanditSettings
    learns = True
    settings: BanditSettings

    def __init__(self, settings: BanditSettings, max_k: int) -> None:
        """Begin without evidence; arms above `max_k` are left out."""
        super().__init__(settings, max_k)
        last = min(settings.last_arm, max_k)
        self._arms = [_Arm(k) for k in range(min(settings.first_arm, last), last + 1)]

    def chosen(self, requests: int) -> int:
        """Return the K of the arm to pull."""
        few = [arm for arm in self._arms if arm.pulls < self.settings.rounds]
        if few:
            return min(few, key=lambda arm: (arm.pulls, arm.k)).k
        total = sum(arm.pulls for arm in self._arms)
        unit = min(arm.seconds / arm.pulls for arm in self._arms)

        def bound(arm: _Arm) -> float:
            reward = arm.tokens / arm.seconds * unit
            return reward + sqrt(self.settings.exploration * log(total) / arm.pulls)

        return max(self._arms, key=bound).k

    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Reward the arm that was pulled."""
        arm = next((arm for arm in self._arms if arm.k == self._k), None)
        if arm is not None and seconds and (not arm.k or any(part.drafted for part in parts)):
            arm.pulls += 1
            arm.tokens += sum(part.emitted for part in parts) / len(parts)
            arm.seconds += seconds
