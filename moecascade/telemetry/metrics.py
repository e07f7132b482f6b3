"""What an engine counts for its operators: the families of metrics, and the counting.

Counted in the engine's process as plain numbers, and shown by the API server in its `/metrics`
(`vllm.exposition`). Names begin with ``moecascade:``, for ``vllm:`` is vLLM's own. Labels take few
values: no request's name is among them, and a policy that a user spelt counts as ``other``.

Speed-ups are estimates. A step without drafts takes what this engine's own cost model
(`core.cost`), which all decode steps teach, says of it; each request is charged for its drafts
(`core.utility.cost_share`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from moecascade.core.cost import CostModel
from moecascade.core.options import RequestOptions
from moecascade.core.step import Decision, Proposal, RequestStep, Step, matching_prefix
from moecascade.core.utility import cost_share

PREFIX = "moecascade:"
OTHER = "other"
MOST_VALUES = 32  # of a label whose values are not known beforehand; further ones are `OTHER`
REPORTS = 1024  # of ended requests that are kept until somebody fetches them

SPEEDUPS = (0.8, 0.9, 0.95, 0.97, 0.99, 1.01, 1.03, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0)

FAULTS = (
    "policy",
    "policies",
    "request options",
    "explanation of policy",
    "drafts",
    "step_log",
    "trace_log",
    "metrics",
    "live_page",
    OTHER,
)
"""Kinds of faults: what a fault is called without the name in quotes. Each begins at 0, as
Prometheus sees no increase in a series that begins at 1."""

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric as Prometheus knows it.

    Attributes:
        kind: ``counter``, ``gauge`` or ``histogram``.
        labels: What tells its series apart, besides the server's own ``model_name`` and ``engine``.
        help: What it says, in a sentence.
        buckets: Upper bounds of a histogram's buckets.
    """

    kind: str
    labels: Labels
    help: str
    buckets: tuple[float, ...] = ()


FAMILIES: dict[str, Family] = {
    "requests": Family(
        "counter", ("policy", "chosen_by"), "Requests, and whether server or request chose."
    ),
    "requests_capped": Family(
        "counter", ("policy",), "Requests with a cap on K of their own, 0 included."
    ),
    "requests_running": Family("gauge", ("policy",), "Requests that the controller knows."),
    "steps": Family(
        "counter", ("kind",), "Engine steps: decode, or mixed where a prompt was in them."
    ),
    "step_seconds": Family("counter", ("kind",), "Time of those steps."),
    "request_steps": Family(
        "counter", ("policy", "k"), "Steps that requests took part in, by drafts verified (K)."
    ),
    "decisions": Family("counter", ("policy", "reason"), "Decisions by the policy's reason."),
    "draft_tokens_proposed": Family("counter", ("policy",), "Draft tokens that drafters offered."),
    "draft_tokens_verified": Family("counter", ("policy",), "Draft tokens that were verified."),
    "draft_tokens_accepted": Family("counter", ("policy",), "Draft tokens that were accepted."),
    "tokens_emitted": Family("counter", ("policy",), "Tokens that steps gave."),
    "draft_positions_verified": Family(
        "counter", ("position",), "Drafts verified as far as this position, from 1."
    ),
    "draft_positions_accepted": Family(
        "counter", ("position",), "Drafts accepted as far as this position."
    ),
    "shadow_drafts": Family(
        "counter", ("policy",), "Drafts that were seen and not verified, with K at 0."
    ),
    "shadow_drafts_right": Family(
        "counter", ("policy",), "Those of them whose first token would have been accepted."
    ),
    "decode_seconds": Family(
        "counter", ("policy",), "Time of decoding, each request charged for its drafts."
    ),
    "baseline_seconds": Family(
        "counter", ("policy",), "Time that the same tokens would have taken without drafts."
    ),
    "saved_seconds": Family(
        "counter", ("policy",), "Time saved, by requests that drafts made faster as a whole."
    ),
    "lost_seconds": Family(
        "counter", ("policy",), "Time lost, by requests that drafts made slower as a whole."
    ),
    "utility_measured": Family(
        "histogram", ("policy",), "Speed-up of whole requests over no speculation.", SPEEDUPS
    ),
    "utility_expected": Family(
        "histogram", ("policy",), "Speed-up that policies expect of a step (a sample).", SPEEDUPS
    ),
    "step_time_ratio": Family(
        "histogram", (), "Time of decode steps over what was expected of them.", RATIOS
    ),
    "baseline_step_seconds": Family(
        "gauge", (), "What a step of the present batch would take without drafts."
    ),
    "controller_seconds": Family("counter", (), "Time that deciding and learning took."),
    "handover_seconds": Family(
        "counter", (), "Time that drafts took from vLLM's worker to its scheduler."
    ),
    "policies": Family("gauge", (), "Policies that are kept, each with what it has learnt."),
    "faults": Family("counter", ("kind",), "Faults that cost drafts, and no request."),
}


