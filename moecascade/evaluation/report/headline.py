"""The handful of numbers that a reader asks for first, beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moecascade.evaluation.report import paper
from moecascade.evaluation.report.analysis import Analysis
from moecascade.evaluation.report.roles import HINDSIGHT, OURS, PEERS, static_k
from moecascade.evaluation.report.speedups import Comparison
from moecascade.evaluation.report.statistics import Speedup
from moecascade.evaluation.request_record import BASELINE, PLAIN

Form = Literal["change", "pace", "times", "share", "number"]
"""How a number is read: as a change of speed, as a delay, as a factor, in percent, as it is."""


@dataclass(frozen=True, slots=True)
class Number:
    """A line of the first table.

    Attributes:
        what: What it is.
        value: This run's.
        form: How it is read.
        low: Lower end of its 95% interval, where it has one.
        high: Upper end.
        behind: What it is of.
        paper: The paper's, or "".
    """

    what: str
    value: float
    form: Form
    low: float | None = None
    high: float | None = None
    behind: str = ""
    paper: str = ""


def headline(analysis: Analysis) -> list[Number]:
    """Return the numbers that these measurements allow."""
    return [*_worst(analysis), *_compared(analysis), *_utility(analysis), *_costs(analysis)]


def _worst(analysis: Analysis) -> Iterable[Number]:
    """Yield the worst workload of any model, as the paper has it."""
    for policy in OURS:
        mine = [of for of in analysis.main.workloads if of.policy == policy]
        yield from _lowest(f"{policy}: worst workload", mine, paper.WORST.get(policy, ""))
    static = [of for of in analysis.main.workloads if static_k(of.policy) is not None]
    yield from _lowest("a static K: worst workload", static, paper.WORST["static"], named=True)


def _lowest(
    what: str, found: Iterable[Comparison], beside: str, named: bool = False
) -> Iterable[Number]:
    worst = min(found, key=lambda of: of.speedup.value, default=None)
    if worst is not None:
        where = [worst.policy] * named + [worst.workload, worst.model]
        yield _of(what, worst.speedup, ", ".join(where), beside, "pace")


def _of(
    what: str, of: Speedup, behind: str = "", beside: str = "", form: Form = "change"
) -> Number:
    behind = behind or f"{of.pairs} pairs of {of.prompts} prompts"
    return Number(what, of.value, form, of.low, of.high, behind, beside)


def _compared(analysis: Analysis) -> Iterable[Number]:
    """Yield how the policies compare, one request at a time."""
    alone = {(c.policy, c.over): c for c in analysis.main.comparisons if c.concurrency == 1}
    for policy in OURS:
        if found := alone.get((policy, HINDSIGHT)):
            beside = paper.BEST_STATIC if policy == "cascade" else ""
            yield _of(f"{policy} over the best static K, in hindsight", found.speedup, "", beside)
    if found := alone.get(("marginal", "cascade")):
        yield _of("marginal over cascade", found.speedup)
    peers = [c for (policy, over), c in alone.items() if policy == "marginal" and over in PEERS]
    if peers:
        yield _fastest_peer(peers)
    if found := alone.get((BASELINE, PLAIN)):
        yield _of("our engine at K = 0 over vLLM without us", found.speedup)


def _fastest_peer(peers: Iterable[Comparison]) -> Number:
    best = min(peers, key=lambda c: c.speedup.value)
    return _of(f"marginal over {best.over}, the fastest of what others use", best.speedup)


def _utility(analysis: Analysis) -> Iterable[Number]:
    found = analysis.diagnostics
    if (squared := found.r_squared) is not None:
        behind = f"{len(found.utility)} points"
        what = "R² of utility against measured speed-up"
        yield Number(what, squared, "number", behind=behind, paper=paper.UTILITY)


def _costs(analysis: Analysis) -> Iterable[Number]:
    for model, curve in analysis.diagnostics.step_times.items():
        at = next((at for at in curve if at.k == paper.STEP_AT), curve[-1])
        what = f"time of a step that verifies {at.k} drafts, over none"
        yield Number(what, at.cost, "times", behind=model, paper=paper.STEP_TIME)
    if found := analysis.diagnostics.overheads.get(BASELINE):
        what = "share of a step until vLLM's drafts have come from its worker"
        yield Number(what, found.handover, "share", behind="K = 0")
    for policy in OURS:
        if found := analysis.diagnostics.overheads.get(policy):
            yield Number(f"share of a step that {policy} takes to decide", found.deciding, "share")
