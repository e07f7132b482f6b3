"""Policy `goodput`: the K with the most expected tokens a second, from one acceptance rate.

Source: SmartSpec (Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models
Using Goodput", arXiv 2406.14066; TurboSpec is its successor). With acceptance rate a, a draft of K
is expected to give ``(1 - a^(K+1)) / (1 - a)`` tokens; the time of a step is linear in the tokens
that it computes; goodput is the one over the other, for the batch, and its maximum over K decides.

Departures: the paper fits the time model offline, from a profile, to tokens computed and to
context; here it is fitted online, to tokens computed, by fading least squares, and the first steps
try a few K so that it can be. Its moving average of a is over all requests, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from moecascade.core.peers.uniform import OneForAll
from moecascade.core.settings import check_ranges
from moecascade.core.step import RequestStep


@dataclass(frozen=True, slots=True)
class GoodputSettings:
    """Constants of the online fit.

    Attributes:
        memory: Steps over which acceptance and step times are averaged.
        first_rate: Acceptance rate before anything is known.
    """

    memory: float = 100.0
    first_rate: float = 0.7

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        check_ranges(self, "goodput", memory=(1, inf), first_rate=(0, 1))


def expected_tokens(rate: float, k: int) -> float:
    """Return the tokens that a draft of `k` is expected to give, at an acceptance rate."""
    return k + 1.0 if rate >= 1.0 else (1.0 - rate ** (k + 1)) / (1.0 - rate)


class Goodput(OneForAll):
    """One K for the batch, from a rate and a line."""

    name = "goodput"
    Settings = GoodputSettings
    learns = True
    settings: GoodputSettings

    def __init__(self, settings: GoodputSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._keep = 1.0 - 1.0 / settings.memory
        self._accepted = settings.first_rate
        self._compared = 1.0
        # Fading sums of 1, x, x^2, y, x y with x the tokens of a step and y its seconds.
        self._sums = np.zeros(5)
        self._trying = [0, 0, max_k, max_k]

    @property
    def rate(self) -> float:
        """The acceptance rate of a draft token, given that those before it were accepted."""
        return self._accepted / self._compared

    def chosen(self, requests: int) -> int:
        """Return the K with the highest goodput."""
        if self._trying:
            return self._trying[0]
        n, x, xx, y, xy = self._sums
        spread = n * xx - x * x
        slope = max(0.0, (n * xy - x * y) / spread) if spread > 1e-9 else 0.0
        start = (y - slope * x) / n if n else 1.0

        def goodput(k: int) -> float:
            seconds = max(start + slope * requests * (k + 1), 1e-9)
            return requests * expected_tokens(self.rate, k) / seconds

        return max(range(self.max_k + 1), key=goodput)

    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Update rate and line."""
        if self._trying and (self._trying[0] == 0 or any(part.drafted for part in parts)):
            self._trying.pop(0)
        for part in parts:
            if part.drafted:
                right = part.accepted
                self._accepted = self._keep * self._accepted + right
                self._compared = self._keep * self._compared + min(right + 1, part.drafted)
        if seconds is not None:
            tokens = sum(1 + part.drafted for part in parts)
            sample = np.array([1.0, tokens, tokens**2, seconds, tokens * seconds])
            self._sums = self._keep * self._sums + sample
