"""Which figures a report has: those that its rows allow, each with a title and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecascade.evaluation.report import charts, diagnostics
from moecascade.evaluation.report.speedups import Cell, Condition, by_workload, condition_of, totals
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: Of its file and its place in the page.
        title: What it shows, as a statement where the data allow one.
        text: How to read it.
        draw: Makes it, wide or narrow.
    """

    name: str
    title: str
    text: str
    draw: Callable[[bool], Figure]


INTERVALS = (
    "Points: all prompts together; lines: 95% intervals, bootstrap over prompts. Left of 1 a user "
    "waits longer than without speculation."
)


def pictures(
    rows: Sequence[Row],
    cells: Sequence[Cell],
    varied: Sequence[Cell],
    aside: str,
    points: Sequence[diagnostics.UtilityPoint],
) -> list[Picture]:
    """Return the figures that the rows allow.

    Args:
        rows: The requests, but for those of runs that vary a policy's settings.
        cells: Their speed-ups.
        varied: Speed-ups of the other runs.
        aside: The servers' flags in those runs.
        points: Of utility against speed-up.
    """
    made: list[Picture] = []
    single = [row for row in rows if row.concurrency == 1]
    models = list(dict.fromkeys(row.model for row in rows))
    curves = {m: diagnostics.step_times(r for r in single if r.model == m) for m in models}
    curves = {model: curve for model, curve in curves.items() if len(curve) > 1}
    if curves:
        made.append(
            Picture(
                "step-times",
                "What verifying drafts costs",
                "Time of a step by the drafts it verified, over a step without, same prompts, one "
                "request at a time. Bands: middle half of the requests.",
                lambda narrow: charts.step_times(curves, narrow),
            )
        )
    made += _speedups(cells, varied, aside)
    squared = diagnostics.r_squared(points)
    if squared is not None:
        made.append(
            Picture(
                "utility",
                f"Utility is the speed-up: R² = {squared:.3f} over {len(points)} points",
                "Each point is a policy on a task under one condition: tokens a step over relative "
                "step time, from the engine's log, against what a client measured.",
                lambda narrow: charts.utility(points, narrow),
            )
        )
    tasks = list(dict.fromkeys(row.task for row in single))
    accepted = {
        f"{task}, T = {t:g}": curve
        for t in dict.fromkeys(row.temperature for row in single)
        for task in tasks
        if len(
            curve := diagnostics.acceptance(
                r
                for r in single
                if r.task == task and r.temperature == t and r.policy.startswith("static:")
            )
        )
        > 1
    }
    if accepted:
        made.append(
            Picture(
                "acceptance",
                "How many drafts are accepted",
                "Share of verified draft tokens that were accepted, by their place in the draft, "
                "under static K; all models together.",
                lambda narrow: charts.acceptance(accepted, narrow),
            )
        )
    drawn = _course(single)
    if drawn:
        made.append(
            Picture(
                "course",
                "K along one request",
                f"The same prompt under each policy ({condition_of(drawn[0]).title}). Grey: the "
                "utility that the policy sees (cascade: measured in its window; marginal: expected "
                "of the step).",
                lambda narrow: charts.course(drawn, narrow),
            )
        )
    shares = _k_shares(single)
    if shares:
        made.append(
            Picture(
                "k-shares",
                "Which draft lengths were verified",
                "All steps with one request at a time, all models together. Also a policy that "
                "asks for drafts verifies none where the drafter has none.",
                lambda narrow: charts.k_shares(shares, narrow),
            )
        )
    expected = {
        f"{model}": parts
        for model in models
        if (parts := diagnostics.calibration((r for r in single if r.model == model), "marginal"))
    }
    if expected:
        made.append(
            Picture(
                "foresight",
                "What marginal expects, and what comes",
                "By drafts verified: share of them accepted, and the median error of the step time "
                "that was expected.",
                lambda narrow: charts.foresight(expected, narrow),
            )
        )
    for model in models:
        kept = _crowds([cell for cell in cells if cell.model == model])
        if kept:
            made.append(
                Picture(
                    f"throughput-{model}",
                    f"Requests in flight: {model}",
                    "Tokens a second of all requests together. One in flight: decoding only; "
                    "more: from first request to last token.",
                    lambda narrow, kept=kept: charts.throughput(kept, narrow),  # type: ignore[misc]
                )
            )
    return made


def _speedups(cells: Sequence[Cell], varied: Sequence[Cell], aside: str) -> list[Picture]:
    """Return an overview of the conditions, then each of them, one request at a time."""
    made: list[Picture] = []
    together = {
        f"{c.model}, T = {c.temperature:g}": found
        for c, found in totals(cells).items()
        if c.concurrency == 1
    }
    if len(together) > 1:
        made.append(
            Picture(
                "overview",
                "Speed-up over no speculation, all tasks together",
                INTERVALS,
                lambda narrow: charts.speedups(together, narrow),
            )
        )
    with_flags = f"{INTERVALS} Servers ran with {aside}." if aside else INTERVALS
    for name, title, caption, some in (
        ("speedups", "Speed-up over no speculation", INTERVALS, cells),
        ("settings", "Other settings of policies", with_flags, varied),
    ):
        made += [
            Picture(
                f"{name}-{_slug(condition)}",
                f"{title}: {condition.title}",
                caption,
                lambda narrow, panels=panels: charts.speedups(panels, narrow),  # type: ignore[misc]
            )
            for condition, panels in by_workload(some).items()
            if condition.concurrency == 1
        ]
    return made


def _crowds(cells: Sequence[Cell]) -> list[Cell]:
    """Return one model's cells of all tasks, of the policies that ran at every concurrency."""
    coldest = min((cell.temperature for cell in cells), default=0.0)
    everything = [
        cell for c, found in totals(cells).items() if c.temperature == coldest for cell in found
    ]
    flights = {cell.concurrency for cell in everything}
    if len(flights) < 2:
        return []
    ran = {(cell.policy, cell.concurrency) for cell in everything}
    return [c for c in everything if all((c.policy, flight) in ran for flight in flights)]


def _course(rows: Sequence[Row]) -> list[Row]:
    """Return the same request under the policies that adapt: one on which K moves."""
    adaptive = [
        r
        for r in rows
        if r.series and r.policy not in (BASELINE, PLAIN) and not r.policy.startswith("static:")
    ]
    by_prompt: dict[tuple[str, Condition, str], list[Row]] = {}
    for r in adaptive:
        by_prompt.setdefault((r.run, condition_of(r), r.prompt), []).append(r)

    def telling(mine: list[Row]) -> float:
        return sum(min(len({k for k, *_ in r.series}), 6) for r in mine[:3]) + mine[0].steps / 1000

    chosen = max(by_prompt.values(), key=telling, default=[])
    order = ("cascade", "marginal")
    chosen.sort(key=lambda r: order.index(r.policy) if r.policy in order else len(order))
    return chosen[:3]


def _k_shares(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    shares: dict[str, dict[int, float]] = {}
    for policy in dict.fromkeys(row.policy for row in rows):
        if policy in (BASELINE, PLAIN):
            continue
        mine = [row for row in rows if row.policy == policy]
        steps = sum(row.steps for row in mine)
        if steps:
            counts: dict[int, int] = {}
            for r in mine:
                for at in r.by_k:
                    counts[at.drafted] = counts.get(at.drafted, 0) + at.steps
            shares[policy] = {k: n / steps for k, n in counts.items()}
    return shares


def _slug(condition: Condition) -> str:
    model = "".join(c if c.isalnum() else "-" for c in condition.model)
    return f"{model}-t{condition.temperature:g}".replace(".", "")
