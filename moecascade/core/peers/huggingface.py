"""Policy `hf-heuristic`: two more after a draft that was all right, else one fewer.

Source: Hugging Face transformers, ``num_assistant_tokens_schedule`` "heuristic_transient" and
"heuristic" (GenerationConfig): begins with ``num_assistant_tokens``, 20 by default, never below 1.
"heuristic" goes on with the value that the last generation ended with.

Departure: transformers drafts with a model, which always drafts; a step without a draft changes
nothing here. As K is capped by the engine's longest draft, so is the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from moecascade.core.policy import Policy
from moecascade.core.settings import check_ranges
from moecascade.core.step import Decision, Proposal, Step


@dataclass(frozen=True, slots=True)
class HuggingFaceSettings:
    """The schedule.

    Attributes:
        first_k: K of a request's first draft.
        transient: Whether each request begins there; if not, where the last one ended.
    """

    first_k: int = 20
    transient: bool = False

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        check_ranges(self, "hf-heuristic", first_k=(1, inf))


class HuggingFace(Policy):
    """A K for each request, up by two and down by one."""

    name = "hf-heuristic"
    Settings = HuggingFaceSettings
    settings: HuggingFaceSettings

    def __init__(self, settings: HuggingFaceSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._last = min(settings.first_k, max_k)
        self._requests: dict[str, tuple[int, int]] = {}  # cap and K

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Begin as the schedule says."""
        cap = min(max_k, self.max_k)
        first = self.settings.first_k if self.settings.transient else self._last
        self._requests[request_id] = cap, min(first, cap)

    def drop(self, request_id: str) -> None:
        """Forget the request; the next one goes on with its K."""
        cap, k = self._requests.pop(request_id, (0, 0))
        if cap == self.max_k:  # a request's own cap is no concern of the next
            self._last = k

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return each request's K."""
        return [
            Decision(p.request_id, self._requests[p.request_id][1], self.name) for p in proposals
        ]

    def observe(self, step: Step) -> None:
        """Move the K of every request that drafted."""
        for part in step.requests:
            if part.request_id in self._requests and part.drafted:
                cap, k = self._requests[part.request_id]
                k = k + 2 if part.emitted > part.drafted else max(1, k - 1)
                self._requests[part.request_id] = cap, min(k, cap)

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return what the highest K may have risen to by then."""
        return min(2 + max([self._requests[r][1] for r in request_ids], default=0), self.max_k)
