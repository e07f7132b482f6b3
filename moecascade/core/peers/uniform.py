"""What the baselines have in common: one draft length for the whole batch, capped per request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from moecascade.core.step import Decision, Proposal, RequestStep, Step


class OneForAll(ABC):
    """Base of policies that use one K for all their requests.

    They say what it is for a number of requests (`chosen`) and learn from each decode step
    (`learn`).
    """

    name: str  # of the policy, the reason of its decisions

    def __init__(self, max_k: int) -> None:
        """Begin without requests."""
        self._max_k = max_k
        self._cap: dict[str, int] = {}
        self._k = 0  # of the step under way

    @abstractmethod
    def chosen(self, requests: int) -> int:
        """Return K for a batch of this many requests."""

    @abstractmethod
    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Take the parts of our requests in a decode step, and its time if it is known."""

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Keep the request's cap."""
        self._cap[request_id] = min(max_k, self._max_k)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._cap.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return K for each, capped."""
        self._k = self.chosen(len(proposals))
        return [
            Decision(p.request_id, min(self._k, self._cap[p.request_id]), self.name)
            for p in proposals
        ]

    def observe(self, step: Step) -> None:
        """Learn from decode steps."""
        mine = [part for part in step.requests if part.request_id in self._cap]
        if step.decode and mine:
            self.learn(mine, step.seconds)

    def lookahead(self, request_id: str) -> int:
        """Return the most there can be: these rules may jump from one step to the next."""
        return self._cap[request_id]

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return the batch's K."""
        return {"k": min(self._k, self._cap[request_id])}
