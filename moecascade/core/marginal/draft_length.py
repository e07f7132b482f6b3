"""How many tokens a model drafter should draft: worth the passes that they take, seen in advance.

A drafter without a model drafts for nothing, so all that it finds is looked at. A model's first
token is free as well, for it runs once in every step to follow the text; each further token is a
pass more, and has to be asked for one step before anybody knows what it will be worth. So it is
judged by what drafts of every length were worth lately: the surplus of the slots that would have
been admitted if drafts had ended there.
"""

from __future__ import annotations

import numpy as np

from moecascade.core.cost import Array

DECAY_WORTH = 0.9  # of what drafts were worth, from one step to the next
LOOK_EVERY = 64  # steps after which one token more is drafted, to see what has become of it


class Drafting:
    """The choice, for all requests of a batch together: they are drafted for at once.

    Args:
        max_k: Longest draft.
    """

    def __init__(self, max_k: int) -> None:
        """Begin with the token that costs nothing."""
        self._worth = np.zeros(max_k + 1)  # of drafts of each length, in request-steps saved
        self._steps = 0

    def consider(self, worth: Array, delay: Array) -> None:
        """Take what the drafts of a step would be worth.

        Args:
            worth: Steps that each slot is expected to save, shape (requests, max_k); beyond a
                draft's end, what the next tokens would probably save.
            delay: Steps by which the requests together are delayed where 0, 1, ... slots are
                verified, at least ``worth.size`` of them.
        """
        lately = np.zeros_like(self._worth)
        best_first = np.argsort(-worth, axis=None)
        slots, place = worth.ravel()[best_first], best_first % worth.shape[1]
        for k in range(1, worth.shape[1] + 1):
            drafted = slots[place < k]
            surplus = np.cumsum(drafted) - delay[1 : drafted.size + 1]
            lately[k] = max(0.0, float(surplus.max()))
        self._worth += (1.0 - DECAY_WORTH) * (lately - self._worth)

    def length(self, pass_delay: float) -> int:
        """Return how many tokens to draft, at least 1.

        Args:
            pass_delay: Steps by which one pass of the drafter delays the requests together.
        """
        self._steps += 1
        passes = np.arange(len(self._worth)) - 1.0
        best = int((self._worth - pass_delay * passes)[1:].argmax()) + 1
        look = self._steps % LOOK_EVERY == 0
        return min(best + look, len(self._worth) - 1)
