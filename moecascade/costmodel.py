"""What a step costs, by the number of positions that it computes; learnt online, for all requests.

Step time hardly depends on whose tokens are verified, so every decode step teaches it: T(p) seconds
for p positions, a step of n requests and D drafts having n + D. Before anything is known the curve
has the shape of the expert union (`expert_union`); measurements bend it where they are.
"""

from __future__ import annotations

from math import exp, log, log2


def expert_union(positions: float, experts: int, top_k: int) -> float:
    """Return the expected number of experts that `positions` tokens read together.

    ``E * (1 - (1 - k/E)**n)`` for E experts, k of them for a token, routed independently.
    """
    missed: float = (1.0 - top_k / experts) ** positions
    return experts * (1.0 - missed)


class CostModel:
    """Seconds of a step by positions.

    T(p) is a prior curve times a correction, which is the mean of measured over prior times at and
    near p, weighted by how near (in octaves) and how many. Old measurements fade.

    Args:
        experts: Routed experts a layer, and
        top_k: how many of them a token is routed to: they give the prior its shape. 8 and 2 where
            nothing is known.
        share: Part of a single token's step that grows with the experts read; the rest is fixed.
    """

    nearness = 0.12  # octaves within which measurements speak for each other
    memory = 20.0  # steps at one number of positions after which a measurement has faded
    belief = 1.0  # weight of the prior, in measurements
    outlier = 3.0  # a step this many times longer than expected is a pause, not a cost
    settled = 50  # steps after which the curve is not made anew at once, but
    every = 8  # after this many steps
    pauses = 3  # in a row; after them the machine has become slower

    def __init__(self, experts: int = 8, top_k: int = 2, share: float = 0.45) -> None:
        """Start from the prior alone."""
        self._experts, self._top_k, self._share = experts, top_k, share
        self._scale: float | None = None
        self._weight: dict[int, float] = {}
        self._ratio: dict[int, float] = {}
        self._doubted = 0
        self._seen = 0
        self._curve: dict[int, float] = {}

    def observe(self, positions: int, seconds: float) -> None:
        """Learn from a decode step."""
        prior = self._prior(positions)
        if self._scale is None:
            self._scale = seconds / prior
        expected = self._scale * self.relative(positions)
        if seconds > self.outlier * expected and self._doubted < self.pauses:
            self._doubted += 1
            return
        if self._doubted == self.pauses:
            self._scale *= seconds / expected
        self._doubted = 0
        ratio = seconds / (self._scale * prior)
        weight = self._weight.get(positions, 0.0)
        self._weight[positions] = weight = min(weight + 1.0, self.memory)
        before = self._ratio.get(positions, ratio)
        self._ratio[positions] = before + (ratio - before) / weight
        self._seen += 1
        if self._seen < self.settled or self._seen % self.every == 0:
            self._curve.clear()

    def relative(self, positions: int) -> float:
        """Return T(p) in units that are the same for all p."""
        known = self._curve.get(positions)
        if known is None:
            total, weighed = self.belief, self.belief
            here = log2(positions)
            for p, ratio in self._ratio.items():
                weight = self._weight[p] * exp(-abs(log2(p) - here) / self.nearness)
                total += weight
                weighed += weight * ratio
            known = self._curve[positions] = self._prior(positions) * weighed / total
        return known

    def cost(self, requests: int, drafts: int) -> float:
        """Return T(n + D) / T(n): a step with drafts over one without. Never below 1."""
        return max(1.0, self.relative(requests + drafts) / self.relative(requests))

    def _prior(self, positions: int) -> float:
        union = expert_union(positions, self._experts, self._top_k) / self._top_k
        return 1.0 + self._share * (union - 1.0) + 0.02 * log(positions)
