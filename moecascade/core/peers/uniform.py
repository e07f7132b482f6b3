"""What the baselines have in common: one draft length for the whole batch, capped per request."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from moecascade.core.policy import Policy
from moecascade.core.step import Decision, Proposal, RequestStep, Step


class OneForAll(Policy):
    """Base of policies that use one K for all their requests.

    They say what it is for a number of requests (`chosen`) and learn from each decode step
    (`learn`). A request's own cap is kept by the controller.
    """

    def __init__(self, settings: Any, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._requests: set[str] = set()
        self._k = 0  # of the step under way

    @abstractmethod
    def chosen(self, requests: int) -> int:
        """Return K for a batch of this many requests."""

    @abstractmethod
    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Take the parts of our requests in a decode step, and its time if it is known."""

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Know the request as ours."""
        self._requests.add(request_id)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._requests.discard(request_id)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return K for each."""
        self._k = min(self.chosen(len(proposals)), self.max_k)
        return [Decision(p.request_id, self._k, self.name) for p in proposals]

    def observe(self, step: Step) -> None:
        """Learn from decode steps."""
        mine = [part for part in step.requests if part.request_id in self._requests]
        if step.decode and mine:
            self.learn(mine, step.seconds)