@dataclass(slots=True)
class Part:
    """What speculation did for one request so far.

    Attributes:
        policy: Label of the policy that decides for it.
        steps: Steps that gave it tokens.
        off: Those that verified no draft.
        drafted: Drafts verified.
        accepted: Drafts accepted.
        emitted: Tokens given.
        spent: Seconds of decode steps, charged as `cost_share` says.
        baseline: Seconds that the same tokens would have taken without drafts.
        draft: What was proposed for its next step, where that was seen.
        wanted: Whether somebody will ask for its `report`.
    """

    policy: str
    steps: int = 0
    off: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    spent: float = 0.0
    baseline: float = 0.0
    draft: Sequence[int] = ()
    wanted: bool = False

    def add(self, said: RequestStep) -> None:
        """Count what a step did for it."""
        self.steps += 1
        self.off += not said.drafted
        self.drafted += said.drafted
        self.accepted += said.accepted
        self.emitted += said.emitted
        self.draft = ()

    @property
    def speedup(self) -> float | None:
        """Estimated speed-up over no speculation; None where no decode step was timed."""
        return self.baseline / self.spent if self.spent else None

    def report(self) -> dict[str, Any]:
        """Return what a client is told of its request."""
        speedup = self.speedup
        return {
            "policy": self.policy,
            "steps": self.steps,
            "steps_without_drafts": self.off,
            "draft_tokens": self.drafted,
            "accepted_draft_tokens": self.accepted,
            "mean_draft_length": round(self.drafted / self.steps, 3) if self.steps else 0.0,
            "estimated_speedup": None if speedup is None else round(speedup, 3),
        }


@dataclass(slots=True)
class _Histogram:
    """Observations by bucket; the last one is of what lies above all bounds."""

    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class Totals:
    """Sums over all requests since the start, for a line in the log.

    Attributes:
        steps: Steps of requests.
        off: Those that verified no draft.
        drafted: Drafts verified.
        accepted: Drafts accepted.
        spent: As `Part.spent`.
        baseline: As `Part.baseline`.
        controller: Seconds that deciding took.
        seconds: Seconds that steps took.
    """

    steps: int = 0
    off: int = 0
    drafted: int = 0
    accepted: int = 0
    spent: float = 0.0
    baseline: float = 0.0
    controller: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class _Sums:
    """What one step adds to a policy's counters."""

    drafts: Counter[tuple[int, int]] = field(default_factory=Counter)  # verified, accepted
    reasons: Counter[str] = field(default_factory=Counter)
    utilities: list[float] = field(default_factory=list)  # expected
    shadows: Counter[int] = field(default_factory=Counter)  # whether the first token was right
    emitted: int = 0
    spent: float = 0.0
    baseline: float = 0.0

    def decided(self, decision: Decision) -> None:
        """Count a decision that was in force."""
        self.reasons[decision.why] += 1
        if decision.expected is not None and decision.expected.utility is not None:
            self.utilities.append(decision.expected.utility)

    def charge(self, part: Part, spent: float, baseline: float) -> None:
        """Charge a request and its policy."""
        part.spent += spent
        part.baseline += baseline
        self.spent += spent
        self.baseline += baseline


