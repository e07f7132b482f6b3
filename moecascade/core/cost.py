"""What a step costs, by the number of positions that it computes; learnt online, for all requests.

Step time hardly depends on whose tokens are verified, so every decode step teaches it: T(p) seconds
for p positions, a step of n requests and D drafts having n + D. Three things are told apart, each a
class: the `Level` is the machine's present speed, which drifts within seconds and for all p alike;
the `Shape` is how T grows with p, which changes slowly; `Passes` is what a model drafter adds to a
step for each of its passes. Where an engine has CUDA graphs for some steps only, `Loose` is what
the others take longer. `CostModel` puts them together, and policies read its `costs`.

The constants were swept in replay (`benchmarks/constants.py`): "flat" names the range in which the
speed-up changed by less than half a percent: 40 recorded answers, most of a Mixtral 8x7B,
one request at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import log2
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = TypeVar("Number", float, Array)

# The shape
EXPERT_SHARE = 0.45  # part of a one-token step that grows with the experts read; flat 0.11 to 0.9
GROWTH = 0.02  # of the prior for each factor e of positions: what grows beside the experts; flat
# from 0.005 to 0.08
EXACT = 32  # positions up to which each number has a bucket; beyond, a 16th of an octave has
NEARNESS = 0.12  # octaves within which measurements speak for each other; flat from 0.03 to 0.48
MEMORY = 30.0  # steps in a bucket after which a measurement has faded; flat from 7.5 to 120
BELIEF = 1.0  # measurements that the prior weighs as much as; flat from 0.25 to 4
SETTLED = 50  # steps after which the curve is drawn anew only in every (flat from 12 to 200)
REDRAWN_EVERY = 8  # steps: drawing takes as long as all else; flat from 2 to 32

# The level
FIRST = 10  # steps that only teach the shape; flat from 2 to 40
TRACKING = 0.2  # part of a step's surprise, in logarithms, that is taken for the level's; flat from
# 0.05 to 0.8
LEAP = 1.5  # most by which one step can be thought to be off, as a factor; flat from 1.5 to 6
OUTLIER = (
    3.0  # a step this many times longer than expected is a pause, not a cost; flat from 1.5 to
)
# 12 where there are no pauses, as in replay
PAUSES = 3  # in a row; after them the machine has become slower (not seen in replay)

# A drafter's passes
FIRST_PASS = 0.1  # a pass before any was seen, in units of the prior, in which T(1) is 1
PASS_BELIEF = 2.0  # measurements that this guess weighs as much as
PASS_MEMORY = 100.0  # measurements after which one has faded
LOOSE_LEARNING = 0.1  # part of a step's surprise that is taken for what a missing graph costs
LEAST_LEFT = 0.5  # of the expected step: what passes can never be thought to have taken


def expert_union(positions: Number, experts: int, top_k: int) -> Number:
    """Return the expected number of experts that `positions` tokens read together.

    ``E * (1 - (1 - k/E)**n)`` for E experts, k of them for a token, routed independently.
    """
    missed: Number = (1.0 - top_k / experts) ** positions
    return experts * (1.0 - missed)


class Level:
    """The machine's present speed: seconds for a unit of the shape.

    Attributes:
        unit: Those seconds; None before the first step.
    """

    def __init__(self) -> None:
        """Begin with nothing known."""
        self.unit: float | None = None
        self._doubted = 0

    def fell(self, seconds: float, expected: float) -> bool:
        """Return whether a step was so short that those before it were no measure."""
        return self.unit is not None and OUTLIER * seconds < self.unit * expected

    def surprise(self, seconds: float, expected: float) -> float | None:
        """Return a step's time over what was expected of it; None for a pause, not to learn from.

        Args:
            seconds: Time of the step.
            expected: What the shape says, in units.
        """
        if self.unit is None or self.fell(seconds, expected):
            self.unit = seconds / expected
        surprise = seconds / (self.unit * expected)
        if surprise > OUTLIER and self._doubted < PAUSES:
            self._doubted += 1
            return None
        if self._doubted == PAUSES:  # no pause: the machine has become slower
            self.unit *= surprise
            surprise = 1.0
        self._doubted = 0
        return surprise

    def follow(self, surprise: float) -> None:
        """Move towards the last step."""
        assert self.unit is not None  # since `surprise`
        self.unit *= min(max(surprise, 1.0 / LEAP), LEAP) ** TRACKING


class Shape:
    """How step time grows with positions: a prior, and a correction where it was measured.

    The correction at p is the mean of measured over prior times at and near p, weighted by how near
    (in octaves) and how many. Old measurements fade.

    Args:
        experts: Routed experts a layer.
        top_k: Experts that a token is routed to.
        expected: Times of 1, 2, 4, 8, ... positions, in any unit, which are the prior where they
            are given; else it follows from the experts.

    Attributes:
        steps: Steps that it has learnt from.
    """

    def __init__(self, experts: int, top_k: int, expected: Sequence[float] = ()) -> None:
        """Start from the prior alone."""
        self._experts, self._top_k = experts, top_k
        self._expected = np.log(expected) - np.log(expected[0]) if expected else None
        self.steps = 0
        self._weight: dict[int, float] = {}  # by bucket
        self._ratio: dict[int, float] = {}  # measured over prior, by bucket
        self._drawn: Array | None = None
        self._kernel: Array | None = None  # of each point of the curve to what was measured
        self._reach(2 * EXACT)

    def curve(self, positions: int) -> Array:
        """Return T(1), T(2), ... in units, at least `positions` of them."""
        if positions > len(self._positions):
            self._reach(2 * positions)
        if self._drawn is None:
            self._drawn = self._draw()
        return self._drawn

    def learn(self, positions: int, time: float) -> None:
        """Learn that a step of so many positions took so many units, once its `curve` was asked."""
        near = bucket(positions)
        if near not in self._ratio:
            self._kernel = None
        ratio = time / self._priors.item(positions - 1)
        self._weight[near] = weight = min(self._weight.get(near, 0.0) + 1.0, MEMORY)
        before = self._ratio.get(near, ratio)
        self._ratio[near] = before + (ratio - before) / weight
        self.steps += 1
        if self.steps < SETTLED or self.steps % REDRAWN_EVERY == 0:
            self._drawn = None

    def measured(self) -> list[tuple[int, float, float]]:
        """Return buckets of positions, what a step took there in units, and how many weigh in."""
        times = [ratio * float(self._prior(middle(near))) for near, ratio in self._ratio.items()]
        return list(zip(self._ratio, times, self._weight.values(), strict=True))

    def _reach(self, most: int) -> None:
        """Let the curve reach `most` positions."""
        self._positions: Array = np.arange(1.0, most + 1.0, dtype=np.float64)
        self._points = np.array([middle(b) for b in range(1, bucket(most) + 2)])
        self._priors, self._prior_points = self._prior(self._positions), self._prior(self._points)
        self._kernel = self._drawn = None

    def _draw(self) -> Array:
        """Return the curve: exact where each number has a bucket, else interpolated."""
        if self._kernel is None:
            known = np.log2([middle(b) for b in self._ratio])
            octaves = np.abs(np.log2(self._points)[:, None] - known)
            self._kernel = np.exp(-octaves / NEARNESS)
        near = self._kernel * np.fromiter(self._weight.values(), float, len(self._weight))
        ratios = np.fromiter(self._ratio.values(), float, len(self._ratio))
        correction = (BELIEF + near @ ratios) / (BELIEF + near.sum(axis=1))
        drawn: Array = np.interp(self._positions, self._points, self._prior_points * correction)
        return drawn

    def _prior(self, positions: Number) -> Number:
        known = self._expected
        if known is not None:  # in octaves, and on as the last one goes
            octaves = np.log2(positions)
            beyond = np.maximum(0.0, octaves - (len(known) - 1)) * (known[-1] - known[-2])
            given: Number = np.exp(np.interp(octaves, np.arange(len(known)), known) + beyond)
            return given
        union = expert_union(positions, self._experts, self._top_k) / self._top_k
        prior: Number = 1.0 + EXPERT_SHARE * (union - 1.0) + GROWTH * np.log(positions)
        return prior


class Passes:
    """What a model drafter's pass takes.

    Told by steps in a row that computed as many positions with another number of passes: then
    nothing else has changed.

    Attributes:
        cost: Units of one pass.
    """

    def __init__(self) -> None:
        """Start from a guess."""
        self.cost = FIRST_PASS
        self._weight = PASS_BELIEF
        self._last = (0, 0, 0.0)  # positions, passes, units of the last step

    def split(self, time: float, target: float, passes: int, positions: int) -> float:
        """Learn what passes take; return what the step took without them.

        Args:
            time: Units that the step took.
            target: Units that it was expected to take without passes.
            passes: How many there were.
            positions: How many it computed.
        """
        there, before, took = self._last
        self._last = (positions, passes, time)
        if there == positions and passes != before:
            more = passes - before
            weight = float(more * more)
            self._weight = min(self._weight + weight, PASS_MEMORY)
            found = (time - took) / more
            self.cost = max(0.0, self.cost + (found - self.cost) * weight / self._weight)
        return max(time - self.cost * passes, LEAST_LEFT * target)


class Loose:
    """How much longer a step takes that the engine has no whole CUDA graph for.

    It has them for steps whose requests all verify one draft length of a *ladder*. Told from the
    shape, which is learnt at the same time, by what is above or below it where both kinds occur.

    Args:
        ladder: The draft lengths; none where the engine makes no such difference.

    Attributes:
        factor: Time of such a step over one of as many positions that has its graph, at least 1.
    """

    def __init__(self, ladder: Sequence[int]) -> None:
        """Start without a difference."""
        self.ladder = frozenset(ladder)
        self.factor = 1.0
        self._share = 0.5  # of steps that are loose, lately

    def of(self, ks: Sequence[int]) -> float:
        """Return the factor of a step that verifies so many drafts of its requests."""
        return 1.0 if not self.ladder or self._fits(ks) else self.factor

    def split(self, time: float, target: float, ks: Sequence[int]) -> float:
        """Learn from a step; return what it would have taken with a graph.

        Args:
            time: Units that it took.
            target: Units that it was expected to take with a graph.
            ks: Drafts that it verified of its requests.
        """
        if not self.ladder:
            return time
        loose = not self._fits(ks)
        left = time / self.of(ks)
        self._share += LOOSE_LEARNING * (loose - self._share)
        surprise = min(max(left / target, 1.0 / LEAP), LEAP)
        self.factor = max(1.0, self.factor * surprise ** (LOOSE_LEARNING * (loose - self._share)))
        return left

    def _fits(self, ks: Sequence[int]) -> bool:
        return ks[0] in self.ladder and len(set(ks)) == 1


class CostModel:
    """Seconds of a step by positions: level times (shape, longer where it is loose, + passes).

    Args:
        experts: Routed experts a layer, which give the prior its shape; 1 for a dense model.
        top_k: Experts that a token is routed to; 1 for a dense model.
        ladder: See `Loose`.
        expected: See `Shape`.
    """

    def __init__(
        self,
        experts: int = 8,
        top_k: int = 2,
        ladder: Sequence[int] = (),
        expected: Sequence[float] = (),
    ) -> None:
        """Start from the prior alone."""
        self._experts, self._top_k, self._prior = experts, top_k, expected
        self._level = Level()
        self._loose = Loose(ladder)
        self._begin()

    @property
    def ladder(self) -> Collection[int]:
        """Draft lengths for which the engine has whole CUDA graphs."""
        return self._loose.ladder

    def factor(self, ks: Sequence[int]) -> float:
        """Return what a step with these drafts takes, over what `costs` say."""
        return self._loose.of(ks) / self._loose.of((0,)) if self._loose.ladder else 1.0

    def _begin(self) -> None:
        """Forget the shape that was measured, and passes."""
        self._shape = Shape(self._experts, self._top_k, self._prior)
        self._passes = Passes()
        self._read: Array | None = None  # the curve that `_costs` are of
        self._costs: dict[int, Array] = {}  # by requests

    def observe(
        self, positions: int, seconds: float, passes: int = 0, ks: Sequence[int] = (0,)
    ) -> None:
        """Learn from a decode step.

        Args:
            positions: That it computed.
            seconds: That it took.
            passes: That a drafter made at its end (`Step.passes`).
            ks: Drafts that it verified of its requests.
        """
        level, factor = self._level, self._loose.of(ks)
        target = self._expected(positions)
        expected = target * factor + self._passes.cost * passes
        if self._shape.steps < SETTLED and level.fell(seconds, expected):
            # What came before was slow for reasons of its own: another program, code compiled,
            # memory touched for the first time. Nothing of it says what drafts cost.
            self._begin()
            target = self._expected(positions)
            expected = target * factor + self._passes.cost * passes
        surprise = level.surprise(seconds, expected)
        if surprise is None or level.unit is None:
            return
        took = self._passes.split(seconds / level.unit, target * factor, passes, positions)
        self._shape.learn(positions, self._loose.split(took, target, ks))
        if self._shape.steps > FIRST:
            level.follow(surprise)

    def costs(self, requests: int, most: int) -> Array:
        """Return T(n + D) / T(n), never below 1, for 0, 1, ..., at least `most` drafts D.

        Both with a graph of their own or both without; else see `factor`.

        Args:
            requests: Requests in the batch, n.
            most: Drafts of all of them together.
        """
        curve = self._shape.curve(requests + most)
        if curve is not self._read:
            self._read, self._costs = curve, {}
        known = self._costs.get(requests)
        if known is None:
            times = curve[requests - 1 :]
            known = self._costs[requests] = np.maximum(1.0, times / times[0])
        return known

    def cost(self, requests: int, drafts: int, passes: int = 0, ks: Sequence[int] = (0,)) -> float:
        """Return the time of a step with drafts and passes over one without."""
        cost = self.costs(requests, drafts).item(drafts) * self.factor(ks)
        return cost + passes * self.pass_cost(requests) if passes else cost

    def pass_cost(self, requests: int) -> float:
        """Return the time of one pass of the drafter over T(n), a step without drafts."""
        return self._passes.cost / (self._expected(requests) * self._loose.of((0,)))

    def seconds(self, positions: int, passes: int = 0, ks: Sequence[int] = (0,)) -> float | None:
        """Return the time of a step; None before the first."""
        unit = self._level.unit
        expected = self._expected(positions) * self._loose.of(ks) + self._passes.cost * passes
        return None if unit is None else unit * expected

    def measured(self) -> list[tuple[int, float, float]]:
        """Return what was measured: buckets of positions, seconds at the present level, steps."""
        unit = self._level.unit or 0.0
        return [(near, unit * time, steps) for near, time, steps in self._shape.measured()]

    def _expected(self, positions: int) -> float:
        """Return the units that a step without passes should take."""
        return self._shape.curve(positions).item(positions - 1)


def bucket(positions: int) -> int:
    """Return the bucket in which measurements of a number of positions are kept."""
    if positions <= EXACT:
        return positions
    return EXACT + round(16 * (log2(positions) - log2(EXACT)))


def middle(near: int) -> float:
    """Return the positions that a bucket stands for."""
    return float(near) if near <= EXACT else EXACT * 2.0 ** ((near - EXACT) / 16)
