"""Which draft tokens of a batch to verify: all its (request, position) slots compete.

A slot is worth the chance that its token is accepted over the rate at which the request gets tokens
(lambda): an accepted token saves 1/lambda of a baseline step. Verifying it delays all n requests.
Admitted are the best slots, as many as make worth less delay highest. A request's slots are worth
less and less, so what is admitted of a draft is always its beginning.

An engine may have CUDA graphs for steps only whose requests all verify one length of a *ladder*.
Then that is tried as well, for each length, and what gains most is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal.judge import Rows


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


def allot(
    survival: Rows, rates: Sequence[float], lengths: Sequence[int], requests: int, costs: Array
) -> list[int]:
    """Return how many tokens of each draft are admitted.

    The same as `admitted` on all slots in order; of slots worth the same, those of earlier requests
    come first.

    Args:
        survival: Chance of each slot, a row for each draft, all of one width, falling along it.
        rates: Lambda of each draft's request.
        lengths: How many of each draft's tokens may be verified.
        requests: Requests in the batch; may be more than there are drafts here.
        costs: As for `admitted`.
    """
    if len(lengths) == 1:  # in order already
        (row,), (rate,), (length,) = survival, rates, lengths
        worths = [chance / rate for chance in row[:length]]
        return [admitted(worths, requests, costs[: length + 1].tolist())]
    worth = np.asarray(survival) / np.array(rates)[:, None]
    here, width = worth.shape
    beyond = np.arange(width) >= np.array(lengths)[:, None]
    worth[beyond] = -1.0  # below all others
    slots = worth.size - np.count_nonzero(beyond)
    best_first = np.sort(worth, axis=None)[::-1][:slots]
    surplus = np.cumsum(best_first) - requests * (costs[1 : slots + 1] - 1.0)
    best = int(surplus.argmax()) if slots else 0
    if not slots or surplus[best] <= 0.0:
        return [0] * here
    last = best_first[best]  # worth of the last one admitted, and perhaps of some that are not
    better, as_good = np.flatnonzero(worth > last), np.flatnonzero(worth == last)
    admitted_slots = np.concatenate([better, as_good[: best + 1 - better.size]])
    ks: list[int] = np.bincount(admitted_slots // width, minlength=here).tolist()
    return ks


def on_ladder(
    survival: Rows,
    rates: Sequence[float],
    lengths: Sequence[int],
    requests: int,
    costs: Array,
    ladder: Collection[int],
    factor: Callable[[Sequence[int]], float],
) -> list[int]:
    """Return how many tokens of each draft are verified, where steps that fit a graph are cheaper.

    Args:
        survival: As for `allot`, and so are the next four.
        rates: Lambda.
        lengths: Of drafts.
        requests: In the batch.
        costs: Of drafts.
        ladder: Draft lengths that have a graph, where all requests of the batch have the same.
        factor: Gives what a step with such draft lengths takes, over what `costs` say.
    """
    worth = np.asarray(survival) / np.array(rates)[:, None]
    here = len(lengths)
    gains = np.zeros((here, worth.shape[1] + 1))  # of drafts of 0, 1, ... tokens
    np.cumsum(worth, axis=1, out=gains[:, 1:])
    rows = np.arange(here)
    loose = max(1.0, factor((-1,)))  # of no length that has a graph
    tried = [[0] * here, allot(survival, rates, lengths, requests, costs * loose)]
    if here == requests:
        tried += [[k] * here for k in sorted(ladder) if 0 < k <= min(lengths)]

    def surplus(ks: Sequence[int]) -> float:
        gain = float(gains[rows, list(ks)].sum())
        return gain - requests * (float(costs[sum(ks)]) * factor(ks) - 1.0)

    return max(tried, key=surplus)
