"""Policy `marginal`: draft one more token exactly where it is expected to pay.

It never tests. What a draft will earn is predicted from its context (`acceptance`), what
verifying costs is read off a model that every step teaches (`core.cost`). In every step
the K is chosen that maximises

    sum over j <= K of P(at least j accepted)  -  lambda * (cost(K) - 1)

where lambda, at least 1, is the request's present rate in tokens per baseline step: an accepted
token saves 1/lambda of a baseline step, and that is what it may cost. The sum rises while the next
token's chance exceeds lambda times its marginal cost, hence the name. A request whose drafts have
cost more than they gave never drafts so much that it could lose more than a small part of its time,
so that no request is much slower than without.

In a batch all (request, position) slots compete: a token of request r is worth its chance over r's
lambda, verifying it delays all n requests, and the number of slots admitted, best first, is the one
that maximises worth less delay.

Reading the text of a request takes some forty microseconds a step. In a crowd, a batch of more than
`crowd` requests, drafts are judged by how the request's last ones fared (`recent`), and
lambda is the rate of the whole batch, which makes its throughput highest.

Where a model drafts, each of its passes costs time too, whether anybody verifies what they draft or
not; `draft_length` says how many are worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecascade.core.cost import CostModel
from moecascade.core.marginal.acceptance import Acceptance, Record
from moecascade.core.marginal.allocation import Rate, admitted, by_state
from moecascade.core.marginal.context import Text
from moecascade.core.marginal.draft_length import Drafting
from moecascade.core.marginal.recent import FIRST, History
from moecascade.core.policy import Policy
from moecascade.core.step import Decision, Expectation, Proposal, Step
from moecascade.core.utility import cost_share
from moecascade.errors import ConfigError

SHORTEST = 100.0  # baseline steps of which a short request may lose its part
CROWD_LOOKS = 8  # steps from one look at how far to draft for a crowd to the next


@dataclass(frozen=True, slots=True)
class MarginalSettings:
    """Settings of `marginal`.

    Attributes:
        experts: Routed experts a layer, for the cost model's first guess.
        top_k: How many of them a token is routed to.
        rate_memory: Steps over which a request's rate is averaged.
        most_lost: Part of its time that drafts may cost a request; of `SHORTEST` baseline steps
            where it has been shorter. A draft that could cost more is cut.
        crowd: Requests in a batch above which drafts are judged by history instead of text.
    """

    experts: int = 8
    top_k: int = 2
    rate_memory: float = 20.0
    most_lost: float = 0.03
    crowd: int = 8

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"options of policy 'marginal': top_k must be from 1 to experts ({self.experts}), "
                f"got {self.top_k}"
            )
        if not self.most_lost > 0:
            raise ConfigError(
                f"options of policy 'marginal': most_lost must be above 0, got {self.most_lost}"
            )
        if not self.crowd >= 0:
            raise ConfigError(
                f"options of policy 'marginal': crowd must be at least 0, got {self.crowd}"
            )
        if not self.rate_memory >= 1:
            raise ConfigError(
                f"options of policy 'marginal': rate_memory must be at least 1, "
                f"got {self.rate_memory}"
            )


@dataclass(slots=True)
class _Request:
    """What the policy keeps of one request."""

    max_k: int
    record: Record
    rate: Rate
    decisions: list[Decision]  # by K: making one takes as long as all else in a crowd
    lost: float = 0.0  # baseline steps that drafts have cost beyond the tokens they gave
    tokens: int = 0  # that it was given in decode steps: baseline steps it would have taken
    survival: Sequence[float] = ()  # of its latest draft, as judged by text
    k: int = 0
    batch: tuple[int, int] = (1, 0)  # requests and drafts of the step that it was decided for
    state: int = FIRST  # of its history
    draft: Sequence[int] = ()  # the latest, while history judges


class Marginal(Policy):
    """The marginal rule on predicted acceptance and measured cost, step by step."""

    name = "marginal"
    Settings = MarginalSettings
    learns = True
    settings: MarginalSettings

    def __init__(self, settings: MarginalSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._keep = 1.0 - 1.0 / settings.rate_memory
        self._requests: dict[str, _Request] = {}
        self._acceptance = Acceptance()
        self._history: History | None = None  # made by the first crowd
        self._costs = CostModel(settings.experts, settings.top_k)
        self._rate = Rate(60.0, 50.0)  # of all requests, over a thousand steps; 1.2 to begin with
        self._batch_rate = Rate(1.2 * settings.rate_memory, settings.rate_memory)
        self._others = 0  # requests under other policies in the last step
        self._crowded = False  # whether history made the last decisions
        self._batch = (1, 0)  # requests and drafts of the step that was last decided about, and
        self._decided: list[_Request] = []  # ours among them
        self._drafting: Drafting | None = None  # made for the first model drafter
        self._ahead = 0  # tokens that it is to draft, and
        self._ahead_for = 0  # decisions for which that still holds

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Keep the prompt; expect the rate of all requests."""
        general, memory = self._rate.value, self.settings.rate_memory
        self._requests[request_id] = _Request(
            min(max_k, self.max_k),
            Record(Text(prompt)),
            Rate(general * memory, memory),
            [Decision(request_id, k, self.name) for k in range(self.max_k + 1)],
        )

    def drop(self, request_id: str) -> None:
        """Forget the request; what it taught remains."""
        self._requests.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Admit the slots that pay, best first."""
        requests = [self._requests[p.request_id] for p in proposals]
        crowded = len(proposals) > self.settings.crowd
        if crowded and not self._crowded:
            for r in self._requests.values():
                r.record.shadow = None  # nobody will score it
        self._crowded = crowded
        ks = (self._in_crowd if crowded else self._by_text)(proposals, requests)
        self._batch = batch = (len(proposals) + self._others, sum(ks))
        self._decided = requests
        self._ahead_for -= 1
        decisions = []
        for r, k in zip(requests, ks, strict=True):
            r.k, r.batch = k, batch
            decisions.append(r.decisions[k])
        return decisions

    def _by_text(self, proposals: Sequence[Proposal], requests: Sequence[_Request]) -> list[int]:
        """Return the K of each request, its drafts judged by its text, paid at its own lambda."""
        n = len(proposals) + self._others
        costs = self._costs.listed(n, len(requests) * self.max_k)
        worths: list[float] = []
        owners: list[_Request] = []
        for proposal, r in zip(proposals, requests, strict=True):
            r.k, r.survival = 0, ()
            if proposal.tokens and r.max_k:
                r.survival = self._acceptance.predict(r.record, proposal.tokens)
                worth = 1.0 / r.rate.value
                slots = r.survival[: self._most(r, n, costs)]
                worths += [s * worth for s in slots]
                owners += [r] * len(slots)
        if len(requests) > 1:  # those of one are in order
            best = sorted(range(len(worths)), key=worths.__getitem__, reverse=True)
            worths = [worths[i] for i in best]
            owners = [owners[i] for i in best]
        for r in owners[: admitted(worths, n, costs)]:
            r.k += 1
        return [r.k for r in requests]

    def _in_crowd(self, proposals: Sequence[Proposal], requests: Sequence[_Request]) -> list[int]:
        """Return the K of each request, judged by history, all of them paid at the batch's lambda.

        The same rule as above. Requests in one state are worth the same.
        """
        n, width = len(proposals) + self._others, self.max_k
        lengths, states = [], []
        for p, r in zip(proposals, requests, strict=True):
            draft = r.draft = p.tokens
            length = len(draft)
            lengths.append(min(r.max_k, length))
            states.append(r.state)
        if self._history is None:
            self._history = History(width)
        costs = self._costs.costs(n, len(requests) * width)
        ranked, rate = self._history.ranked(), self._batch_rate.value
        return by_state(np.array(states), np.array(lengths), width, ranked, rate, costs, n)

    def observe(self, step: Step) -> None:
        """Learn cost from decode steps, acceptance from every step's tokens."""
        n = len(step.requests)
        drafted = sum([part.drafted for part in step.requests])
        cost = None
        if step.decode and step.seconds is not None:
            self._costs.observe(n + drafted, step.seconds, step.passes)
            cost = self._costs.cost(n, drafted)
            if step.passes:
                cost += step.passes * self._costs.pass_cost(n)
        learn = self._learn_history if self._crowded else self._learn_text
        self._others = n - learn(step, cost, drafted)

    def _learn_text(self, step: Step, cost: float | None, drafted: int) -> int:
        """Learn as `_by_text` decides; return how many of the step's requests are ours."""
        n, mine = len(step.requests), 0
        for part in step.requests:
            r = self._requests.get(part.request_id)
            if r is None:
                continue
            mine += 1
            self._acceptance.learn(r.record, part.tokens)
            if cost is not None:
                r.rate.add(part.emitted, cost, self._keep)
                r.tokens += part.emitted
                if part.drafted:
                    r.lost += cost_share(cost, 1.0, n, part.drafted, drafted) - part.emitted
                elif not drafted:
                    r.lost += cost - 1.0  # what the drafter's passes took
                self._rate.add(part.emitted, cost, 0.999)
        return mine

    def _learn_history(self, step: Step, cost: float | None, _drafted: int) -> int:
        """Learn as `_in_crowd` decides; return how many of the step's requests are ours."""
        history, known = self._history, self._requests
        assert history is not None  # `_in_crowd` has been here before
        learn = history.learn
        mine, emitted = 0, 0
        for part in step.requests:
            r = known.get(part.request_id)
            if r is None:
                continue
            mine += 1
            emitted += part.emitted
            tokens = part.tokens
            if r.draft and tokens:
                r.state = learn(r.state, r.draft, tokens)
                r.draft = ()
            r.record.text.extend(tokens)
        history.step()
        if cost is not None and mine:
            self._batch_rate.add(emitted / mine, cost, self._keep)
            self._rate.add(emitted, mine * cost, 0.999**mine)
        return mine

    def _most(self, r: _Request, n: int, costs: Sequence[float]) -> int:
        """Return how long a draft may be that the request could bear to lose.

        Args:
            r: The request, alone in drafting: then its draft costs it most.
            n: Requests in the batch.
            costs: Of 0, 1, ... drafts in it.
        """
        bearable = 1.0 + (self.settings.most_lost * max(SHORTEST, r.tokens) - r.lost) / n
        k = r.max_k
        while k and costs[k] > bearable:
            k -= 1
        return k

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return how far to draft for the whole batch; see `Drafting`."""
        if self._drafting is None:
            self._drafting = Drafting(self.max_k)
        if self._ahead_for <= 0:
            self._ahead_for = CROWD_LOOKS if self._crowded else 1
            self._ahead = self._draft_length(self._drafting)
        most = max([self._requests[request_id].max_k for request_id in request_ids], default=0)
        return min(self._ahead, most)

    def _draft_length(self, drafting: Drafting) -> int:
        n, _ = self._batch
        width = self.max_k
        if self._crowded and self._history is not None:
            requests = self._decided
            worth = self._history.survival([r.state for r in requests]) / self._batch_rate.value
        else:
            requests = [r for r in self._decided if r.survival]
            prolonged = self._acceptance.prolonged
            worth = np.array(
                [np.array(prolonged(r.survival, width)) / r.rate.value for r in requests]
            )
        if requests:
            worth[np.array([r.max_k for r in requests])[:, None] <= np.arange(width)] = 0.0
            drafting.consider(worth, n * (self._costs.costs(n, worth.size) - 1.0))
        return drafting.length(n * self._costs.pass_cost(n))

    def _survival(self, r: _Request) -> Sequence[float]:
        """Return the chances of the request's latest draft; none where it had no draft."""
        if self._crowded and self._history is not None:
            chances: list[float] = self._history.survival([r.state])[0].tolist()
            return chances
        return r.survival

    def explain(self, request_id: str) -> Expectation:
        """Return what is expected of the step; lambda, survival, and the cost of each K."""
        r = self._requests[request_id]
        survival = self._survival(r)
        tokens = 1.0 + sum(survival[: r.k])
        n, drafts = r.batch
        passes = max(0, self._ahead - 1)
        cost = self._costs.cost(n, drafts) + passes * self._costs.pass_cost(n)
        cost = cost_share(cost, 1.0, n, r.k, drafts)
        parts = {
            "lambda": self._batch_rate.value if self._crowded else r.rate.value,
            "lost": r.lost,
            "survival": list(survival),
            "costs": self._costs.costs(n, self.max_k)[: self.max_k + 1].tolist(),
        }
        return Expectation(tokens / cost, tokens, self._costs.seconds(n + drafts, passes), parts)
