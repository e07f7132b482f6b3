"""Policy `marginal`: draft one more token exactly where it is expected to pay.

It never tests. What a draft will earn is predicted by a judge, what verifying costs is read off a
model that every step teaches (`core.cost`). In every step the K is chosen that maximises

    sum over j <= K of P(at least j accepted)  -  lambda * (cost(K) - 1)

where lambda, at least 1, is the request's present rate in tokens per baseline step: an accepted
token saves 1/lambda of a baseline step, and that is what it may cost. The sum rises while the next
token's chance exceeds lambda times its marginal cost, hence the name. A request whose drafts have
cost more than they gave never drafts so much that it could lose more than a small part of its time,
so that no request is much slower than without.

In a batch all (request, position) slots compete: a token of request r is worth its chance over r's
lambda, verifying it delays all n requests, and the number of slots admitted, best first, is the one
that maximises worth less delay.

A judge says what drafts will earn. One reads the request's text (`acceptance`), which takes six
microseconds more a request and step. In a batch of more than `crowd` requests another judges by how
the request's last drafts fared (`recent`). There all pay at one lambda, the rate of the batch,
which makes its throughput highest (`accounts`).

Asynchronous scheduling shows no drafts, and asks one step early. Of a drafter that searches the
text the draft is known all the same: `ahead` searches as well, and looks through the step in
flight. Of other drafters no more is known than how many tokens were accepted (`counts`).

Where a model drafts, each of its passes costs time too, whether anybody verifies what they draft or
not; `draft_length` says how many are worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple

import numpy as np

from moecascade.core.cost import CostModel
from moecascade.core.marginal.accounts import Accounts, OwnAccounts, Rate, SharedAccount
from moecascade.core.marginal.ahead import AheadJudge
from moecascade.core.marginal.allocation import allot, on_ladder
from moecascade.core.marginal.counts import CountsJudge
from moecascade.core.marginal.draft_length import Drafting, Unseen
from moecascade.core.marginal.judge import LONGEST, Judge, Rows
from moecascade.core.marginal.recent import RecentJudge
from moecascade.core.policy import Policy
from moecascade.core.settings import MOST
from moecascade.core.step import Decision, Expectation, Proposal, Step
from moecascade.core.utility import cost_share
from moecascade.errors import ConfigError

LARGE_BATCH_LOOKS = 8  # decisions on a large batch for which how far to draft for it holds


def prepare() -> None:
    """Compile, or load from disk, what is compiled: no request shall wait for it."""
    import_module("moecascade.core.marginal.acceptance")


@dataclass(frozen=True, slots=True)
class MarginalSettings:
    """Settings of `marginal`.

    Attributes:
        experts: Routed experts a layer, for the cost model's first guess.
        top_k: How many of them a token is routed to.
        rate_memory: Steps over which a request's rate is averaged.
        most_lost: Part of its time that drafts may cost a request; of `accounts.SHORTEST` baseline
            steps where it has been shorter. A draft that could cost more is cut.
        crowd: Requests in a batch above which drafts are judged by how the request's last ones
            fared instead of by its text.
        search_min: Least length of a match, of a drafter that searches the text; 0 for others. The
            engine says so, as it does the next two.
        search_max: Greatest length of a match.
        filled: Whether drafts are filled up where nothing was found, and verified all the same.
        ladder: Draft lengths for which the engine has whole CUDA graphs, where it has some; it says
            so as well.
        expected: Times of steps of 1, 2, 4, 8, ... positions, in any unit, for the cost model's
            first guess where model and device are known; the engine says them.
    """

    experts: int = 8
    top_k: int = 2
    rate_memory: float = 20.0
    most_lost: float = 0.03
    crowd: int = 8
    search_min: int = 0
    search_max: int = 0
    filled: bool = False
    ladder: Sequence[int] = ()
    expected: Sequence[float] = ()

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
        if not 0 <= self.search_min <= self.search_max:
            raise ConfigError(
                f"options of policy 'marginal': search_min must be from 0 to search_max "
                f"({self.search_max}), got {self.search_min}"
            )
        if not all(type(k) is int and k >= 0 for k in self.ladder):
            raise ConfigError(
                "options of policy 'marginal': ladder must hold draft lengths, such as "
                f"[0, 1, 3], got {self.ladder!r}"
            )
        if len(self.expected) == 1 or not all(
            isinstance(time, int | float) and 0 < time <= MOST for time in self.expected
        ):
            raise ConfigError(
                "options of policy 'marginal': expected must hold the times of 1, 2, 4, ... "
                f"positions, such as [1, 1.5, 2.2], got {self.expected!r}"
            )
        if not self.rate_memory >= 1:
            raise ConfigError(
                f"options of policy 'marginal': rate_memory must be at least 1, "
                f"got {self.rate_memory}"
            )


@dataclass(slots=True)
class _Request:
    """What the rule keeps of one request."""

    max_k: int
    decisions: list[Decision]  # by K: making one takes as long as all else in a large batch


class _Mode(NamedTuple):
    """How batches of a size are decided about."""

    judge: Judge
    accounts: Accounts
    looks: int  # decisions for which how far to draft holds


@dataclass(slots=True)
class _Batch:
    """The last decision."""

    requests: int = 1  # in the step, those of other policies too
    names: list[str] = field(default_factory=list)  # of ours; the rest is in their order
    survival: Rows = ()
    lengths: list[int] = field(default_factory=list)  # tokens of the drafts that may be verified
    rates: list[float] = field(default_factory=list)
    ks: list[int] = field(default_factory=list)


class Marginal(Policy):
    """The marginal rule on predicted acceptance and measured cost, step by step."""

    name = "marginal"
    Settings = MarginalSettings
    learns = True
    settings: MarginalSettings

    def __init__(self, settings: MarginalSettings, max_k: int) -> None:
        from moecascade.core.marginal.acceptance import TextJudge  # compiled, which takes a second

        super().__init__(settings, max_k)
        self._width = width = min(max_k, LONGEST)
        self._requests: dict[str, _Request] = {}
        self._costs = CostModel(
            settings.experts, settings.top_k, settings.ladder, settings.expected
        )
        memory, every = settings.rate_memory, Rate.first()
        self._text, self._own = TextJudge(width), OwnAccounts(memory, settings.most_lost, every)
        self._recent = RecentJudge(width)
        self._counts = CountsJudge(width)
        searched = (settings.search_min, settings.search_max)
        self._ahead_of = AheadJudge(width, self._text, searched, settings.filled)
        self._judges = (self._text, self._recent, self._counts, self._ahead_of)
        self._unseen: Unseen | None = None  # where the engine shows no drafts
        self._small = _Mode(self._text, self._own, 1)
        self._large = _Mode(self._recent, SharedAccount(memory, every), LARGE_BATCH_LOOKS)
        self._mode = self._small  # of the last decision
        self._batch = _Batch()
        self._others = 0  # requests under other policies in the last step
        self._drafting = Drafting(width)
        self._asked = False  # whether the drafter is told how far to draft
        self._ahead = 0  # tokens that a model is to draft
        self._ahead_for = 0  # decisions for which that still holds

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Keep the prompt; expect the rate of all requests."""
        decisions = [Decision(request_id, k, self.name) for k in range(self._width + 1)]
        self._requests[request_id] = _Request(min(max_k, self._width), decisions)
        for judge in self._judges:
            judge.begin(request_id, prompt)
        self._own.begin(request_id)

    def drop(self, request_id: str) -> None:
        """Forget the request; what it taught remains."""
        self._requests.pop(request_id, None)
        for part in (*self._judges, self._own):
            part.end(request_id)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Admit the slots that pay, best first."""
        names, n = [p.request_id for p in proposals], len(proposals) + self._others
        requests = [self._requests[name] for name in names]
        asked = list(zip(proposals, requests, strict=True))
        drafts = [p.tokens if r.max_k else () for p, r in asked]
        if self._unseen is None and not any(drafts) and any(p.unseen for p in proposals):
            self._go_without_seeing()
        judge, accounts, _ = self._mode = (
            self._large if len(proposals) > self.settings.crowd else self._small
        )
        survival = judge.propose(names, drafts)
        lengths = [
            r.max_k if (length := len(p.tokens) or p.unseen) > r.max_k else length for p, r in asked
        ]
        costs = self._costs.costs(n, len(names) * self._width)
        rates = accounts.rates(names)
        limits = accounts.limits(names, lengths, n, costs)
        if ladder := self._costs.ladder:
            ks = on_ladder(survival, rates, limits, n, costs, ladder, self._costs.factor)
        else:
            ks = allot(survival, rates, limits, n, costs)
        if self._unseen is not None:
            if not self._asked and judge is self._counts:
                self._unseen.turn()
            ks = self._unseen.amend(ks, limits)
            self._ahead_of.decided(names, ks)
        self._batch = _Batch(n, names, survival, lengths, rates, ks)
        self._ahead_for -= 1
        return [r.decisions[k] for r, k in zip(requests, ks, strict=True)]

    def observe(self, step: Step) -> None:
        """Learn cost from decode steps, acceptance from every step's tokens."""
        parts = [part for part in step.requests if part.request_id in self._requests]
        n = len(step.requests)
        self._others = n - len(parts)
        self._mode.judge.learn(parts)
        idle = self._small if self._mode is self._large else self._large
        if idle.judge is not self._mode.judge:
            idle.judge.follow(parts)
        if step.decode and step.seconds is not None:
            ks = [part.drafted for part in step.requests]
            drafts = sum(ks)
            self._costs.observe(n + drafts, step.seconds, step.passes, ks)
            if parts:
                cost = self._costs.cost(n, drafts, step.passes, ks)
                self._mode.accounts.charge(parts, cost, n, drafts)

    def _go_without_seeing(self) -> None:
        """From now on judge drafts that are not shown: an engine shows all or none."""
        self._unseen = Unseen(self._width)
        self._counts.late = True
        judge = self._ahead_of if self.settings.search_max else self._counts
        self._small = self._small._replace(judge=judge)
        self._large = self._large._replace(judge=self._counts, looks=1)

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return how far to draft for the whole batch; see `Drafting` and `Unseen`."""
        self._asked = True
        if self._ahead_for <= 0:
            self._ahead_for = self._mode.looks
            self._ahead = self._draft_length()
        most = max([self._requests[request_id].max_k for request_id in request_ids], default=0)
        return min(self._ahead, most)

    def _draft_length(self) -> int:
        at = self._batch
        here = [name for name in at.names if name in self._requests]
        one_pass = at.requests * self._costs.pass_cost(at.requests)
        if not here:
            return 1 if self._unseen else self._drafting.length(one_pass)
        rows = [row for row, name in enumerate(at.names) if name in self._requests]
        most: Sequence[int] = [self._requests[name].max_k for name in here]
        costs = self._costs.costs(at.requests, len(here) * self._width)
        delay = at.requests * (costs - 1.0)
        survival = self._mode.judge.prolonged(at.survival, at.lengths)[rows]
        if self._unseen is not None:  # a draft that could not be borne is not made
            most = self._mode.accounts.limits(here, most, at.requests, costs)
        worth = np.where(
            np.arange(self._width) < np.array(most)[:, None],
            survival / np.array(at.rates)[rows, None],
            0.0,
        )
        if self._unseen is not None:
            return self._unseen.length(worth, delay, one_pass, self._costs.ladder)
        drafted = np.array(at.lengths)[rows] > 0
        if drafted.any():
            self._drafting.consider(worth[drafted], delay)
        return self._drafting.length(one_pass)

    def explain(self, request_id: str) -> Expectation | None:
        """Return what is expected of the step; lambda, survival, and the cost of each K.

        None for a request that the last decision was not about.
        """
        at = self._batch
        if request_id not in at.names:
            return None
        place = at.names.index(request_id)
        k, drafts, passes = at.ks[place], sum(at.ks), max(0, self._ahead - 1)
        survival = [float(chance) for chance in at.survival[place][: at.lengths[place]]]
        tokens = 1.0 + sum(survival[:k])
        cost = self._costs.cost(at.requests, drafts, passes, at.ks)
        parts = {
            "lambda": at.rates[place],
            "lost": self._own.lost(request_id),
            "survival": survival,
            "costs": self._costs.costs(at.requests, self._width)[: self._width + 1].tolist(),
        }
        return Expectation(
            tokens / cost_share(cost, 1.0, at.requests, k, drafts),
            tokens,
            self._costs.seconds(at.requests + drafts, passes, at.ks),
            parts,
        )
