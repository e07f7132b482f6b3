"""Policy `sglang-adaptive`: steps by a moving average of the accept length, as SGLang does it.

Source: SGLang, adaptive speculative decoding (documentation page of that name, and its defaults of
2026). Each batch size has candidate step counts, those of the largest of 1, 8, 32, 64 that it
reaches; an exponential average of the drafts accepted per request moves between them, every five
steps, after ten of warm-up: down while the average is at or below the lower candidate - 0.5 +
hysteresis, else up while it is above the present one - 0.5. From K = 0 it goes back up at the next
update.

Departures: SGLang drafts with EAGLE, which always drafts as much as it is asked for; here requests
for which the drafter had nothing are left out, and so are steps without any draft. SGLang looks a
batch size up after rounding it up to the next CUDA graph's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from moecascade.core.peers.uniform import OneForAll
from moecascade.core.settings import check_ranges
from moecascade.core.step import RequestStep

# Candidates by batch size, and by how much less than usual the average must be to go down.
TIERS: dict[int, tuple[tuple[int, ...], float]] = {
    1: ((1, 3, 5, 7), -0.25),
    8: ((0, 1, 3), 0.0),
    32: ((0, 1), 0.0),
    64: ((0,), 0.0),
}
LEAST_ALPHA = 1e-6  # with less the average would hardly ever move


@dataclass(frozen=True, slots=True)
class SglangSettings:
    """SGLang's constants.

    Attributes:
        ema_alpha: Weight of the latest step in the average.
        update_interval: Steps from one change of K to the next possible one.
        warmup: Steps before the first.
        first_k: K to begin with, where it is a candidate; else the middle one.
    """

    ema_alpha: float = 0.2
    update_interval: int = 5
    warmup: int = 10
    first_k: int = 3

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        counts = {"update_interval": (1, inf), "warmup": (0, inf), "first_k": (0, inf)}
        check_ranges(self, "sglang-adaptive", ema_alpha=(LEAST_ALPHA, 1), **counts)


class Tier:
    """The steps for one range of batch sizes.

    Args:
        candidates: Draft lengths to move between, rising.
        down: Hysteresis on the way down.
        settings: The constants.
    """

    def __init__(self, candidates: Sequence[int], down: float, settings: SglangSettings) -> None:
        """Begin at `first_k` or in the middle, with the average one below it."""
        self._candidates = candidates
        self._down = down
        self._settings = settings
        first = settings.first_k
        self._at = candidates.index(first) if first in candidates else len(candidates) // 2
        self.average = float(self.k - 1)
        self._steps = 0

    @property
    def k(self) -> int:
        """The present draft length."""
        return self._candidates[self._at]

    def update(self, accepted: float) -> None:
        """Take the mean number of drafts that a step's requests accepted."""
        s = self._settings
        if self.k:
            self.average += s.ema_alpha * (accepted - self.average)
        self._steps += 1
        if self._steps > s.warmup and (self._steps - s.warmup) % s.update_interval == 0:
            self._move()

    def _move(self) -> None:
        last, before = len(self._candidates) - 1, self._at
        if self.k == 0:
            self._at = min(self._at + 1, last)
            if self.average < 0:
                self.average = float(self.k - 1)
            return
        while self._at:
            lower = self._candidates[self._at - 1]
            if self.average > (lower - 0.5 if lower else 0.5) + self._down:
                break
            self._at -= 1
        if self._at == before:
            while self._at < last and self.average > self.k - 0.5:
                self._at += 1


class SglangAdaptive(OneForAll):
    """One K for the batch, from the accept length."""

    name = "sglang-adaptive"
    Settings = SglangSettings
    learns = True
    settings: SglangSettings

    def __init__(self, settings: SglangSettings, max_k: int) -> None:
        """Begin in the middle; candidates above `max_k` are left out."""
        super().__init__(settings, max_k)
        self._tiers = {
            size: Tier([k for k in candidates if k <= max_k], down, settings)
            for size, (candidates, down) in TIERS.items()
        }

    def chosen(self, requests: int) -> int:
        """Return the K of the tier of this batch size."""
        return self._tier(requests).k

    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Update the tier that the step ran under."""
        tier = self._tier(len(parts))
        accepted = [part.accepted for part in parts if part.drafted]
        if accepted or not tier.k:
            tier.update(max(0.0, sum(accepted) / max(1, len(accepted))))

    def _tier(self, requests: int) -> Tier:
        return self._tiers[max(size for size in self._tiers if size <= max(1, requests))]
