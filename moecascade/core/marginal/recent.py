"""The judge by recent drafts: a draft fares much as the request's last ones did.

Coarser than `acceptance`, which reads the text, and thirty times cheaper: for batches so
large that time for each request is short. There it is as good (docs/policies.md): a batch reads
most experts anyway, so the question is hardly whether to draft, but who may draft how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal.judge import Rows, outcome
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


@dataclass(slots=True)
class _Record:
    """One request: its state, see `judge.outcome`, and the draft that waits for its tokens."""

    state: int = FIRST
    draft: Sequence[int] = ()


class RecentJudge:
    """The table of chances by state, shared by all requests of a policy.

    Args:
        width: Tokens of a draft that it answers for.
    """

    def __init__(self, width: int) -> None:
        """Begin with no evidence."""
        self._records: dict[str, _Record] = {}
        self._width = width
        # Drafts by state and tokens right, those that ended with a wrong token apart from those of
        # which no more was seen. Lists, because one number at a time is changed.
        self._ended = [0.0] * (STATES * (width + 1))
        self._cut = [0.0] * (STATES * (width + 1))
        self._steps = 0
        self._survival = self._table()

    def begin(self, request_id: str, _prompt: Sequence[int]) -> None:
        """Begin as if no draft had been right."""
        self._records[request_id] = _Record()

    def end(self, request_id: str) -> None:
        """Forget the request."""
        self._records.pop(request_id, None)

    def propose(self, request_ids: Sequence[str], drafts: Sequence[Sequence[int]]) -> Array:
        """Look up the requests' states; see `Judge.propose`."""
        states = []
        for request_id, draft in zip(request_ids, drafts, strict=True):
            record = self._records[request_id]
            record.draft = draft
            states.append(record.state)
        survival: Array = self._survival[states]
        return survival

    def prolonged(self, survival: Rows, _lengths: Sequence[int]) -> Array:
        """Return survival as it is: it does not depend on the draft."""
        return np.asarray(survival)

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Count how the drafts fared; now and then let the table follow."""
        records, count = self._records, self._count
        for part in parts:
            record, tokens = records[part.request_id], part.tokens
            if record.draft and tokens:
                record.state = count(record.state, record.draft, tokens)
                record.draft = ()
        self._steps += 1
        if self._steps % RENEWED_EVERY == 0:
            self._survival = self._table()
            self._ended = [DECAY_TABLE * count for count in self._ended]
            self._cut = [DECAY_TABLE * count for count in self._cut]

    def follow(self, parts: Sequence[RequestStep]) -> None:
        """Compare nothing: the drafts were others."""
        for part in parts:
            self._records[part.request_id].draft = ()

    def _count(self, state: int, draft: Sequence[int], tokens: Sequence[int]) -> int:
        """Count a draft by the tokens that were written; return the request's next state."""
        if draft[0] != tokens[0]:  # most are, and time is short
            self._ended[state * (self._width + 1)] += 1.0
            return outcome(state, 0, STATES)
        right, compared = 1, min(len(draft), len(tokens), self._width)
        while right < compared and draft[right] == tokens[right]:
            right += 1
        counts = self._ended if right < compared else self._cut
        counts[state * (self._width + 1) + right] += 1.0
        return outcome(state, right, STATES)

    def _table(self) -> Array:
        """Return the chance that at least 1, 2, ... tokens are accepted, by state."""
        ended = np.array(self._ended).reshape(STATES, -1)
        seen = ended + np.array(self._cut).reshape(STATES, -1)
        # At least j + 1 tokens right; and: the token at j was compared.
        right = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1][:, 1:]
        tried = right + ended[:, :-1]
        guess = np.full(self._width, NEXT_CHANCE)
        guess[0] = FIRST_CHANCE
        general = (right.sum(axis=0) + BELIEF * guess) / (tried.sum(axis=0) + BELIEF)
        chances = (right + BELIEF * general) / (tried + BELIEF)
        survival: Array = np.cumprod(chances, axis=1)
        return survival
