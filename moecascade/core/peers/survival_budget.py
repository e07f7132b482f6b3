"""Policy `survival-budget`: a batch's budget of drafts, spent where they survive most likely.

Source: vLLM 0.32, adaptive verification: every (request, position) of the batch has a survival
probability from the drafter's confidence; the best ones are verified, as many as make expected
tokens over step time highest, with step times from a profile taken at start-up.

Departures: n-gram drafts have no confidence, so a position's survival is the share of the request's
own recent drafts that survived so far, verified or not, as far as tokens came to compare them with;
that of all requests is the prior. The profile is `core.cost`, learnt while serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from moecascade.core.cost import CostModel
from moecascade.core.policy import Policy
from moecascade.core.settings import check_ranges
from moecascade.core.step import (
    Decision,
    Expectation,
    Proposal,
    RequestStep,
    Step,
    matching_prefix,
)


@dataclass(frozen=True, slots=True)
class SurvivalSettings:
    """Constants of the estimates.

    Attributes:
        experts: Routed experts a layer, for the cost model's first guess.
        top_k: Experts that a token is routed to, likewise.
        memory: Drafts over which a request's survival is averaged.
        belief: Drafts' worth of belief in what holds for all requests.
        first_rate: Chance of each draft token before anything is known.
    """

    experts: int = 8
    top_k: int = 2
    memory: float = 20.0
    belief: float = 2.0
    first_rate: float = 0.6

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        check_ranges(
            self,
            "survival-budget",
            top_k=(1, self.experts),
            memory=(1, inf),
            belief=(0.001, inf),
            first_rate=(0.001, 0.999),
        )


@dataclass(slots=True)
class _Counts:
    """How often each position was compared and accepted, fading."""

    accepted: list[float]
    compared: list[float]

    def add(self, right: int, known: int, keep: float) -> None:
        """Count a draft of whose first `known` tokens it is known that `right` were right."""
        for place in range(min(right + 1, known)):
            self.accepted[place] = keep * self.accepted[place] + (place < right)
            self.compared[place] = keep * self.compared[place] + 1.0


@dataclass(slots=True)
class _Request:
    cap: int
    counts: _Counts
    k: int = 0
    draft: Sequence[int] = ()
    survival: list[float] = field(default_factory=list)


class SurvivalBudget(Policy):
    """Global top-k over survival probabilities."""

    name = "survival-budget"
    reads_drafts = True
    Settings = SurvivalSettings
    learns = True
    settings: SurvivalSettings

    def __init__(self, settings: SurvivalSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._keep = 1.0 - 1.0 / settings.memory
        self._requests: dict[str, _Request] = {}
        self._costs = CostModel(settings.experts, settings.top_k)
        self._all = _Counts([settings.first_rate] * max_k, [1.0] * max_k)  # of all requests

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Begin with no evidence."""
        nothing = _Counts([0.0] * self.max_k, [0.0] * self.max_k)
        self._requests[request_id] = _Request(min(max_k, self.max_k), nothing)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._requests.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Spend the budget that makes tokens per time highest."""
        n = len(proposals)
        slots: list[tuple[float, _Request]] = []
        for proposal in proposals:
            r = self._requests[proposal.request_id]
            r.k, r.draft, r.survival = 0, proposal.tokens, self._survival(r)
            length = min(len(proposal.tokens), r.cap)
            slots += [(chance, r) for chance in r.survival[:length]]
        slots.sort(key=lambda slot: -slot[0])
        best, most, tokens = 0, float(n), float(n)
        costs = self._costs.costs(n, len(slots)).tolist() if n else []
        for count, (chance, _) in enumerate(slots, 1):
            tokens += chance
            if tokens / costs[count] > most:
                best, most = count, tokens / costs[count]
        for _, r in slots[:best]:
            r.k += 1
        return [
            Decision(p.request_id, self._requests[p.request_id].k, self.name) for p in proposals
        ]

    def observe(self, step: Step) -> None:
        """Learn times from decode steps, survival from drafts."""
        if step.decode and step.seconds is not None:
            drafted = sum(part.drafted for part in step.requests)
            self._costs.observe(len(step.requests) + drafted, step.seconds)
        for part in step.requests:
            r = self._requests.get(part.request_id)
            if r is not None:
                right, known = _survived(r.draft, part)
                r.draft = ()
                r.counts.add(right, known, self._keep)
                self._all.add(right, known, 0.99)

    def explain(self, request_id: str) -> Expectation:
        """Return the tokens that are expected, and the survival of each position."""
        r = self._requests[request_id]
        return Expectation(
            tokens=1.0 + sum(r.survival[: r.k]), parts={"survival": list(r.survival)}
        )

    def _survival(self, r: _Request) -> list[float]:
        survival, chance = [], 1.0
        for place in range(self.max_k):
            general = self._all.accepted[place] / self._all.compared[place]
            belief = self.settings.belief
            chance *= (r.counts.accepted[place] + belief * general) / (
                r.counts.compared[place] + belief
            )
            survival.append(chance)
        return survival


def _survived(draft: Sequence[int], part: RequestStep) -> tuple[int, int]:
    """Return how many tokens of a draft were right, and of how many of them that is known.

    Where the engine does not tell tokens, that is known of verified drafts alone.
    """
    if not part.tokens:
        return part.accepted, part.drafted
    return matching_prefix(draft, part.tokens), min(len(draft), len(part.tokens))
