"""Replay: policies on recorded text with a drafter and a cost model, without an engine.

The policy objects are those of the engine. A request emits its recorded tokens; what a step emits
follows from comparing the draft with them, what it costs from a curve. One policy object serves all
requests in turn, in an order shuffled by the seed, as in a server.

Time is counted in baseline steps: the time of a step of one request without drafts. The speed-up is
the tokens after the first of each request over the time that they took, relative to no speculation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moecascade.core.cost import expert_union
from moecascade.core.policy import Policy
from moecascade.core.registry import create
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.replay.ngram import NgramDrafter
from moecascade.telemetry.traces import Trace

ORACLE = "oracle"
MIXTRAL_LIKE = (1.0, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8)
"""Step times over the baseline with 0 to 8 drafts, much as the paper measured for Mixtral."""
BASE_SECONDS = 0.02  # what a baseline step takes; policies see seconds
LONG = 100  # tokens of a request whose own speed-up counts for the worst and the 5th percentile


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is replayed under.

    Attributes:
        costs: Step time over the baseline with 0, 1, ... drafts, for one request.
        noise: Sigma of the log-normal noise on each step's time.
        seed: Of the order of requests and of the noise.
        max_k: Longest draft.
        ngram_min: Least length of an n-gram match.
        ngram_max: Greatest length of an n-gram match.
        batch: Requests served at once.
        experts: For costs beyond the curve: routed experts a layer, and
        top_k: how many of them a token is routed to.
    """

    costs: Sequence[float]
    noise: float = 0.0
    seed: int = 0
    max_k: int = 8
    ngram_min: int = 2
    ngram_max: int = 4
    batch: int = 1
    experts: int = 8
    top_k: int = 2

    def __post_init__(self) -> None:
        """Check the values; ConfigError names the first that is wrong."""
        if self.max_k < 1:
            raise ConfigError(f"longest draft {self.max_k} (--max-k): give 1 or more")
        if len(self.costs) != self.max_k + 1:
            raise ConfigError(
                f"{len(self.costs)} costs (--cost): give one for each of 0 to {self.max_k} drafts, "
                f"{self.max_k + 1} in all, or change --max-k"
            )
        for cost in self.costs:
            if not 0 < cost < math.inf:
                raise ConfigError(f"cost {cost} (--cost): give times above 0")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise {self.noise} (--noise): give 0 or more")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} (--seed): give 0 or more")
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch}: give 1 or more")
        if not 1 <= self.ngram_min <= self.ngram_max:
            raise ConfigError(
                f"n-grams of {self.ngram_min} to {self.ngram_max} tokens: give 1 <= min <= max"
            )

    def cost(self, positions: int) -> float:
        """Return the time of a step that computes `positions`, in baseline steps.

        Beyond the curve it goes on in proportion to the expert union, with the slope of the curve's
        ends.
        """
        if positions <= len(self.costs):
            return self.costs[positions - 1] / self.costs[0]
        ends = [expert_union(p, self.experts, self.top_k) for p in (1, len(self.costs))]
        slope = (self.costs[-1] / self.costs[0] - 1.0) / (ends[1] - ends[0])
        return 1.0 + slope * (expert_union(positions, self.experts, self.top_k) - ends[0])


@dataclass(slots=True)
class Outcome:
    """What a policy did to one request.

    Attributes:
        trace: The request.
        tokens: Tokens after the first.
        time: Time of the steps that it took part in, in baseline steps.
        plain: Time that it would have taken without drafts in the same batches.
        steps: Steps.
        drafted: Draft tokens verified.
        off: Steps without drafts.
    """

    trace: Trace
    tokens: int = 0
    time: float = 0.0
    plain: float = 0.0
    steps: int = 0
    drafted: int = 0
    off: int = 0

    @property
    def speedup(self) -> float:
        """Over no speculation."""
        return self.plain / self.time if self.time else 1.0


@dataclass(slots=True)
class _Running:
    """A request under way."""

    name: str
    drafter: NgramDrafter
    outcome: Outcome
    at: int = 1  # tokens emitted; the first comes with the prompt
    proposal: Sequence[int] = field(default_factory=list)

    def matching(self) -> int:
        """Return how many tokens of the proposal are right."""
        rest = self.outcome.trace.output[self.at : self.at + len(self.proposal)]
        right = 0
        for drafted, token in zip(self.proposal, rest, strict=False):
            if drafted != token:
                break
            right += 1
        return right


