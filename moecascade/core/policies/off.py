"""Policy `off`: no speculation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moecascade.core.step import Decision, Proposal, Step


@dataclass(frozen=True, slots=True)
class OffSettings:
    """`off` has nothing to set."""


class Off:
    """K = 0, always."""

    name: ClassVar[str] = "off"
    argument: ClassVar[str] = ""
    Settings: ClassVar[type[OffSettings]] = OffSettings
    learns: ClassVar[bool] = False

    def __init__(self, settings: OffSettings, max_k: int) -> None:
        """Make the policy; both arguments are there for the registry's sake."""

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Nothing to keep."""

    def drop(self, request_id: str) -> None:
        """Nothing to forget."""

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return K = 0 for each."""
        return [Decision(p.request_id, 0, "off") for p in proposals]

    def observe(self, step: Step) -> None:
        """Nothing to learn."""

    def lookahead(self, request_id: str) -> int:
        """Return 0: no drafts will be wanted."""
        return 0

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return nothing: there is no state."""
        return {}
