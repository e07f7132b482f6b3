"""What a policy is: it observes steps and decides draft lengths. Nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from moecascade.core.step import Decision, Proposal, Step


class Policy(Protocol):
    """The draft lengths of any number of requests.

    A policy is pure: no clock, no randomness, no input or output, no engine, so replay, simulation
    and engine run the same object. The engine calls, for each step: `decide` for the requests that
    will be in it, then `observe` with what it did. `add` and `drop` bracket a request's life.

    Attributes:
        name: The name that specs and results use.
        argument: The field of `Settings` that a spec gives after a colon (``static:3``), or "".
        Settings: Frozen dataclass of the policy's constants, each with its default.
        learns: Whether one request teaches it anything that the next ones gain by.
    """

    name: ClassVar[str]
    argument: ClassVar[str]
    Settings: ClassVar[type[Any]]
    learns: ClassVar[bool]

    def __init__(self, settings: Any, max_k: int) -> None:
        """Make a policy for an engine that can verify at most `max_k` drafts a request."""

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """A request begins; it may use drafts of at most `max_k` tokens, 0 for none.

        `prompt` is its token ids, for policies that learn from the text; empty where the engine
        does not tell them.
        """

    def drop(self, request_id: str) -> None:
        """A request ended, however it ended: forget it. Unknown names are ignored."""

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the draft length for the next step of each of these requests, in order."""

    def observe(self, step: Step) -> None:
        """Learn from a step. It may hold requests of other policies, which were never added."""

    def lookahead(self, request_id: str) -> int:
        """Return the longest draft the request may want in the step *after* the next.

        Engines with a model drafter draft at the end of a step for the one after, before that step
        is observed, so they have to know how far.
        """

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return the parts of the request's last decision: plain values, for logs and plots."""
