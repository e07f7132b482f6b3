"""Policy `static:K`: the same draft length always, as engines do by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moecascade.core.step import Decision, Proposal, Step
from moecascade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StaticSettings:
    """Settings of `static`.

    Attributes:
        k: The draft length, from 0 to the engine's maximum.
    """

    k: int


class Static:
    """K as configured, at most what a request allows."""

    name: ClassVar[str] = "static"
    argument: ClassVar[str] = "k"
    Settings: ClassVar[type[StaticSettings]] = StaticSettings
    learns: ClassVar[bool] = False

    def __init__(self, settings: StaticSettings, max_k: int) -> None:
        """Make the policy; ConfigError where K is not within 0 and `max_k`."""
        if not 0 <= settings.k <= max_k:
            raise ConfigError(
                f"policy 'static:{settings.k}': K must be from 0 to {max_k}, the engine's longest "
                f"draft; raise num_speculative_tokens or write static:{max_k}"
            )
        self._k = settings.k
        self._k_of: dict[str, int] = {}

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Keep the request's K: ours, or its cap where that is lower."""
        self._k_of[request_id] = min(self._k, max_k)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._k_of.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the fixed K for each."""
        return [Decision(p.request_id, self._k_of[p.request_id], "static") for p in proposals]

    def observe(self, step: Step) -> None:
        """Nothing to learn."""

    def lookahead(self, request_id: str) -> int:
        """Return the fixed K."""
        return self._k_of[request_id]

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return nothing: K says it all."""
        return {}