def play(
    traces: Sequence[Trace],
    policy: str | Policy,
    conditions: Conditions,
    options: Mapping[str, object] | None = None,
    tell: Callable[[int], None] = lambda _tokens: None,
) -> list[Outcome]:
    """Replay all requests under one policy.

    Args:
        traces: The requests.
        policy: A policy's spec; or `ORACLE`, which knows how many draft tokens are right and uses
            the number of them that makes the step's rate highest; or a policy that has served
            others before.
        conditions: Costs, noise, drafter, batch.
        options: Settings of the policy that a spec names.
        tell: Told now and then how many tokens have been replayed since it was last told.

    Returns:
        What happened to each request, in the order in which they ended.
    """
    random = np.random.default_rng(conditions.seed)
    queue = [traces[i] for i in random.permutation(len(traces)) if len(traces[i].output) > 1]
    queue.reverse()
    chooser: Policy | None = None
    if not isinstance(policy, str):
        chooser = policy
    elif policy != ORACLE:
        chooser = create(policy, conditions.max_k, options)
    running: list[_Running] = []
    done: list[Outcome] = []
    while queue or running:
        while queue and len(running) < conditions.batch:
            running.append(_begin(queue.pop(), len(queue), chooser, conditions))
        for r in running:
            room = len(r.outcome.trace.output) - r.at
            r.proposal = r.drafter.propose()[: room - 1]  # one comes anyway
        ks = _oracle(running, conditions) if chooser is None else _ask(chooser, running)
        _step(running, ks, chooser, conditions, float(np.exp(random.normal(0, conditions.noise))))
        still = []
        for r in running:
            if r.at < len(r.outcome.trace.output):
                still.append(r)
                continue
            if chooser is not None:
                chooser.drop(r.name)
            done.append(r.outcome)
            tell(r.outcome.tokens)
        running = still
    return done


def _begin(trace: Trace, name: int, policy: Policy | None, conditions: Conditions) -> _Running:
    c = conditions
    drafter = NgramDrafter(trace.prompt, c.ngram_min, c.ngram_max, c.max_k)
    drafter.extend(trace.output[:1])
    if policy is not None:
        # The first token comes with the prompt, as in an engine it does with its last chunk.
        policy.add(str(name), c.max_k, trace.prompt)
        part = RequestStep(str(name), 0, 1, trace.output[:1])
        policy.observe(Step(None, False, (part,)))
    return _Running(str(name), drafter, Outcome(trace))


def _ask(policy: Policy, running: Sequence[_Running]) -> list[int]:
    decisions = policy.decide([Proposal(r.name, r.proposal) for r in running])
    return [decision.k for decision in decisions]


def _oracle(running: Sequence[_Running], conditions: Conditions) -> list[int]:
    """Return the numbers of right tokens that make tokens per time of this step highest."""
    n = len(running)
    right = [r.matching() for r in running]
    total = max(range(sum(right) + 1), key=lambda d: (n + d) / conditions.cost(n + d))
    ks = [0] * n
    for i, room in enumerate(right):
        ks[i] = min(room, total)
        total -= ks[i]
    return ks


def _step(
    running: Sequence[_Running],
    ks: Sequence[int],
    policy: Policy | None,
    conditions: Conditions,
    noise: float,
) -> None:
    """Verify, emit, count, and show the policy."""
    n = len(running)
    drafts = [min(k, len(r.proposal)) for r, k in zip(running, ks, strict=True)]
    time = conditions.cost(n + sum(drafts)) * noise
    parts = []
    gained = 0
    for r, drafted in zip(running, drafts, strict=True):
        output = r.outcome.trace.output
        tokens = output[r.at : r.at + min(drafted, r.matching()) + 1]
        r.at += len(tokens)
        r.drafter.extend(tokens)
        gained += len(tokens)
        r.outcome.tokens += len(tokens)
        r.outcome.time += time
        r.outcome.plain += len(tokens) * conditions.cost(n)
        r.outcome.steps += 1
        r.outcome.drafted += drafted
        r.outcome.off += drafted == 0
        parts.append(RequestStep(r.name, drafted, len(tokens), tokens))
    if policy is not None:
        policy.observe(Step(time * BASE_SECONDS, True, tuple(parts)))


def summarise(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return the figures of one policy: see `moecascade replay --help`."""
    long = [o.speedup for o in outcomes if len(o.trace.output) >= LONG]
    long = long or [o.speedup for o in outcomes]
    steps = sum(o.steps for o in outcomes)
    tasks = sorted({o.trace.task for o in outcomes})
    return {
        "speedup": _aggregate(outcomes),
        "by_task": {t: _aggregate([o for o in outcomes if o.trace.task == t]) for t in tasks},
        "worst_request": min(long),
        "p5_request": float(np.percentile(long, 5)),
        "etr": sum(o.tokens for o in outcomes) / steps,
        "mean_k": sum(o.drafted for o in outcomes) / steps,
        "off_share": sum(o.off for o in outcomes) / steps,
    }


def _aggregate(outcomes: Sequence[Outcome]) -> float:
    return sum(o.plain for o in outcomes) / sum(o.time for o in outcomes)
