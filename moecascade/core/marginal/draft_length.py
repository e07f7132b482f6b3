"""How many tokens a model drafter should draft: worth the passes that they take, seen in advance.

A drafter without a model drafts for nothing, so all that it finds is looked at. A model's first
token is free as well, for it runs once in every step to follow the text; each further token is a
pass more, and has to be asked for one step before anybody knows what it will be worth. So it is
judged by what drafts of every length were worth lately: the surplus of the slots that would have
been admitted if drafts had ended there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from moecascade.core.cost import Array

DECAY_WORTH = 0.9  # of what drafts were worth, from one step to the next
LOOK_EVERY = 64  # steps after which one token more is drafted, to see what has become of it


# Where drafts are not seen (`Unseen`)
LOOK_EVERY = 64  # steps after which one token more is drafted and verified
BARE_EVERY = 256  # steps after which nothing is drafted, then nothing verified
BARE_FIRST = (4, 8, 16, 32, 64)  # and at first


def surpluses(worth: Array, delay: Array) -> Array:
    """Return the most that drafts of 1, 2, ... tokens can save beyond the delay of verifying them.

    Args:
        worth: Steps that each slot is expected to save, shape (requests, max_k).
        delay: Steps by which the requests together are delayed where 0, 1, ... slots are verified.
    """
    width = worth.shape[1]
    best_first = np.argsort(-worth, axis=None)
    drafted = best_first % width <= np.arange(width)[:, None]  # by length of drafts, and slot
    worths = np.cumsum(np.where(drafted, worth.ravel()[best_first], 0.0), axis=1)
    surplus: Array = (worths - delay[np.cumsum(drafted, axis=1)]).max(axis=1, initial=0.0)
    return surplus


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
        self._worth[1:] += (1.0 - DECAY_WORTH) * (surpluses(worth, delay) - self._worth[1:])

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


class Unseen:
    """The choice where drafts are never seen: what they will be worth does not depend on them.

    Then the K that will be verified is known when the length is chosen, and both are the same, step
    after step. Two things would never show: what one token more is worth, and what a pass costs,
    apart from what verifying its token costs. So now and then one more is drafted and verified, and
    one step drafts nothing beyond the free token, the next verifies nothing.

    Args:
        max_k: Longest draft.

    Attributes:
        further: Whether the draft that was last asked for is one token longer than is thought best.
        bare: Whether none of it is to be verified.
    """

    def __init__(self, max_k: int) -> None:
        """Begin without having looked."""
        self._max_k = max_k
        self._steps = 0
        self.further = self.bare = False

    def turn(self) -> None:
        """A step is planned: say whether something is to be seen. `length` does it as well."""
        self._steps += 1
        self.bare = self._steps % BARE_EVERY == 0 or self._steps in BARE_FIRST
        self.further = self._steps % LOOK_EVERY == 1

    def length(
        self, worth: Array, delay: Array, pass_delay: float, ladder: Collection[int] = ()
    ) -> int:
        """Return how many tokens to draft, at least 1.

        Args:
            worth: As for `surpluses`.
            delay: As for `surpluses`.
            pass_delay: Steps by which one pass of the drafter delays the requests together.
            ladder: The lengths to choose from, where not all are equally good.
        """
        self.turn()
        if self.bare:
            return 1
        lengths = [k for k in range(1, self._max_k + 1) if not ladder or k in ladder] or [1]
        surplus = surpluses(worth, delay)
        gains = [surplus[k - 1] - pass_delay * (k - 1) for k in lengths]
        return min(lengths[int(np.argmax(gains))] + self.further, self._max_k)

    def amend(self, ks: Sequence[int], limits: Sequence[int]) -> list[int]:
        """Return the draft lengths of requests, amended by what is to be seen; at most `limits`."""
        if self.bare:
            return [0] * len(ks)
        if self.further:
            return [min(k + 1, limit) if k else 0 for k, limit in zip(ks, limits, strict=True)]
        return list(ks)
