"""What a policy is: it observes steps and decides draft lengths. Nothing else."""
# ruff: noqa: B027 -- what a policy need not do it does not do

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moecascade.core.step import Decision, Expectation, Proposal, Step


@dataclass(frozen=True, slots=True)
class NoSettings:
    """The settings of a policy that has none."""


class Policy(ABC):
    """The draft lengths of any number of requests.

    A policy has to say its `name` and how it decides; all else has a default:

        @register
        class Half(Policy):
            name = "half"

            def decide(self, proposals):
                return [Decision(p.request_id, p.length // 2, "half") for p in proposals]

    A policy is pure: no clock, no randomness, no input or output, no engine, so replay, simulation
    and engine run the same object. The engine calls, for each step: `decide` for the requests that
    will be in it, then `observe` with what it did. `add` and `drop` bracket a request's life.

    Args:
        settings: An object of `Settings`.
        max_k: The longest draft that the engine can verify, at least 1.

    Attributes:
        name: The name that specs and results use.
        argument: The field of `Settings` that a spec gives after a colon (``static:3``), or "".
        Settings: Frozen dataclass of the policy's constants, each with its default.
        learns: Whether one request teaches it anything that the next ones gain by.
        drafts: Whether it ever wants a draft.
        reads_drafts: Whether it looks at a draft's tokens before it decides. Asynchronous
            scheduling does not show them, so such a policy is refused there.
    """

    name: ClassVar[str]
    argument: ClassVar[str] = ""
    Settings: ClassVar[type[Any]] = NoSettings
    learns: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    reads_drafts: ClassVar[bool] = False

    def __init__(self, settings: Any, max_k: int) -> None:
        self.settings = settings
        self.max_k = max_k

    @classmethod
    def check(cls, settings: Any, max_k: int) -> None:
        """Raise ConfigError where the settings do not suit an engine with this `max_k`."""

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """A request begins; it may use drafts of at most `max_k` tokens, 0 for none.

        Longer decisions are cut to that. `prompt` is its token ids, for policies that learn from
        the text; empty where the engine does not tell them.
        """

    def drop(self, request_id: str) -> None:
        """A request ended, however it ended: forget it. Unknown names are ignored."""

    @abstractmethod
    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the draft length for the next step of each of these requests, in order."""

    def observe(self, step: Step) -> None:
        """Learn from a step. It may hold requests of other policies, which were never added."""

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the longest draft that any of these may want in the step *after* the next.

        Engines with a model drafter draft at the end of a step for the one after, before that step
        is observed, so they have to know how far. They ask once a step, for those of the policy's
        requests that are in it.
        """
        return self.max_k

    def explain(self, request_id: str) -> Expectation | None:
        """Return what was expected of the decision just made; asked only where steps are logged."""
        return None
