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
from dataclasses import dataclass, replace

import numpy as np

from moecascade.core.cost import expert_union
from moecascade.core.ngram import NgramDrafter
from moecascade.core.policy import Policy
from moecascade.core.registry import applicable, create
from moecascade.core.spec import parse
from moecascade.core.step import Decision, Proposal, RequestStep, Step, matching_prefix
from moecascade.errors import ConfigError
from moecascade.telemetry.traces import Trace

MIXTRAL_LIKE = (1.0, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8)
"""Step times over the baseline with 0 to 8 drafts, much as the paper measured for Mixtral."""
BASE_SECONDS = 0.02  # what a baseline step takes; policies see seconds
WRONG = -1  # no token's id
LONG = 100  # tokens of a request whose own speed-up counts for the worst and the 5th percentile


@dataclass(frozen=True, slots=True)
class ReplayConditions:
    """The engine that is simulated: what steps cost, what the drafter may do, how many requests.

    Attributes:
        costs: Step time over the baseline with 0, 1, ... drafts, for one request.
        noise: Sigma of the log-normal noise on each step's time.
        seed: Of the order of requests and of the noise.
        max_k: Longest draft.
        ngram_min: Least length of an n-gram match.
        ngram_max: Greatest length of an n-gram match.
        batch: Requests served at once.
        experts: Routed experts a layer, for costs beyond the curve.
        top_k: Experts that a token is routed to, for costs beyond the curve.
        late: Whether K is decided one step early, without seeing the draft, as asynchronous
            scheduling has it. The oracle knows in time.
        filled: Whether drafts are filled up to K with tokens that are verified and paid for, as
            vLLM's second model runner does with what a search did not find.
        recorded: Whether drafts are those that the traces hold, of a model that drafts, one pass a
            token, as many as it is told; else they are found in the text.
        pass_cost: Time of one of its passes, in baseline steps. It makes one in every step, whether
            a draft is wanted or not, so speed-ups are over a step with that one.
        further: Step times beyond those of `costs`, by the positions that a step computes; without
            them the curve goes on as experts do.
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
    late: bool = False
    filled: bool = False
    recorded: bool = False
    pass_cost: float = 0.0
    further: Sequence[float] = ()

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
        if not 0 <= self.pass_cost < math.inf:
            raise ConfigError(f"pass cost {self.pass_cost} (--pass-cost): give 0 or more")
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
        if positions <= len(self.costs) + len(self.further):
            return self.further[positions - 1 - len(self.costs)] / self.costs[0]
        ends = [expert_union(p, self.experts, self.top_k) for p in (1, len(self.costs))]
        slope = (self.costs[-1] / self.costs[0] - 1.0) / (ends[1] - ends[0])
        return 1.0 + slope * (expert_union(positions, self.experts, self.top_k) - ends[0])

    def drafting(self, tokens: int) -> float:
        """Return the time of drafting so many tokens, in baseline steps."""
        return self.pass_cost * max(1, tokens) if self.recorded else 0.0


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

    def add(self, drafted: int, emitted: int, time: float, plain: float) -> None:
        """Count a step that took `time`; a step of the same batch without drafts takes `plain`."""
        self.tokens += emitted
        self.time += time
        self.plain += emitted * plain
        self.steps += 1
        self.drafted += drafted
        self.off += drafted == 0


class RecordedDrafter:
    """What a drafter proposed when the answer was recorded.

    Args:
        trace: The request.
        max_k: Longest draft.
    """

    def __init__(self, trace: Trace, max_k: int) -> None:
        self._trace = trace
        self._max_k = max_k
        self._out = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on by what was generated."""
        self._out += len(tokens)

    def propose(self) -> list[int]:
        """Return the draft for what follows; where only a number is known, wrong ones after it."""
        at = self._out - 1
        draft = self._trace.drafts[at] if at < len(self._trace.drafts) else ()
        if isinstance(draft, int):
            right = self._trace.output[self._out : self._out + min(draft, self._max_k)]
            return [*right, *[WRONG] * (self._max_k - len(right))]
        return list(draft[: self._max_k])


