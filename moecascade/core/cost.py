"""What a step costs, by the number of positions that it computes; learnt online, for all requests.

Step time hardly depends on whose tokens are verified, so every decode step teaches it: T(p) seconds
for p positions, a step of n requests and D drafts having n + D. Before anything is known the curve
has the shape of the expert union (`expert_union`); measurements bend it where they are. Where a
model drafts, each of its passes adds the same to the step at whose end it drafts.
"""

from __future__ import annotations

from math import exp, log2
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = TypeVar("Number", float, Array)

EXACT = 32  # positions up to which each number of them is kept apart; beyond, a 16th of an octave


def expert_union(positions: Number, experts: int, top_k: int) -> Number:
    """Return the expected number of experts that `positions` tokens read together.

    ``E * (1 - (1 - k/E)**n)`` for E experts, k of them for a token, routed independently.
    """
    missed: Number = (1.0 - top_k / experts) ** positions
    return experts * (1.0 - missed)


class CostModel:
    """Seconds of a step by positions.

    T(p) is a level times a shape. The level follows the machine from step to step: its speed drifts
    within seconds (here by half, now and then), for all p alike. The shape is a prior curve times a
    correction, the mean of measured over prior times at and near p, weighted by how near (in
    octaves) and how many; it changes slowly. Old measurements fade.

    Args:
        experts: Routed experts a layer, and
        top_k: how many of them a token is routed to: they give the prior its shape. 1 and 1 for a
            dense model; 8 and 2 where nothing is known.
        share: Part of a single token's step that grows with the experts read; the rest is fixed.
    """

    nearness = 0.12  # octaves within which measurements speak for each other
    memory = 30.0  # steps at one number of positions after which a measurement has faded
    tracking = 0.2  # part of a step's surprise that is taken for the level's
    leap = 1.5  # factor by which one step can be thought to be off, for that
    belief = 1.0  # weight of the prior, in measurements
    outlier = 3.0  # a step this many times longer than expected is a pause, not a cost
    first = 10  # steps that only teach the shape
    settled = 50  # steps after which the curve is not made anew at once, but
    every = 8  # after this many steps
    pauses = 3  # in a row; after them the machine has become slower

    first_pass = 0.1  # a drafter's pass before any was seen, in units of the prior: T(1) is 1, and
    pass_belief = 2.0  # its weight, in measurements

    def __init__(self, experts: int = 8, top_k: int = 2, share: float = 0.45) -> None:
        """Start from the prior alone."""
        self._experts, self._top_k, self._share = experts, top_k, share
        self._pass = self.first_pass
        self._pass_weight = self.pass_belief
        self._level: float | None = None
        self._weight: dict[int, float] = {}  # by class of positions, see `_class_of`
        self._ratio: dict[int, float] = {}
        self._doubted = 0
        self._seen = 0
        self._priors: dict[int, float] = {}
        self._costs: dict[int, Array] = {}
        self._listed: dict[int, list[float]] = {}
        self._curve: Array | None = None
        self._kernel: Array | None = None  # of each point of the curve to what was measured
        self._reach(2 * EXACT)

    def observe(self, positions: int, seconds: float, passes: int = 0) -> None:
        """Learn from a decode step, at whose end a drafter made `passes` (`Step.passes`)."""
        prior = self._priors.get(positions)
        if prior is None:
            prior = self._priors[positions] = float(self._prior(positions))
        if self._level is None:
            self._level = seconds / (prior + self._pass * passes)
        expected = self.relative(positions) + self._pass * passes
        surprise = seconds / (self._level * expected)
        if surprise < 1.0 / self.outlier:
            # What came before was slow for reasons of its own: another program, code compiled,
            # memory touched for the first time. Nothing of it says what drafts cost.
            if self._seen < self.settled:
                self._begin_anew()
                expected = self.relative(positions) + self._pass * passes
            self._level, surprise = seconds / expected, 1.0
        if surprise > self.outlier and self._doubted < self.pauses:
            self._doubted += 1
            return
        if self._doubted == self.pauses:  # no pause: the machine has become slower
            self._level *= surprise
            surprise = 1.0
        self._doubted = 0
        near = _class_of(positions)
        if near not in self._ratio:
            self._kernel = None
        ratio = self._without_passes(positions, seconds / self._level, passes) / prior
        weight = self._weight.get(near, 0.0)
        self._weight[near] = weight = min(weight + 1.0, self.memory)
        before = self._ratio.get(near, ratio)
        self._ratio[near] = before + (ratio - before) / weight
        if self._seen >= self.first:
            self._level *= min(max(surprise, 1.0 / self.leap), self.leap) ** self.tracking
        self._seen += 1
        if self._seen < self.settled or self._seen % self.every == 0:
            self._curve = None
            self._costs.clear()
            self._listed.clear()

    def _begin_anew(self) -> None:
        """Forget the shape that was measured."""
        self._weight.clear()
        self._ratio.clear()
        self._pass, self._pass_weight = self.first_pass, self.pass_belief
        self._seen = 0
        self._kernel = self._curve = None
        self._costs.clear()
        self._listed.clear()

    def _without_passes(self, positions: int, time: float, passes: int) -> float:
        """Learn what passes take; return what the step took without them.

        Both are learnt from the same steps. That tells them apart, for how many tokens are drafted
        and how many verified varies.
        """
        if not passes:
            return time
        target = self.relative(positions)
        self._pass_weight = min(self._pass_weight + 1.0, self.memory)
        found = max(0.0, time - target) / passes
        self._pass += (found - self._pass) / self._pass_weight
        return max(time - self._pass * passes, 0.5 * target)

    def relative(self, positions: int) -> float:
        """Return T(p) in units that are the same for all p."""
        return float(self._reaching(positions)[positions - 1])

    def seconds(self, positions: int, passes: int = 0) -> float | None:
        """Return T(p) and the time of a drafter's passes; None before the first step."""
        if self._level is None:
            return None
        return self._level * (self.relative(positions) + self._pass * passes)

    def confidence(self, positions: int) -> float:
        """Return how much of T(p) was measured, at p or near it: from 0, guessed, towards 1."""
        here = log2(positions)
        weight = sum(
            weight * exp(-abs(here - log2(_middle(near))) / self.nearness)
            for near, weight in self._weight.items()
        )
        return weight / (self.belief + weight)

    def pass_cost(self, requests: int) -> float:
        """Return the time of one pass of the drafter over T(n), a step without drafts."""
        return self._pass / self.relative(requests)

    def cost(self, requests: int, drafts: int) -> float:
        """Return T(n + D) / T(n): a step with drafts over one without. Never below 1."""
        return float(self.costs(requests, drafts)[drafts])

    def costs(self, requests: int, most: int) -> Array:
        """Return `cost` of 0, 1, ..., at least `most` drafts."""
        known = self._costs.get(requests)
        if known is None or len(known) <= most:
            times = self._reaching(requests + most)[requests - 1 :]
            known = self._costs[requests] = np.maximum(1.0, times / times[0])
        return known

    def listed(self, requests: int, most: int) -> list[float]:
        """Return `costs` as a list, which is quicker where few are wanted."""
        known = self._listed.get(requests)
        if known is None or len(known) <= most:
            known = self._listed[requests] = self.costs(requests, most).tolist()
        return known

    def _reaching(self, positions: int) -> Array:
        """Return the curve, which reaches at least `positions`."""
        if positions > len(self._positions):
            self._reach(2 * positions)
        if self._curve is None:
            self._curve = self._drawn()
        return self._curve

    def _reach(self, most: int) -> None:
        """Let the curve reach `most` positions."""
        self._positions = np.arange(1.0, most + 1.0)
        self._points = np.array([_middle(c) for c in range(1, _class_of(most) + 2)])
        self._prior_points = self._prior(self._points)
        self._kernel = self._curve = None

    def _drawn(self) -> Array:
        """Return T(1), T(2), ...: exact where classes are single, else interpolated."""
        if self._kernel is None:
            known = np.log2([_middle(c) for c in self._ratio])
            octaves = np.abs(np.log2(self._points)[:, None] - known)
            self._kernel = np.exp(-octaves / self.nearness)
        near = self._kernel * np.fromiter(self._weight.values(), float, len(self._weight))
        ratios = np.fromiter(self._ratio.values(), float, len(self._ratio))
        correction = (self.belief + near @ ratios) / (self.belief + near.sum(axis=1))
        drawn: Array = np.interp(self._positions, self._points, self._prior_points * correction)
        return drawn

    def _prior(self, positions: Number) -> Number:
        union = expert_union(positions, self._experts, self._top_k) / self._top_k
        prior: Number = 1.0 + self._share * (union - 1.0) + 0.02 * np.log(positions)
        return prior


def _class_of(positions: int) -> int:
    """Return the class in which a number of positions is kept."""
    if positions <= EXACT:
        return positions
    return EXACT + round(16 * (log2(positions) - log2(EXACT)))


def _middle(near: int) -> float:
    """Return the positions that a class stands for."""
    return float(near) if near <= EXACT else EXACT * 2.0 ** ((near - EXACT) / 16)
