"""Policies that only tests have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from moecascade.core.step import Decision, Proposal
from moecascade.policies import Policy


class RandomK(Policy):
    """K at random for each request and step, and how far to draft; the same in every run."""

    name = "random"

    def __init__(self, settings: Any, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._random = random.Random(0)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Draw K."""
        ks = [self._random.randint(0, self.max_k) for _ in proposals]
        return [Decision(p.request_id, k, "random") for p, k in zip(proposals, ks, strict=True)]

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Draw the number of tokens that a model drafts."""
        return self._random.randint(0, self.max_k)