@dataclass(slots=True)
class _Running:
    """A request under way."""

    name: str
    drafter: NgramDrafter | RecordedDrafter
    outcome: Outcome
    emitted: int = 1  # the first token comes with the prompt
    decided: int = 0  # K of its next step, where it is decided early

    @property
    def left(self) -> int:
        """Tokens of the answer that are still to come."""
        return len(self.outcome.trace.output) - self.emitted

    def verify(self, draft: Sequence[int]) -> Sequence[int]:
        """Emit the tokens of a step: the right ones of the draft, and the target's own."""
        rest = self.outcome.trace.output[self.emitted : self.emitted + len(draft) + 1]
        tokens = rest[: matching_prefix(draft, rest) + 1]
        self.emitted += len(tokens)
        return tokens


class Oracle(Policy):
    """The policy that knows the answers: the right tokens that pay best in this one step.

    It looks no further than the step, so it bounds other policies in practice, not by proof.

    Args:
        traces: What is played. `play` names a request by its place in this list.
        conditions: What steps cost.
    """

    name = "oracle"

    def __init__(self, traces: Sequence[Trace], conditions: ReplayConditions) -> None:
        super().__init__(conditions, conditions.max_k)
        self.settings: ReplayConditions
        self._traces = traces
        self._emitted: dict[str, int] = {}
        self._next: dict[str, int] = {}  # tokens out after the step just decided

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:  # noqa: ARG002
        """Follow a request from its first token on."""
        self._emitted[request_id] = 0

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        del self._emitted[request_id]
        self._next.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return the numbers of right tokens that make the tokens per time of this step highest."""
        right = [self._right(p.request_id, p.tokens) for p in proposals]
        decisions = []
        for p, k in zip(proposals, self._best(right), strict=True):
            decisions.append(Decision(p.request_id, k, self.name))
            self._next[p.request_id] = self._emitted[p.request_id] + k + 1
        return decisions

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the longest draft that will be wanted at the next place of each."""
        right = []
        for name in request_ids:
            trace, at = self._traces[int(name)], self._next.get(name, 1)
            drafter = RecordedDrafter(trace, self.max_k)
            drafter.extend(trace.output[:at])
            right.append(matching_prefix(drafter.propose(), trace.output[at:-1]))
        return max(self._best(right))

    def _best(self, right: Sequence[int]) -> list[int]:
        """Return how many tokens of each draft make the step's tokens per time highest.

        Args:
            right: How many of each draft's tokens are right.
        """
        n, c = len(right), self.settings

        def admitted(left: int) -> list[int]:
            ks = []
            for most in right:
                ks.append(min(most, left))
                left -= ks[-1]
            return ks

        def rate(ks: Sequence[int]) -> float:
            return (n + sum(ks)) / (c.cost(n + sum(ks)) + c.drafting(max(ks)))

        return max(map(admitted, range(sum(right) + 1)), key=rate)

    def observe(self, step: Step) -> None:
        """Count what was emitted."""
        for part in step.requests:
            self._emitted[part.request_id] += part.emitted

    def _right(self, request_id: str, draft: Sequence[int]) -> int:
        at = self._emitted[request_id]
        answer = self._traces[int(request_id)].output
        return matching_prefix(draft, answer[at : at + len(draft)])


def make(
    spec: str,
    traces: Sequence[Trace],
    conditions: ReplayConditions,
    options: Mapping[str, object] | None = None,
) -> Policy:
    """Return a new policy for `play`: what `create` takes, or ``oracle``."""
    if spec == Oracle.name:
        return Oracle(traces, conditions)
    c = conditions
    facts = {"search_min": c.ngram_min, "search_max": c.ngram_max, "filled": c.filled}
    known = {} if c.recorded else applicable(parse(spec).name, facts)
    return create(spec, c.max_k, {**known, **(options or {})})


