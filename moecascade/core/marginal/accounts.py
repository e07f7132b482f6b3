"""At what rate requests get tokens (lambda), and what drafts have cost them.

In a small batch each request pays at its own rate, and may lose little. In a large one all pay at
the rate of the batch, which makes its throughput highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moecascade.core.cost import Array
from moecascade.core.step import RequestStep
from moecascade.core.utility import cost_share

SHORTEST = 100.0  # baseline steps of which a short request may lose its part: the speed-up is flat
# from 25 to 400, the worst answer falls from 0.98 to 0.955 from 200 on
FIRST_RATE = 1.2  # tokens per baseline step before anything is known; flat from 0.3 to 4.8
FIRST_TIME = 50.0  # baseline steps that this guess weighs as much as, in the rate of all requests;
# flat from 12 to 200
DECAY_ALL = 0.999  # of the rate of all requests, from one step of one of them to the next; flat
# from 0.996 to 0.99975


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

    @classmethod
    def first(cls, time: float | None = None) -> Rate:
        """Return the guess before anything is known; it weighs as much as `time` baseline steps."""
        time = FIRST_TIME if time is None else time
        return cls(FIRST_RATE * time, time)

    @property
    def value(self) -> float:
        """The rate, at least 1: without drafts it is 1."""
        return max(1.0, self.tokens / self.time)


class Accounts(Protocol):
    """What requests pay, and what they can bear."""

    def rates(self, request_ids: Sequence[str]) -> list[float]:
        """Return the lambda of each request."""

    def limits(
        self, request_ids: Sequence[str], lengths: Sequence[int], requests: int, costs: Array
    ) -> Sequence[int]:
        """Return how many tokens of drafts of such lengths may be verified.

        Args:
            request_ids: The requests that have them.
            lengths: Tokens of their drafts that could be verified.
            requests: Requests in the batch.
            costs: Of 0, 1, ... drafts in it.
        """

    def charge(self, parts: Sequence[RequestStep], cost: float, requests: int, drafts: int) -> None:
        """Take what a decode step gave and took.

        Args:
            parts: What our requests did in it.
            cost: Its time, in baseline steps.
            requests: All requests in it.
            drafts: Drafts that they verified.
        """


@dataclass(slots=True)
class _Account:
    """One request's."""

    rate: Rate
    lost: float = 0.0  # baseline steps that drafts have cost beyond the tokens they gave
    tokens: int = 0  # that it was given in decode steps: baseline steps it would have taken


class OwnAccounts:
    """Each request pays at its own rate, and drafts only what it could bear to lose.

    Args:
        memory: Steps over which a rate is averaged.
        most_lost: Part of its time that drafts may cost a request.
    """

    def __init__(self, memory: float, most_lost: float, all_requests: Rate) -> None:
        """Begin without requests; `all_requests` is what new ones begin with."""
        self._memory, self._most_lost = memory, most_lost
        self._keep = 1.0 - 1.0 / memory
        self._all = all_requests
        self._accounts: dict[str, _Account] = {}

    def begin(self, request_id: str) -> None:
        """A request begins; it is expected to get tokens at the rate of all."""
        self._accounts[request_id] = _Account(Rate(self._all.value * self._memory, self._memory))

    def end(self, request_id: str) -> None:
        """A request ended."""
        self._accounts.pop(request_id, None)

    def lost(self, request_id: str) -> float:
        """Return the baseline steps that drafts have cost a request beyond what they gave."""
        return self._accounts[request_id].lost

    def rates(self, request_ids: Sequence[str]) -> list[float]:
        """Return the rate of each request."""
        return [self._accounts[name].rate.value for name in request_ids]

    def limits(
        self, request_ids: Sequence[str], lengths: Sequence[int], requests: int, costs: Array
    ) -> Sequence[int]:
        """Return how long drafts may be that requests could bear to lose.

        Each as if it were alone in drafting: then its draft costs it most. But a request whose
        account is exhausted goes on where those of the batch on the whole are not: others draft on
        and delay it, and without drafts of its own it would have nothing for that.
        """
        limits = list(lengths)
        left = [
            self._most_lost * max(SHORTEST, account.tokens) - account.lost
            for account in [self._accounts[name] for name in request_ids]
        ]
        least = sum(left) / max(1, len(left))
        for row, may in enumerate(left):
            bearable = 1.0 + max(may, least) / requests
            while limits[row] and costs.item(limits[row]) > bearable:
                limits[row] -= 1
        return limits

    def charge(self, parts: Sequence[RequestStep], cost: float, requests: int, drafts: int) -> None:
        """Charge each request its share of what drafts cost."""
        for part in parts:
            account = self._accounts[part.request_id]
            account.rate.add(part.emitted, cost, self._keep)
            account.tokens += part.emitted
            if part.drafted:
                share = cost_share(cost, 1.0, requests, part.drafted, drafts)
                account.lost += share - part.emitted
            elif not drafts:
                account.lost += cost - 1.0  # what the drafter's passes took
            self._all.add(part.emitted, cost, DECAY_ALL)


class SharedAccount:
    """All requests pay at the batch's rate; single ones have no limit.

    Args:
        memory: Steps over which the rate is averaged.
    """

    def __init__(self, memory: float, all_requests: Rate) -> None:
        """Begin with a guess; `all_requests` is what new requests begin with."""
        self._rate = Rate.first(memory)
        self._keep = 1.0 - 1.0 / memory
        self._all = all_requests

    def rates(self, request_ids: Sequence[str]) -> list[float]:
        """Return the batch's rate for each request."""
        return [self._rate.value] * len(request_ids)

    def limits(
        self, _ids: Sequence[str], lengths: Sequence[int], _requests: int, _costs: Array
    ) -> Sequence[int]:
        """Return the lengths as they are."""
        return lengths

    def charge(
        self, parts: Sequence[RequestStep], cost: float, _requests: int, _drafts: int
    ) -> None:
        """Take the step into the batch's rate."""
        mine, emitted = len(parts), sum([part.emitted for part in parts])
        self._rate.add(emitted / mine, cost, self._keep)
        self._all.add(emitted, mine * cost, DECAY_ALL**mine)