class Metrics:
    """Counts for one engine.

    Args:
        default: Spec of the server's policy.
        known: Names of policies that a label may say.
        facts: What is known of the model and its CUDA graphs (`core.controller.Controller`).
    """

    def __init__(
        self, default: str, known: Collection[str] = (), facts: Mapping[str, Any] | None = None
    ) -> None:
        """Begin at 0."""
        facts = facts or {}
        self.costs = CostModel(
            **{k: facts[k] for k in ("experts", "top_k", "ladder", "expected") if k in facts}
        )
        self.parts: dict[str, Part] = {}
        self.totals = Totals()
        self.reports: dict[str, Part] = {}
        self._known = {default, OTHER, "static:0", *known}
        self._plain: dict[str, dict[Labels, float]] = {
            name: defaultdict(float)
            for name, family in FAMILIES.items()
            if family.kind != "histogram"
        }
        self._spread: dict[str, dict[Labels, _Histogram]] = {
            name: {} for name, family in FAMILIES.items() if family.kind == "histogram"
        }
        for kind in FAULTS:
            self._add("faults", (kind,), 0)
        self._reasons: set[str] = set()
        self._verified: list[int] = []  # drafts that reached each position
        self._accepted: list[int] = []

    # ---- what happens in the engine --------------------------------------------------------------

    def begin(self, request_id: str, asked: RequestOptions, spec: str) -> None:
        """A request begins under the policy `spec`."""
        policy = self._label(spec)
        self.parts[request_id] = Part(policy, wanted=asked.report)
        self._add("requests", (policy, "server" if asked.policy is None else "request"))
        if asked.max_k is not None:
            self._add("requests_capped", (policy,))

    def propose(self, proposals: Iterable[Proposal]) -> None:
        """Drafters offer this for the next step."""
        offered: Counter[str] = Counter()
        for proposal in proposals:
            if (part := self.parts.get(proposal.request_id)) is not None:
                part.draft = proposal.tokens
                offered[part.policy] += proposal.length
        for policy, tokens in offered.items():
            self._add("draft_tokens_proposed", (policy,), tokens)

    def step(
        self, step: Step, decisions: Mapping[str, Decision], seconds: tuple[float, float]
    ) -> None:
        """Count a step.

        Args:
            step: What it did.
            decisions: Those in force during it, by request.
            seconds: What controller and handover took of it.
        """
        kind = "decode" if step.decode else "mixed"
        self._add("steps", (kind,))
        self._add("step_seconds", (kind,), step.seconds or 0.0)
        self._add("controller_seconds", (), seconds[0])
        self._add("handover_seconds", (), seconds[1])
        self.totals.controller += seconds[0]
        self.totals.seconds += step.seconds or 0.0
        self._share(step, decisions, self._timed(step))

    def end(self, request_id: str) -> None:
        """A request ended, however it ended. Unknown names are ignored."""
        part = self.parts.pop(request_id, None)
        if part is None:
            return
        if part.wanted:
            self.reports[request_id] = part
            while len(self.reports) > REPORTS:
                del self.reports[next(iter(self.reports))]
        if (speedup := part.speedup) is not None:
            saved = part.baseline - part.spent
            self._add("saved_seconds" if saved > 0 else "lost_seconds", (part.policy,), abs(saved))
            self._observe("utility_measured", (part.policy,), speedup)

    def fault(self, what: str) -> None:
        """Something of ours failed. Names in quotes are left out: users made them."""
        kind = what.partition(" '")[0]
        self._add("faults", (kind if kind in FAULTS else OTHER,))

    def _timed(self, step: Step) -> float | None:
        """Learn from a step's time; return what it would have taken without drafts, if known."""
        ks = [part.drafted for part in step.requests]
        if not (step.decode and step.seconds and ks):
            return None
        positions = len(ks) + sum(ks)
        expected = self.costs.seconds(positions, step.passes, ks)
        if expected:
            self._observe("step_time_ratio", (), step.seconds / expected)
        self.costs.observe(positions, step.seconds, step.passes, ks)
        baseline = self.costs.seconds(len(ks))
        self._plain["baseline_step_seconds"][()] = baseline or 0.0
        return baseline

    def _share(self, step: Step, decisions: Mapping[str, Decision], baseline: float | None) -> None:
        """Count what a step did for each request, and for each policy."""
        n, drafts = len(step.requests), sum(part.drafted for part in step.requests)
        costs: dict[int, float] = {}  # by drafts: a large batch has few different numbers
        sums: dict[str, _Sums] = {}
        for said in step.requests:
            part = self.parts.get(said.request_id)
            if part is None or not said.emitted:
                continue
            if (of := sums.get(part.policy)) is None:
                of = sums[part.policy] = _Sums()
            drafted = said.drafted
            of.drafts[drafted, said.accepted] += 1
            of.emitted += said.emitted
            if not drafted and part.draft and said.tokens:
                of.shadows[matching_prefix(part.draft[:1], said.tokens)] += 1
            part.add(said)
            if (decision := decisions.get(said.request_id)) is not None:
                of.decided(decision)
            if baseline is None or step.seconds is None:
                continue
            if drafts:
                if (cost := costs.get(drafted)) is None:
                    cost = cost_share(step.seconds, baseline, n, drafted, drafts)
                    costs[drafted] = cost
                of.charge(part, baseline * cost, baseline * said.emitted)
            else:  # nothing to tell apart, unless a drafter was at work all the same
                of.charge(part, step.seconds, baseline if step.passes else step.seconds)
        for policy, of in sums.items():
            self._total(policy, of)

    def _total(self, policy: str, of: _Sums) -> None:
        drafted = accepted = 0
        for (k, right), times in of.drafts.items():
            drafted += k * times
            accepted += right * times
            self._add("request_steps", (policy, str(k)), times)
            for counts, reached in ((self._verified, k), (self._accepted, right)):
                counts.extend([0] * (k - len(counts)))
                if reached:
                    counts[reached - 1] += times
        for reason, times in of.reasons.items():
            self._add("decisions", (policy, self._reason(reason)), times)
        for utility in of.utilities:
            self._observe("utility_expected", (policy,), utility)
        if of.shadows:
            self._add("shadow_drafts", (policy,), of.shadows.total())
            self._add("shadow_drafts_right", (policy,), of.shadows[1])
        self._add("draft_tokens_verified", (policy,), drafted)
        self._add("draft_tokens_accepted", (policy,), accepted)
        self._add("tokens_emitted", (policy,), of.emitted)
        self._add("decode_seconds", (policy,), of.spent)
        self._add("baseline_seconds", (policy,), of.baseline)
        totals = self.totals
        totals.steps += of.drafts.total()
        totals.off += of.drafts[0, 0]
        totals.drafted += drafted
        totals.accepted += accepted
        totals.spent += of.spent
        totals.baseline += of.baseline

    # ---- what others ask -------------------------------------------------------------------------

    def take_report(self, name: str) -> dict[str, Any] | None:
        """Return what speculation did for an ended request that wanted to know, and forget it.

        Args:
            name: The request's name as its client knows it. An engine puts a number before it or
                after it, and sums over the requests that a client's one became.
        """
        found = [key for key in self.reports if name and name in key]
        parts = [self.reports.pop(key) for key in found]
        if not parts:
            return None
        whole = Part(parts[0].policy)
        for part in parts:
            for key in ("steps", "off", "drafted", "accepted", "emitted", "spent", "baseline"):
                setattr(whole, key, getattr(whole, key) + getattr(part, key))
        return whole.report()

    def acceptance(self) -> list[tuple[int, int]]:
        """Return, for each position from 1, drafts verified and accepted as far as there."""
        verified, accepted = _reached(self._verified), _reached(self._accepted)
        return list(zip(verified, accepted, strict=True))

    def snapshot(self, policies: int = 0) -> dict[str, list[Any]]:
        """Return all series: labels and value, of a histogram counts by bucket and sum.

        Args:
            policies: How many are kept.
        """
        running = Counter(part.policy for part in self.parts.values())
        for policy, _ in self._plain["requests"]:
            self._plain["requests_running"][(policy,)] = running[policy]
        self._plain["policies"][()] = policies
        for place, (verified, accepted) in enumerate(self.acceptance(), 1):
            self._plain["draft_positions_verified"][(str(place),)] = verified
            self._plain["draft_positions_accepted"][(str(place),)] = accepted
        found: dict[str, list[Any]] = {
            name: [[labels, value] for labels, value in series.items()]
            for name, series in self._plain.items()
        }
        for name, spread in self._spread.items():
            found[name] = [[labels, [*h.counts], h.total] for labels, h in spread.items()]
        return found

    # ---- counting --------------------------------------------------------------------------------

    def _add(self, name: str, labels: Labels, value: float = 1) -> None:
        self._plain[name][labels] += value

    def _observe(self, name: str, labels: Labels, value: float) -> None:
        bounds, spread = FAMILIES[name].buckets, self._spread[name]
        if (histogram := spread.get(labels)) is None:
            histogram = spread[labels] = _Histogram([0] * (len(bounds) + 1))
        histogram.counts[bisect_left(bounds, value)] += 1
        histogram.total += value

    def _label(self, spec: str) -> str:
        name, _, argument = spec.partition(":")
        if spec in self._known or (name == "static" and argument.isdecimal() and len(spec) < 10):
            return spec
        return OTHER if spec else "none"

    def _reason(self, reason: str) -> str:
        if len(self._reasons) < MOST_VALUES:
            self._reasons.add(reason)
        return reason if reason in self._reasons else OTHER


def _reached(ended: Sequence[int]) -> list[int]:
    """Return how many went as far as each position, from how many ended there."""
    return list(accumulate(reversed(ended)))[::-1]


def in_words(since: Totals, now: Totals, requests: int) -> str | None:
    """Return a line for the log on what happened between two totals; None where nothing did."""
    steps = now.steps - since.steps
    if not steps:
        return None
    on = steps - (now.off - since.off)
    drafted, accepted = now.drafted - since.drafted, now.accepted - since.accepted
    spent, baseline = now.spent - since.spent, now.baseline - since.baseline
    words = [f"{requests} running", f"drafts in {on / steps:.0%} of steps"]
    if on:
        words.append(f"{drafted / on:.1f} tokens each, {accepted / drafted:.0%} accepted")
    if spent:
        words.append(f"about {baseline / spent:.2f} times as fast as without")
    if now.seconds > since.seconds:
        share = (now.controller - since.controller) / (now.seconds - since.seconds)
        words.append(f"deciding took {share:.1%}")
    return ", ".join(words)
