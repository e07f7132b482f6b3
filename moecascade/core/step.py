"""The nouns that engine, replay and policies share: what a step reported, what a decision is.

A *step* (verification step, iteration) is one forward pass of the target over a batch. Each request
in it verified some number of draft tokens and emitted the accepted ones plus one of the target's
own. A *decision* is the draft length K that a request uses in the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestStep:
    """One request's part in a step.

    Attributes:
        request_id: The engine's name for the request.
        drafted: Draft tokens verified in this step, at least 0. May be fewer than the K that was
            decided: a drafter proposes what it has.
        emitted: Tokens the step gave the request: accepted drafts plus one. May be fewer where a
            stop token or the length limit cut the step short.
        tokens: The ids of those tokens, for policies that learn from the text; empty where the
            engine does not tell them.
        k: The K that was decided for this step. An asynchronous engine decides about the next step
            before it reports this one, so it need not be the last decision. None where that is
            not known, and then it is the last one.
    """

    request_id: str
    drafted: int
    emitted: int
    tokens: Sequence[int] = ()
    k: int | None = None

    @property
    def accepted(self) -> int:
        """Drafts that were accepted, as far as the step's tokens tell."""
        return max(0, min(self.emitted - 1, self.drafted))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step reported.

    Attributes:
        seconds: Wall time from the end of the previous step to the end of this one, so scheduling,
            drafting, sampling and output handling are in it: all that a user waits for. None when
            it is unknown.
        decode: Whether every request in the batch was decoding. A step with prefill in it says
            nothing about the time of decoding.
        requests: The requests of the batch, each with what it did.
        passes: How often a model drafter ran at the end of this step, beyond the once that it runs
            in any case: one less than the tokens that it drafted. 0 for drafters without a model.
    """

    seconds: float | None
    decode: bool
    requests: tuple[RequestStep, ...]
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter proposes for a request's next step; the subject of a decision.

    Attributes:
        request_id: The engine's name for the request.
        tokens: The draft, as long as the drafter could make it; empty where it had none.
        unseen: Tokens of a draft that nobody sees before it is verified. Asynchronous scheduling
            plans a step while the drafter still works, so a policy knows of its draft no more than
            this number, and of the request what it did up to the step before the last.
    """

    request_id: str
    tokens: Sequence[int] = ()
    unseen: int = 0

    @property
    def length(self) -> int:
        """Tokens of the draft, seen or not."""
        return len(self.tokens) or self.unseen


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a policy expected of a decision when it made it.

    Attributes:
        utility: Speed-up over no speculation as the policy sees it: expected of the step
            (`marginal`), or measured so far in the phase (`cascade`).
        tokens: Tokens that the step is expected to give the request; None where nothing says so.
        seconds: Time that the step is expected to take; likewise.
        parts: What else led to the decision, by name; plain values, for plots and people.
    """

    utility: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """The draft length for a request's next step.

    Attributes:
        request_id: The engine's name for the request.
        k: Draft tokens to verify, 0 for none.
        why: The reason in a word or two ("test", "set", "baseline"), for logs and people.
        expected: What the policy expected of it; None where nobody asked, or it does not say.
    """

    request_id: str
    k: int
    why: str
    expected: Expectation | None = None


def matching_prefix(draft: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many tokens of a draft are right: those before the first that differs."""
    right = 0
    for drafted, token in zip(draft, tokens, strict=False):
        if drafted != token:
            break
        right += 1
    return right
