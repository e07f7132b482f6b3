"""The judge by recent drafts: a draft fares much as the request's last ones did.

Coarser than `acceptance`, which reads the text, and a few times cheaper: for batches so large that
time for each request is short. There it is as good (docs/policies.md): a batch reads most experts
anyway, so the question is hardly whether to draft, but who may draft how much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal.judge import Rows, one_by_one, outcome
from moecascade.core.step import RequestStep

REMEMBERED = 4  # drafts of a request that are its state
STATES: int = 3**REMEMBERED
FIRST = 0  # state of a request that has had no draft yet: as if none had been right

# Flat in replay of 16 requests at once (`benchmarks/constants.py --batch 16`): no speed-up changed
# by more than a tenth of a percent in the ranges given.
RENEWED_EVERY = 8  # steps from one renewal of the table to the next: that takes time; from 2 to 32
DECAY_TABLE = 0.98  # of the evidence, at each renewal; from 0.92 to 0.995
BELIEF = 4.0  # drafts that what holds for all states weighs as much as; from 1 to 16
FIRST_CHANCE = 0.4  # of the first token of a draft before anything is known; from 0.1 to 0.8
NEXT_CHANCE = 0.7  # of the others, given that those before were right; from 0.18 to 0.7


class RecentJudge:
    """The table of chances by state, shared by all requests of a policy.

    Args:
        width: Tokens of a draft that it answers for.
    """

    def __init__(self, width: int) -> None:
        """Begin with no evidence."""
        self._states: dict[str, int] = {}  # of the requests, see `judge.outcome`
        self._drafts: dict[str, Sequence[int]] = {}  # that wait for their tokens
        self._width = width
        rights = range(width + 1)
        self._following = [[outcome(s, right, STATES) for right in rights] for s in range(STATES)]
        # Drafts by state and tokens right, those that ended with a wrong token apart from those of
        # which no more was seen.
        self._ended = np.zeros((STATES, width + 1))
        self._cut = np.zeros((STATES, width + 1))
        self._each_ended, self._each_cut = one_by_one(self._ended), one_by_one(self._cut)
        self._steps = 0
        self._survival = self._table()

    def begin(self, request_id: str, _prompt: Sequence[int]) -> None:
        """Begin as if no draft had been right."""
        self._states[request_id] = FIRST

    def end(self, request_id: str) -> None:
        """Forget the request."""
        self._states.pop(request_id, None)
        self._drafts.pop(request_id, None)

    def propose(self, request_ids: Sequence[str], drafts: Sequence[Sequence[int]]) -> Array:
        """Look up the requests' states; see `Judge.propose`."""
        self._drafts = dict(zip(request_ids, drafts, strict=True))
        survival: Array = self._survival[[self._states[name] for name in request_ids]]
        return survival

    def prolonged(self, survival: Rows, _lengths: Sequence[int]) -> Array:
        """Return survival as it is: it does not depend on the draft."""
        return np.asarray(survival)

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Count how the drafts fared; now and then let the table follow."""
        states, drafts, ended = self._states, self._drafts, self._each_ended
        following, width, counts = self._following, self._width, self._width + 1
        for part in parts:
            name, tokens = part.request_id, part.tokens
            draft = drafts.get(name)
            if draft and tokens:
                state = states[name]
                if draft[0] != tokens[0]:  # most are, and time is short
                    ended[state * counts] += 1.0
                    states[name] = following[state][0]
                    continue
                right, compared = 1, min(len(draft), len(tokens), width)
                while right < compared and draft[right] == tokens[right]:
                    right += 1
                fared = ended if right < compared else self._each_cut
                fared[state * counts + right] += 1.0
                states[name] = following[state][right]
        self._drafts = {}
        self._steps += 1
        if self._steps % RENEWED_EVERY == 0:
            self._survival = self._table()
            self._ended *= DECAY_TABLE
            self._cut *= DECAY_TABLE

    def follow(self, _parts: Sequence[RequestStep]) -> None:
        """Compare nothing: the drafts were others."""
        self._drafts = {}

    def _table(self) -> Array:
        """Return the chance that at least 1, 2, ... tokens are accepted, by state."""
        ended = self._ended
        seen = ended + self._cut
        # At least j + 1 tokens right; and: the token at j was compared.
        right = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1][:, 1:]
        tried = right + ended[:, :-1]
        guess = np.full(self._width, NEXT_CHANCE)
        guess[0] = FIRST_CHANCE
        general = (right.sum(axis=0) + BELIEF * guess) / (tried.sum(axis=0) + BELIEF)
        chances = (right + BELIEF * general) / (tried + BELIEF)
        survival: Array = np.cumprod(chances, axis=1)
        return survival