def play(
    traces: Sequence[Trace],
    policy: str | Policy,
    conditions: ReplayConditions,
    options: Mapping[str, object] | None = None,
    tell: Callable[[int], None] = lambda _tokens: None,
) -> list[Outcome]:
    """Replay all requests under one policy.

    Args:
        traces: The requests.
        policy: A policy, which may have served others before, or the spec of a new one (`make`).
        conditions: Costs, noise, drafter, batch.
        options: Settings of the policy that a spec names.
        tell: Told now and then how many tokens have been replayed since it was last told.

    Returns:
        What happened to each request, in the order in which they ended.
    """
    if isinstance(policy, str):
        policy = make(policy, traces, conditions, options)
    if isinstance(policy, Oracle):
        conditions = replace(conditions, late=False)
    elif conditions.recorded and not conditions.late and any(map(_counted, traces)):
        raise ConfigError(
            "the traces say how many tokens of a draft were right, not which tokens it had, so no "
            "policy can see them: replay with --late"
        )
    random = np.random.default_rng(conditions.seed)
    waiting = [int(i) for i in random.permutation(len(traces)) if len(traces[i].output) > 1]
    waiting.reverse()
    engine = _Engine(policy, conditions)
    done: list[Outcome] = []
    while waiting or engine.running:
        for _ in range(min(len(waiting), conditions.batch - len(engine.running))):
            i = waiting.pop()
            engine.begin(str(i), traces[i])
        engine.step(float(np.exp(random.normal(0, conditions.noise))))
        for outcome in engine.ended():
            done.append(outcome)
            tell(outcome.tokens)
    return done


def _counted(trace: Trace) -> bool:
    return any(isinstance(draft, int) for draft in trace.drafts)


