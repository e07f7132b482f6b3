"""Policy `cascade`: test-and-set on measured utility, as in the paper (arXiv 2506.20675).

A request goes through phases, each some steps long:

    baseline   K = 0, to measure the step time without drafts
    test       a few short trials at different K, climbing towards higher utility
    set        a longer run at the best K seen, K = 0 if no K paid; then the next test

Where each rule of the paper is:

    utility: ETR over cost                              core.utility.Tally
    test-and-set: t, M, S                               CascadeSettings, Cascade._advance
    test phase: first K is the request's best so far    Cascade._first_k
    hill climbing: keep the direction while U rises,    next_trial
      turn when it falls; stop within 10%, past a
      local maximum, at K = 0
    set phase: the best K seen, 0 where no U reaches 1  best_trial, Cascade._begin_set
    adaptive back-off: set phases double at K = 0       Cascade._begin_set
    baseline refresh: about every 100 iterations        core.baseline.Baseline.due, Cascade.decide

Ours, not the paper's:

* After a first trial that loses the search goes down: utility is 1 at K = 0.
* A request in a batch answers for its share of the step's extra time (`core.utility.cost_share`).
* The baseline is by batch size, and refreshed for all requests of a batch at once.
* A step as long as many is a pause of the machine, and counts for nothing (`pause`).
* Set phases stop growing at `LONGEST_SET`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from moecascade.core.baseline import Baseline
from moecascade.core.policy import Policy
from moecascade.core.settings import check_ranges
from moecascade.core.step import Decision, Expectation, Proposal, Step
from moecascade.core.utility import Tally, cost_share

Trial = tuple[int, float]  # K, and the utility measured with it

LONGEST_SET = 1 << 20  # steps, however often back-off has doubled them


@dataclass(frozen=True, slots=True)
class CascadeSettings:
    """The paper's constants, its letters in brackets, and one of ours.

    Attributes:
        trial_steps: Steps in a trial [t].
        max_trials: Trials in a test phase, at most [M].
        set_steps: Steps in a set phase before any back-off [S].
        first_k: K of a request's first trial.
        tolerance: Two trials whose utilities differ by less than this share end the test.
        backoff: Factor on the next set phase each time a test ends at K = 0; 1 for no back-off.
        baseline_steps: Steps at K = 0 that measure the baseline.
        refresh_steps: Age, in steps, at which the baseline is measured again.
        pause: A step longer than this many baselines is a pause of the machine, not a cost of
            drafts, and is not counted. Ours; the paper's highest cost is below 3.
    """

    trial_steps: int = 4
    max_trials: int = 4
    set_steps: int = 16
    first_k: int = 3
    tolerance: float = 0.10
    backoff: float = 2.0
    baseline_steps: int = 4
    refresh_steps: int = 100
    pause: float = 10.0

    def __post_init__(self) -> None:
        """Check the ranges; ConfigError names the setting and what is allowed."""
        check_ranges(
            self,
            "cascade",
            trial_steps=(1, inf),
            max_trials=(1, inf),
            set_steps=(1, inf),
            first_k=(1, inf),
            tolerance=(0, inf),
            backoff=(1, inf),
            baseline_steps=(1, inf),
            refresh_steps=(1, inf),
            pause=(3, inf),
        )


def next_trial(trials: Sequence[Trial], max_k: int, settings: CascadeSettings) -> int | None:
    """Return the K to try next, or None where the test is over (paper: hill-climbing search).

    Args:
        trials: What this test phase has measured, in order, at least one trial.
        max_k: The longest draft allowed.
        settings: For the number of trials and the tolerance.
    """
    k, u = trials[-1]
    if len(trials) == settings.max_trials:
        return None
    if k == 1 and u < 1:  # the search has reached K = 0, whose utility is 1 by definition
        return None
    if len(trials) == 1:
        # Utility is 1 at K = 0, so on a unimodal curve a K that loses lies beyond the best one.
        up = u >= 1 and k < max_k
        candidate = k + 1 if up else k - 1
    else:
        before_k, before_u = trials[-2]
        direction = 1 if k > before_k else -1
        if abs(u - before_u) < settings.tolerance * before_u:  # converged
            return None
        if u > before_u:  # rising: keep the direction
            candidate = k + direction
        elif len(trials) == 2 and before_u >= 1:  # falling: turn, and try the other side
            candidate = before_k - direction
        else:  # fell on both sides, or fell after rising: a local maximum has been passed
            return None
    return candidate if 1 <= candidate <= max_k else None


def best_trial(trials: Sequence[Trial]) -> int:
    """Return the K that paid most, or 0 where none paid for itself."""
    k, u = max(trials, key=lambda trial: trial[1])
    return k if u >= 1 else 0


@dataclass(slots=True)
class _Request:
    """What the policy keeps of one request."""

    max_k: int
    phase: Literal["baseline", "test", "set"]
    k: int
    left: int  # steps left in the phase; in a test, in the trial
    set_steps: int  # length of the next set phase
    held: bool = False  # the step under way runs at K = 0 only to refresh the baseline
    tally: Tally = field(default_factory=Tally)  # of the trial or set phase
    trials: list[Trial] = field(default_factory=list)
    utilities: dict[int, float] = field(default_factory=dict)  # last known, by K


class Cascade(Policy):
    """Test-and-set with adaptive back-off and hill-climbing, for any number of requests."""

    name = "cascade"
    Settings = CascadeSettings
    settings: CascadeSettings

    def __init__(self, settings: CascadeSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._requests: dict[str, _Request] = {}
        self._baseline = Baseline(settings.baseline_steps, settings.refresh_steps)
        self._positions = 1  # of the last step without our drafts, see Baseline

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        """Begin with the baseline phase."""
        s = self.settings
        cap = min(max_k, self.max_k)
        self._requests[request_id] = _Request(cap, "baseline", 0, s.baseline_steps, s.set_steps)

    def drop(self, request_id: str) -> None:
        """Forget the request."""
        self._requests.pop(request_id, None)

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Return each request's K; 0 for all of them while the baseline has to be measured."""
        requests = [self._requests[p.request_id] for p in proposals]
        hold = any(r.k for r in requests) and self._baseline.due(self._positions)
        decisions = []
        for p, r in zip(proposals, requests, strict=True):
            r.held = hold
            if hold:
                decisions.append(Decision(p.request_id, 0, "refresh"))
            else:
                decisions.append(Decision(p.request_id, r.k, r.phase))
        return decisions

    def observe(self, step: Step) -> None:
        """Measure the step; move on the phases of the requests in it."""
        if step.seconds is None or not step.decode:
            return
        ours = []
        drafted = 0
        positions = len(step.requests)
        for part in step.requests:
            r = self._requests.get(part.request_id)
            if r is None:
                positions += part.drafted
            else:
                ours.append((r, part))
                drafted += part.drafted
        if not ours:
            return
        self._positions = positions
        if drafted:
            self._baseline.tick(positions)
        else:
            self._baseline.observe(positions, step.seconds)
        baseline = self._baseline.at(positions)
        if baseline is not None and step.seconds > self.settings.pause * baseline:
            return
        n = len(step.requests)
        for r, part in ours:
            if r.phase == "baseline":
                self._advance_baseline(r)
            elif baseline is not None and not r.held and part.k in (None, r.k):
                # Otherwise it was decided in an earlier phase: see `RequestStep.k`.
                cost = cost_share(step.seconds, baseline, n, part.drafted, drafted)
                r.tally.add(part.emitted, cost)
                self._advance(r)

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the highest K that any may have by then."""
        return max([self._ahead(self._requests[id_]) for id_ in request_ids], default=0)

    def _ahead(self, r: _Request) -> int:
        """Return K, or where the phase may end with the next step the highest K it may lead to."""
        if r.left > 1:
            return r.k
        if r.phase == "test":
            return min(max([r.k + 1, *(k for k, _ in r.trials)]), r.max_k)
        if r.k:  # the set phase's own utility may make another K of the history the best
            return max(r.utilities)
        return self._first_k(r)

    def explain(self, request_id: str) -> Expectation:
        """Return the utility measured in this phase; phase, utility by K and baseline (seconds)."""
        r = self._requests[request_id]
        parts = {
            "phase": r.phase,
            "utilities": dict(r.utilities),
            "next_set_steps": r.set_steps,
            "baseline": self._baseline.at(self._positions),
        }
        return Expectation(utility=r.tally.utility, parts=parts)

    def _first_k(self, r: _Request) -> int:
        """Return the first K of a test: the best non-zero K of the request's history."""
        best = max(r.utilities, key=r.utilities.__getitem__, default=self.settings.first_k)
        return min(best, r.max_k)

    def _advance_baseline(self, r: _Request) -> None:
        r.left -= 1
        if r.left <= 0 and r.max_k > 0:  # a request that may not speculate stays at K = 0
            self._begin_test(r)

    def _advance(self, r: _Request) -> None:
        r.left -= 1
        if r.left > 0:
            return
        if r.k:
            r.utilities[r.k] = r.tally.utility
        if r.phase == "set":
            self._begin_test(r)
            return
        r.trials.append((r.k, r.tally.utility))
        k = next_trial(r.trials, r.max_k, self.settings)
        if k is None:
            self._begin_set(r, best_trial(r.trials))
        else:
            self._begin(r, "test", k, self.settings.trial_steps)

    def _begin_test(self, r: _Request) -> None:
        r.trials.clear()
        self._begin(r, "test", self._first_k(r), self.settings.trial_steps)

    def _begin_set(self, r: _Request, k: int) -> None:
        if k == 0:  # adaptive back-off: 16, 32, 64, ...
            self._begin(r, "set", 0, r.set_steps)
            r.set_steps = round(min(r.set_steps * self.settings.backoff, LONGEST_SET))
        else:
            r.set_steps = self.settings.set_steps
            self._begin(r, "set", k, r.set_steps)

    def _begin(self, r: _Request, phase: Literal["test", "set"], k: int, steps: int) -> None:
        r.phase, r.k, r.left, r.tally = phase, k, steps, Tally()
