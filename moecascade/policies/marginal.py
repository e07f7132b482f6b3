"""Policy `marginal`: draft one more token exactly where it is expected to pay.

It never tests. What a draft will earn is predicted from its context (`moecascade.acceptance`), what
verifying costs is read off a model that every step teaches (`moecascade.costmodel`). In every step
the K is chosen that maximises

    sum over j <= K of P(at least j accepted)  -  lambda * (cost(K) - 1)

where lambda, at least 1, is the request's present rate in tokens per baseline step: an accepted
token saves 1/lambda of a baseline step, and that is what it may cost. The sum rises while the next
token's chance exceeds lambda times its marginal cost, hence the name. A request whose drafts have
cost more than they gave pays a higher lambda until it is even again, so that it loses little.

In a batch all (request, position) slots compete: a token of request r is worth its chance over r's
lambda, verifying it delays all n requests, and the number of slots admitted, best first, is the one
that maximises worth less delay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moecascade.acceptance import Acceptance, Record
from moecascade.context import Text
from moecascade.costmodel import CostModel
from moecascade.errors import ConfigError
from moecascade.steps import Decision, Proposal, Step
from moecascade.utility import cost_share

AHEAD = 2  # tokens that a model drafter drafts beyond the last K
LOOK_EVERY = 8  # steps at K = 0 from one of its drafts to the next


@dataclass(frozen=True, slots=True)
class MarginalSettings:
    """Settings of `marginal`.

    Attributes:
        experts: Routed experts a layer, for the cost model's first guess.
        top_k: How many of them a token is routed to.
        rate_memory: Steps over which a request's rate is averaged.
        patience: Baseline steps that a request may have lost to drafts before they have to promise
            twice as much.
    """

    experts: int = 8
    top_k: int = 2
    rate_memory: float = 20.0
    patience: float = 3.0

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"options of policy 'marginal': top_k must be from 1 to experts ({self.experts}), "
                f"got {self.top_k}"
            )
        if not self.patience > 0:
            raise ConfigError(
                f"options of policy 'marginal': patience must be above 0, got {self.patience}"
            )
        if not self.rate_memory >= 1:
            raise ConfigError(
                f"options of policy 'marginal': rate_memory must be at least 1, "
                f"got {self.rate_memory}"
            )


@dataclass(slots=True)
class _Rate:
    """Tokens per baseline step, fading."""

    tokens: float
    time: float

    def add(self, tokens: float, time: float, keep: float) -> None:
        self.tokens = keep * self.tokens + tokens
        self.time = keep * self.time + time

    @property
    def value(self) -> float:
        return max(1.0, self.tokens / self.time)


@dataclass(slots=True)
class _Request:
    """What the policy keeps of one request."""

    max_k: int
    record: Record
    rate: _Rate
    lost: float = 0.0  # baseline steps that drafts have cost beyond the tokens they gave
    survival: Sequence[float] = ()
    k: int = 0
    idle: int = 0  # steps since the last with drafts


class Marginal:
    """The marginal rule on predicted acceptance and measured cost, step by step."""

    name: ClassVar[str] = "marginal"
    argument: ClassVar[str] = ""
    Settings: ClassVar[type[MarginalSettings]] = MarginalSettings

    def __init__(self, settings: MarginalSettings, max_k: int) -> None:
        """Make the policy; see `Policy`."""
        self._settings = settings
        self._max_k = max_k
        self._keep = 1.0 - 1.0 / settings.rate_memory
        self._requests: dict[str, _Request] = {}
        self._acceptance = Acceptance()
        self._costs = CostModel(settings.experts, settings.top_k)
        self._rate = _Rate(60.0, 50.0)  # of all requests, over a thousand steps; 1.2 to begin with
        self._others = 0  # requests under other policies in the last step

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Index the prompt; expect the rate of all requests."""
        general, memory = self._rate.value, self._settings.rate_memory
        self._requests[request_id] = _Request(
            min(max_k, self._max_k), Record(Text(prompt)), _Rate(general * memory, memory)
        )

    def drop(self, request_id: str) -> None:
        """Forget the request; what it taught remains."""
        self._requests.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Admit the slots that pay, best first."""
        n = len(proposals) + self._others
        slots: list[tuple[float, str]] = []
        for proposal in proposals:
            r = self._requests[proposal.request_id]
            r.k, r.survival = 0, ()
            if proposal.tokens and r.max_k:
                r.survival = self._acceptance.predict(r.record, proposal.tokens)
                worth = 1.0 / self._price(r)
                slots += [(s * worth, proposal.request_id) for s in r.survival[: r.max_k]]
        # A request's slots are worth less and less, so the best are always prefixes of drafts.
        slots.sort(key=lambda slot: -slot[0])
        best, most, worth = 0, 0.0, 0.0
        for count, (gain, _) in enumerate(slots, 1):
            worth += gain
            surplus = worth - n * (self._costs.cost(n, count) - 1.0)
            if surplus > most:
                best, most = count, surplus
        for _, request_id in slots[:best]:
            self._requests[request_id].k += 1
        return [
            Decision(p.request_id, self._requests[p.request_id].k, "marginal") for p in proposals
        ]

    def observe(self, step: Step) -> None:
        """Learn cost from decode steps, acceptance from every step's tokens."""
        n = len(step.requests)
        drafted = sum(part.drafted for part in step.requests)
        mine = [part for part in step.requests if part.request_id in self._requests]
        self._others = n - len(mine)
        cost = None
        if step.decode and step.seconds is not None:
            self._costs.observe(n + drafted, step.seconds)
            cost = self._costs.cost(n, drafted)
        for part in mine:
            r = self._requests[part.request_id]
            self._acceptance.learn(r.record, part.tokens)
            r.idle = 0 if part.drafted else r.idle + 1
            if cost is not None:
                r.rate.add(part.emitted, cost, self._keep)
                if part.drafted:
                    r.lost += cost_share(cost, 1.0, n, part.drafted, drafted) - part.emitted
                self._rate.add(part.emitted, cost, 0.999)

    def _price(self, r: _Request) -> float:
        """Return lambda, raised for a request that has lost time: it may risk less."""
        return r.rate.value * (1.0 + max(0.0, r.lost) / self._settings.patience)

    def lookahead(self, request_id: str) -> int:
        """Return a little more than was used; while off, a short draft now and then.

        Where drafts cost nothing they come at full length whatever this says, and all of them
        teach. A model's drafts cost time even if nobody verifies them.
        """
        r = self._requests[request_id]
        if r.k:
            return min(r.k + AHEAD, r.max_k)
        return 0 if r.idle % LOOK_EVERY else min(AHEAD, r.max_k)

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return K, lambda, the predicted survival and the predicted cost of each K."""
        r = self._requests[request_id]
        return {
            "k": r.k,
            "lambda": self._price(r),
            "lost": r.lost,
            "survival": list(r.survival),
            "costs": [self._costs.cost(1 + self._others, k) for k in range(self._max_k + 1)],
        }
