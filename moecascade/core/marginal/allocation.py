"""Which draft tokens of a batch to verify: all its (request, position) slots compete.

A slot is worth the chance that its token is accepted over the rate at which the request gets tokens
(lambda): an accepted token saves 1/lambda of a baseline step. Verifying it delays all n requests.
Admitted are the best slots, as many as make worth less delay highest. A request's slots are worth
less and less, so what is admitted of a draft is always its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Whole = NDArray[np.intp]


@dataclass(slots=True)
class Rate:
    """Tokens per baseline step, old ones fading: lambda.

    Attributes:
        tokens: Tokens given.
        time: Baseline steps that they took.
    """

    tokens: float
    time: float

    def add(self, tokens: float, time: float, keep: float) -> None:
        """Add a step; of what was before a part `keep` counts on."""
        self.tokens = keep * self.tokens + tokens
        self.time = keep * self.time + time

    @property
    def value(self) -> float:
        """The rate, at least 1: without drafts it is 1."""
        return max(1.0, self.tokens / self.time)


def admitted(worths: Iterable[float], requests: int, costs: Sequence[float]) -> int:
    """Return how many slots are admitted.

    Args:
        worths: Of the slots, best first.
        requests: Requests in the batch.
        costs: Time of a step with 0, 1, ... drafts over one without, at least as many as slots.
    """
    best, most, worth = 0, 0.0, 0.0
    for count, gain in enumerate(worths, 1):
        worth += gain
        surplus = worth - requests * (costs[count] - 1.0)
        if surplus > most:
            best, most = count, surplus
    return best


def by_state(
    states: Whole,
    lengths: Whole,
    width: int,
    ranked: tuple[Whole, Array],
    rate: float,
    costs: Array,
    requests: int,
) -> list[int]:
    """Return how many tokens of each draft are admitted, where drafts in one state are alike.

    The same as `admitted`, but what is sorted are the slots of states, which are few, each as often
    as there are drafts that have it.

    Args:
        states: The state of each draft, shape (n,).
        lengths: How many of its tokens may be verified, shape (n,).
        width: The most that these can be.
        ranked: The slots of all states, ``state * width + place``, best first, and their chances.
        rate: Lambda, one for all.
        costs: As for `admitted`.
        requests: Likewise; may be more than there are drafts here.
    """
    slots, chances = ranked
    number = slots.size // width
    ending = np.bincount(states * (width + 1) + lengths, minlength=number * (width + 1))
    having = ending.reshape(number, -1)[:, :0:-1].cumsum(axis=1)[:, ::-1]
    counts = having.ravel()[slots]
    worth = np.repeat(chances / rate, counts)
    surplus = np.cumsum(worth) - requests * (costs[1 : worth.size + 1] - 1.0)
    best = int(surplus.argmax()) + 1 if worth.size and surplus.max() > 0.0 else 0
    through = counts.cumsum()
    whole = int(np.searchsorted(through, best, side="right"))  # slots for all that have them
    ks = np.minimum(np.bincount(slots[:whole] // width, minlength=number)[states], lengths)
    if whole < slots.size:  # the next one is for some
        some = best - (int(through[whole - 1]) if whole else 0)
        of, place = divmod(int(slots[whole]), width)
        ks[np.flatnonzero((states == of) & (lengths > place))[:some]] += 1
    found: list[int] = ks.tolist()
    return found
