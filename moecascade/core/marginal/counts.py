"""The judge by counts alone, for drafts that nobody sees: it knows how many tokens were accepted.

What a draft will earn is taken from what drafts earned in the same state: how the request's last
ones fared, what share of its tokens has been right lately, and how long ago that was. The table of
states is shared by all requests, so that one request's look teaches the others.

Nothing is learnt while nothing is verified. So the chance of a first token is taken for as high as
it may well be: higher than its mean by a part of its own uncertainty. That is the reason to look,
and it ends when looking has told; what it may cost is bounded by the accounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecascade.core.cost import Array
from moecascade.core.marginal.judge import Rows, one_by_one, outcome
from moecascade.core.step import RequestStep

LAST = 9  # outcomes of a request's last two drafts together: see `judge.outcome`
SHARES = 6  # buckets of the share of its tokens that were right
AGES = 5  # buckets of the steps since it had a draft: 0, 1, 2 to 7, 8 to 31, more
STATES = LAST * SHARES * AGES
KEPT = 0.7  # of a request's share, from one draft to the next; to 0.9, slower to see a change
FIRST_SHARE = 0.5  # of a request that has had no draft yet
FIRST_LAST = LAST - 1  # and how its last ones fared: well

# Simulated model drafters, right with a chance of 0.1 to 0.95, passes of 0.05 and 0.3 of a step,
# MoE and dense curves, ten seeds of 40 requests each: the mean over all of the share of the best
# static K's speed was 0.992, and in the ranges given not below 0.99.
RENEWED_EVERY = 4  # steps from one renewal of the table to the next
DECAY = 0.99  # of the evidence, at each renewal; to 0.995
BELIEF = 4.0  # drafts that a guess weighs as much as
STATE_BELIEF = 20.0  # drafts that what holds for more states weighs as much as; from 10 to 50
FIRST_CHANCE = 0.5  # of the first token before anything is known
DOUBT = 0.3  # standard errors by which it is taken to be better than its mean; from 0.3 to 0.5


@dataclass(slots=True)
class _Record:
    """One request: how its drafts fared, and the states in which its steps were decided about."""

    last: int = FIRST_LAST
    share: float = FIRST_SHARE
    age: int = 0
    decided: int = 0  # the step that will be reported next
    state: int = 0  # the one after it


class CountsJudge:
    """The table of chances by state.

    Args:
        width: Tokens of a draft that it answers for.
    """

    def __init__(self, width: int) -> None:
        """Begin with no evidence."""
        self.late = False  # whether a step is decided about before the one before it is known
        self._width = width
        self._records: dict[str, _Record] = {}
        self._tried = np.zeros((STATES, width))
        self._right = np.zeros((STATES, width))
        self._each_tried, self._each_right = one_by_one(self._tried), one_by_one(self._right)
        self._steps = 0
        self._survival = self._table()

    def begin(self, request_id: str, _prompt: Sequence[int]) -> None:
        """Begin as if drafts had been right."""
        self._records[request_id] = _Record()

    def end(self, request_id: str) -> None:
        """Forget the request."""
        self._records.pop(request_id, None)

    def propose(self, request_ids: Sequence[str], _drafts: Sequence[Sequence[int]]) -> Array:
        """Look up the requests' states; see `Judge.propose`."""
        states = []
        for name in request_ids:
            record = self._records[name]
            now = _state(record)
            record.decided, record.state = record.state if self.late else now, now
            states.append(record.state)
        survival: Array = self._survival[states]
        return survival

    def prolonged(self, survival: Rows, _lengths: Sequence[int]) -> Array:
        """Return survival as it is: it does not depend on the draft."""
        return np.asarray(survival)

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Count how drafts fared; now and then let the table follow."""
        for part in parts:
            if part.drafted:
                right, tried = self._fared(part)
                first = self._records[part.request_id].decided * self._width
                for place in range(first, first + tried):
                    self._each_tried[place] += 1.0
                for place in range(first, first + right):
                    self._each_right[place] += 1.0
        self.follow(parts)
        self._steps += 1
        if self._steps % RENEWED_EVERY == 0:
            self._survival = self._table()
            self._tried *= DECAY
            self._right *= DECAY

    def follow(self, parts: Sequence[RequestStep]) -> None:
        """Keep the requests' states."""
        for part in parts:
            record = self._records[part.request_id]
            if part.drafted:
                right, tried = self._fared(part)
                record.last = outcome(record.last, right, LAST)
                record.share = KEPT * record.share + (1.0 - KEPT) * right / tried
                record.age = 0
            else:
                record.age += 1

    def _fared(self, part: RequestStep) -> tuple[int, int]:
        """Return how many tokens of a draft were right, and of how many that is known."""
        drafted = min(part.drafted, self._width)
        return min(part.accepted, drafted), min(part.accepted + 1, drafted)

    def _table(self) -> Array:
        """Return the chance that at least 1, 2, ... tokens are accepted, by state."""
        shape = (LAST, SHARES, AGES, self._width)
        right, tried = self._right.reshape(shape), self._tried.reshape(shape)
        chance: NDArray[np.floating[Any]] = np.empty(self._width)
        before = FIRST_CHANCE  # further on tokens are thought to be as good as those before them
        for place, (r, t) in enumerate(zip(self._right.sum(0), self._tried.sum(0), strict=True)):
            chance[place] = before = (r + BELIEF * before) / (t + BELIEF)
        for axes in ((0, 2), (0,), ()):  # from all states to each
            r, t = right.sum(axis=axes, keepdims=True), tried.sum(axis=axes, keepdims=True)
            chance = (r + STATE_BELIEF * chance) / (t + STATE_BELIEF)
        first = chance[..., 0]
        spread = np.sqrt(first * (1.0 - first) / (tried[..., 0] + BELIEF))
        likely = chance.copy()
        likely[..., 0] = np.minimum(first + DOUBT * spread, 1.0)
        survival: Array = np.cumprod(likely.reshape(STATES, -1), axis=1)
        return survival


def _state(record: _Record) -> int:
    share = min(int(record.share * SHARES), SHARES - 1)
    age = min((record.age.bit_length() + 2) // 2, AGES - 1) if record.age else 0
    return (record.last * SHARES + share) * AGES + age