class _Engine:
    """The engine that is simulated.

    Args:
        policy: Who decides.
        conditions: What it is like.
    """

    def __init__(self, policy: Policy, conditions: ReplayConditions) -> None:
        self._policy = policy
        self._conditions = conditions
        self._ahead = conditions.max_k  # tokens that the drafter makes at the end of a step
        self.running: list[_Running] = []
        self._starting: list[_Running] = []  # their prompts are read in the step that comes

    def begin(self, name: str, trace: Trace) -> None:
        """Start a request: its first token comes with the prompt, as in an engine."""
        c, policy = self._conditions, self._policy
        drafter = (
            RecordedDrafter(trace, c.max_k)
            if c.recorded
            else NgramDrafter(trace.prompt, c.ngram_min, c.ngram_max, c.max_k, c.filled)
        )
        drafter.extend(trace.output[:1])
        policy.add(name, c.max_k, trace.prompt)
        request = _Running(name, drafter, Outcome(trace))
        if c.late:
            self._starting.append(request)
            return
        self._look_ahead([*(r.name for r in self.running), name])
        self._read_prompt(request)
        self.running.append(request)

    def _read_prompt(self, request: _Running) -> None:
        first = request.outcome.trace.output[:1]
        self._policy.observe(Step(None, False, (RequestStep(request.name, 0, 1, first, k=0),)))

    def step(self, noise: float) -> None:
        """Decide, verify, emit, draft, count, and show the policy what came of it."""
        if self._starting and not self.running:  # a step that only reads prompts
            self._decide_early()
            self._look_ahead([r.name for r in self._starting])
            self._join()
        c, running, policy = self._conditions, self.running, self._policy
        n, drafted = len(running), self._ahead
        drafts = [r.drafter.propose()[: r.left - 1] for r in running]
        if c.late:
            ks = [r.decided for r in running]
            self._decide_early()
        else:
            proposals = [
                Proposal(r.name, draft[:drafted]) for r, draft in zip(running, drafts, strict=True)
            ]
            ks = [min(decision.k, drafted) for decision in policy.decide(proposals)]
        self._look_ahead([r.name for r in (*running, *self._starting)])
        made = drafted if c.late else self._ahead  # at the end of this step
        drafts = [draft[:k] for draft, k in zip(drafts, ks, strict=True)]
        verified = [
            min(k, r.left - 1) if c.filled else len(draft)
            for r, k, draft in zip(running, ks, drafts, strict=True)
        ]
        time = (c.cost(n + sum(verified)) + c.drafting(made)) * noise
        plain = c.cost(n) + c.drafting(0)
        parts = []
        for r, k, draft, paid in zip(running, ks, drafts, verified, strict=True):
            tokens = r.verify(draft)
            r.drafter.extend(tokens)
            r.outcome.add(paid, len(tokens), time, plain)
            parts.append(RequestStep(r.name, paid, len(tokens), tokens, k if c.late else None))
        passes = max(0, made - 1) if c.recorded else 0
        policy.observe(Step(time * BASE_SECONDS, True, tuple(parts), passes))
        self._join()

    def _decide_early(self) -> None:
        """Decide about the step after the one that comes, of which only the K are known."""
        asked = [(r, r.left - 2) for r in self.running]  # a token of this step, one of that
        asked += [(r, r.left - 1) for r in self._starting]
        room = [min(self._ahead, max(0, most)) for _, most in asked]
        proposals = [Proposal(r.name, unseen=k) for (r, _), k in zip(asked, room, strict=True)]
        decisions = self._policy.decide(proposals)
        for (r, _), decision, most in zip(asked, decisions, room, strict=True):
            r.decided = min(decision.k, most)

    def _join(self) -> None:
        """Let the requests whose prompts were read take part from now on."""
        for request in self._starting:
            self._read_prompt(request)
        self.running += self._starting
        self._starting = []

    def ended(self) -> list[Outcome]:
        """Let the requests go that have ended, and return what happened to them."""
        done = [r for r in self.running if not r.left]
        self.running = [r for r in self.running if r.left]
        for r in done:
            self._policy.drop(r.name)
        return [r.outcome for r in done]

    def _look_ahead(self, names: Sequence[str]) -> None:
        """Ask how far to draft, of a drafter that can be told."""
        if self._conditions.recorded:
            self._ahead = min(self._policy.lookahead(names), self._conditions.max_k)


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """One policy's figures over all requests; times in baseline steps, speed-ups over none.

    Attributes:
        speedup: Of all requests together.
        by_task: Of each task's requests together, tasks in alphabetical order.
        worst_request: Lowest of a single request of `LONG` tokens or more, of any where none is.
        p5_request: Fifth percentile of the same.
        etr: Tokens a step.
        mean_k: Draft tokens verified a step.
        off_share: Share of steps without drafts, 0 to 1.
    """

    speedup: float
    by_task: dict[str, float]
    worst_request: float
    p5_request: float
    etr: float
    mean_k: float
    off_share: float


def summarise(outcomes: Sequence[Outcome]) -> ReplaySummary:
    """Return the figures of one policy."""
    long = [o.speedup for o in outcomes if len(o.trace.output) >= LONG]
    long = long or [o.speedup for o in outcomes]
    steps = sum(o.steps for o in outcomes)
    tasks = sorted({o.trace.task for o in outcomes})
    return ReplaySummary(
        speedup=_speedup(outcomes),
        by_task={t: _speedup([o for o in outcomes if o.trace.task == t]) for t in tasks},
        worst_request=min(long),
        p5_request=float(np.percentile(long, 5)),
        etr=sum(o.tokens for o in outcomes) / steps,
        mean_k=sum(o.drafted for o in outcomes) / steps,
        off_share=sum(o.off for o in outcomes) / steps,
    )


def _speedup(outcomes: Sequence[Outcome]) -> float:
    return sum(o.plain for o in outcomes) / sum(o.time for o in outcomes)
