"""A report's first table: what a reader asks first, answered, beside the paper's figures.

The paper's (arXiv 2506.20675) are of five models on one RTX 6000 Ada.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecascade import analysis
from moecascade.rows import BASELINE, Row
from moecascade.summary import Cell, totals

HINDSIGHT = "best static K"
ADAPTIVE = ("cascade", "marginal")


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the table.

    Attributes:
        what: The question.
        ours: This run's answer.
        paper: The paper's, or "".
    """

    what: str
    ours: str
    paper: str = ""


def findings(
    rows: Sequence[Row], cells: Sequence[Cell], points: Sequence[analysis.UtilityPoint]
) -> list[Finding]:
    """Return what these rows can answer."""
    single = [cell for cell in cells if cell.concurrency == 1 and cell.speedup is not None]
    return [
        *_worst(single),
        *_crowds(cells),
        *_advantage(rows),
        *_ablations(rows),
        *_utility(points),
        *_step_times(rows),
        *_presence(rows),
        *_deciding(rows),
    ]


def _worst(cells: Sequence[Cell]) -> list[Finding]:
    made = []
    for policy in ADAPTIVE:
        paper = "5% slower" if policy == "cascade" else ""
        what = f"{policy}: worst workload against no speculation"
        if found := _lowest([cell for cell in cells if cell.policy == policy]):
            made.append(Finding(what, found, paper))
    if found := _lowest([cell for cell in cells if cell.policy.startswith("static:")]):
        what = "a static K: worst workload against no speculation"
        made.append(Finding(what, found, "26%, 38%, 54% slower at K = 1, 2, 3"))
    return made


def _lowest(cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    worst = min(cells, key=lambda cell: cell.speedup or 0.0)
    change = (worst.speedup or 0.0) - 1
    how = f"{-change:.1%} slower" if change < 0 else f"{change:.1%} faster"
    name = f"{worst.policy}, " if worst.policy not in ADAPTIVE else ""
    within = ""
    if worst.low is not None and worst.high is not None:
        within = f"; {worst.low - 1:+.1%} to {worst.high - 1:+.1%}"
    return f"{how} ({name}{worst.workload}, {worst.condition.title}{within})"


def _crowds(cells: Sequence[Cell]) -> list[Finding]:
    """Return what several requests in flight gain."""
    made = []
    for policy in ADAPTIVE:
        parts = [
            f"{cell.concurrency} at once: {cell.speedup - 1:+.1%}{_within(cell)}"
            for of in totals(cells).values()
            for cell in of
            if cell.policy == policy and cell.concurrency > 1 and cell.speedup is not None
        ]
        if parts:
            made.append(Finding(f"{policy}: throughput against no speculation", "; ".join(parts)))
    return made


def _within(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return ""
    return f" ({cell.low - 1:+.1%} to {cell.high - 1:+.1%})"


def _advantage(rows: Sequence[Row]) -> list[Finding]:
    made = []
    best = analysis.with_hindsight(rows, HINDSIGHT)
    for policy in ADAPTIVE:
        if found := analysis.ratio([*rows, *best], policy, HINDSIGHT):
            paper = "Mixtral: +18%" if policy == "cascade" else ""
            what = f"{policy} over the best static K of each model, in hindsight"
            made.append(Finding(what, change(found), paper))
    if found := analysis.ratio(rows, "marginal", "cascade"):
        made.append(Finding("marginal over cascade", change(found)))
    return made


def _ablations(rows: Sequence[Row]) -> list[Finding]:
    """Return what cascade gains over itself with other settings."""
    specs = dict.fromkeys(row.policy for row in rows if row.policy.startswith("cascade["))
    return [
        Finding(f"cascade over {spec}", change(found))
        for spec in specs
        if (found := analysis.ratio(rows, "cascade", spec))
    ]


def _utility(points: Sequence[analysis.UtilityPoint]) -> list[Finding]:
    squared = analysis.r_squared(points)
    if squared is None:
        return []
    ours = f"{squared:.3f} over {len(points)} points"
    return [Finding("utility against measured speed-up, R²", ours, "0.994 over 120 points")]


def _step_times(rows: Sequence[Row]) -> list[Finding]:
    made = []
    for model in dict.fromkeys(row.model for row in rows):
        curve = analysis.step_times(row for row in rows if row.model == model)
        if len(curve) > 1:
            what = f"{model}: time of a step that verifies {curve[-1].k} drafts"
            paper = "at K = 7: MoE 2x to 3x, dense at most 1.03x"
            made.append(Finding(what, f"{curve[-1].cost:.2f}x", paper))
    return made


def _presence(rows: Sequence[Row]) -> list[Finding]:
    found = analysis.presence(rows)
    if found is None:
        return []
    made = [Finding("speed of our engine at K = 0 against vLLM without us", change(found))]
    mine = [r for r in rows if r.policy == BASELINE and r.concurrency == 1 and r.step_seconds]
    if mine:
        whole = sum(row.step_seconds for row in mine)
        handover = sum(row.handover_seconds for row in mine) / whole
        deciding = sum(row.controller_seconds for row in mine) / whole
        ours = (
            f"{handover:.1%} of a step until vLLM's drafts have come from its worker process, "
            f"{deciding:.1%} deciding; the rest is drafting, and noise"
        )
        made.append(Finding("where the difference goes", ours))
    return made


def _deciding(rows: Sequence[Row]) -> list[Finding]:
    made = []
    for policy in ADAPTIVE:
        mine = [r for r in rows if r.policy == policy and r.concurrency == 1 and r.steps]
        if mine:
            spent = sum(row.controller_seconds for row in mine)
            each = spent / sum(row.steps for row in mine)
            share = spent / sum(row.step_seconds for row in mine)
            ours = f"{each * 1e6:.0f} µs a step, {share:.2%} of it"
            made.append(Finding(f"{policy}: time that deciding takes", ours))
    return made


def change(found: analysis.Ratio) -> str:
    """Return a ratio as a change with its interval, and whether it can be told from none."""
    text = f"{found.value - 1:+.1%}"
    if found.low is None or found.high is None:
        return f"{text} (too few pairs for an interval)"
    telling = "" if found.low > 1 or found.high < 1 else "; within the noise"
    return f"{text} ({found.low - 1:+.1%} to {found.high - 1:+.1%}, {found.pairs} pairs{telling})"
