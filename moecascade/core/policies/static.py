"""Policy `static:K`: the same draft length always, as engines do by default; and `off`, K = 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecascade.core.policy import Policy
from moecascade.core.step import Decision, Proposal
from moecascade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StaticSettings:
    """Settings of `static`.

    Attributes:
        k: The draft length, from 0 to the engine's maximum.
        ahead: Tokens that a model drafter is to draft, for recordings; K where that is more.
    """

    k: int
    ahead: int = 0


class Static(Policy):
    """K as configured; the controller cuts it where a request allows less."""

    name = "static"
    argument = "k"
    Settings = StaticSettings
    settings: StaticSettings

    @classmethod
    def check(cls, settings: StaticSettings, max_k: int) -> None:
        """Refuse a K that is not within 0 and `max_k`."""
        if not 0 <= settings.k <= max_k:
            raise ConfigError(
                f"policy 'static:{settings.k}': K must be from 0 to {max_k}, the engine's longest "
                f"draft; raise num_speculative_tokens or write static:{max_k}"
            )

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the fixed K for each."""
        return [Decision(p.request_id, self.settings.k, self.name) for p in proposals]

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the fixed K, or what is asked for beyond it."""
        return max(self.settings.k, min(self.settings.ahead, self.max_k))


class Off(Policy):
    """No speculation."""

    name = "off"
    drafts = False

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return K = 0 for each."""
        return [Decision(p.request_id, 0, self.name) for p in proposals]

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return 0: no drafts will be wanted."""
        return 0
