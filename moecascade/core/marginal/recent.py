"""How many tokens of a draft will be accepted, judged by how the request's last drafts fared.

Coarser than `acceptance`, which reads the text, and thirty times cheaper: for batches so
large that time for each request is short. There it is as good (docs/policies.md): a batch reads
most experts anyway, so the question is hardly whether to draft, but who may draft how much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAFTS = 4  # that are remembered of a request
STATES: int = 3**DRAFTS
FIRST = 0  # state of a request that has had no draft yet: as if none had been right

EVERY = 8  # steps from one renewal of the table to the next
KEEP = 0.98  # of the evidence, at each renewal
BELIEF = 4.0  # drafts' worth of belief in what holds for all states
GUESS = 0.4  # chance of the first token of a draft before anything is known, and
NEXT = 0.7  # of the others, given that those before were right


class History:
    """The table, shared by all requests of a policy.

    A request's state is what became of its last `DRAFTS` drafts: no token right, one or two, more.

    Args:
        max_k: Longest draft.
    """

    def __init__(self, max_k: int) -> None:
        """Begin with no evidence."""
        self._width = max_k + 1
        # Drafts by state and tokens right, those that ended with a wrong token apart from those of
        # which no more was seen. Lists, because one number at a time is changed.
        self._ended = [0.0] * (STATES * self._width)
        self._cut = [0.0] * (STATES * self._width)
        self._steps = 0
        self._renew()

    def survival(self, states: Sequence[int]) -> NDArray[np.float64]:
        """Return the chance that at least 1, 2, ... tokens are accepted, shape (states, max_k)."""
        found: NDArray[np.float64] = self._survival[states]
        return found

    def ranked(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return the slots of all states by their chances, best first, and these.

        Slot ``state * max_k + i`` is token i + 1 of a draft in that state; those of one state are
        in order.
        """
        return self._slots, self._chances

    def learn(self, state: int, draft: Sequence[int], tokens: Sequence[int]) -> int:
        """Compare a draft with the tokens that were generated; return the request's next state.

        Args:
            state: The request's state when the draft was made.
            draft: The draft, verified or not, at least one token.
            tokens: What the step emitted, at least one token.
        """
        if draft[0] != tokens[0]:  # most are, and time is short
            self._ended[state * self._width] += 1.0
            return 3 * state % STATES
        right, compared = 1, min(len(draft), len(tokens))
        while right < compared and draft[right] == tokens[right]:
            right += 1
        counts = self._ended if right < compared else self._cut
        counts[state * self._width + right] += 1.0
        return (3 * state + (1 if right < 3 else 2)) % STATES

    def step(self) -> None:
        """Count a step: now and then the table follows what was learnt."""
        self._steps += 1
        if self._steps % EVERY == 0:
            self._renew()
            self._ended = [KEEP * count for count in self._ended]
            self._cut = [KEEP * count for count in self._cut]

    def _renew(self) -> None:
        """Let the table follow the evidence."""
        self._survival = self._table()
        self._slots = np.argsort(-self._survival, axis=None, kind="stable")
        self._chances = self._survival.ravel()[self._slots]

    def _table(self) -> NDArray[np.float64]:
        ended = np.array(self._ended).reshape(STATES, self._width)
        seen = ended + np.array(self._cut).reshape(STATES, self._width)
        # At least j + 1 tokens right; and: the token at j was compared.
        right = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1][:, 1:]
        tried = right + ended[:, :-1]
        guess = np.full(self._width - 1, NEXT)
        guess[0] = GUESS
        general = (right.sum(axis=0) + BELIEF * guess) / (tried.sum(axis=0) + BELIEF)
        chances = (right + BELIEF * general) / (tried + BELIEF)
        survival: NDArray[np.float64] = np.cumprod(chances, axis=1)
        return survival
