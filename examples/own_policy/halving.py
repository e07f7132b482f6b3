"""A policy of your own: halve K whenever a draft fails, take one more when all of it was right.

    export PYTHONPATH=examples/own_policy MOECASCADE_POLICIES=halving
    moecascade replay TRACES --policies off,halving,marginal
    moecascade serve local --policy halving

`pip install examples/own_policy` does without the two variables: see its pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moecascade.policies import Decision, Policy, Proposal, Step, register


@register
class Halving(Policy):
    """Additive increase, multiplicative decrease, for each request."""

    name = "halving"

    def __init__(self, settings: Any, max_k: int) -> None:
        """Begin without requests."""
        super().__init__(settings, max_k)
        self._k_of: dict[str, int] = {}

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Begin with the longest draft allowed."""
        self._k_of[request_id] = max(1, max_k)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._k_of.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the request's K, at least 1, so that it can recover."""
        return [Decision(p.request_id, self._k_of[p.request_id], "halving") for p in proposals]

    def observe(self, step: Step) -> None:
        """Halve after a draft with a wrong token; grow by one after a draft that was all right."""
        for part in step.requests:
            if part.request_id in self._k_of and part.drafted:
                failed = part.accepted < part.drafted
                k = self._k_of[part.request_id]
                self._k_of[part.request_id] = max(1, k // 2) if failed else min(self.max_k, k + 1)
