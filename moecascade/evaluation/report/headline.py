"""A report's first table: what a reader asks first, answered, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from moecascade.core import registry
from moecascade.core.peers.dynamic_table import tuned
from moecascade.evaluation.report import diagnostics, paper
from moecascade.evaluation.report.diagnostics import HINDSIGHT
from moecascade.evaluation.report.speedups import Cell, summarise, totals
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row
from moecascade.evaluation.workloads import workloads

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
    rows: Sequence[Row],
    main: Sequence[Row],
    cells: Sequence[Cell],
    varied: Sequence[Cell],
    points: Sequence[diagnostics.UtilityPoint],
    seen: Sequence[diagnostics.UtilityPoint] = (),
) -> list[Finding]:
    """Return what these rows can answer.

    Args:
        rows: The requests;
        main: of them, those of runs that do not vary a policy's settings.
        cells: Their speed-ups.
        varied: Speed-ups of the other runs.
        points: Of utility against speed-up.
        seen: Of utility as `marginal` expected it, likewise.
    """
    return [
        *_worst(main, cells),
        *_crowds(main),
        *_advantage(main),
        *_tables(main),
        *_apart(varied),
        *_ablations(rows, varied),
        *_utility(points),
        *_foreseen(seen),
        *_step_times(main),
        *_presence(main),
        *_deciding(main),
    ]


@dataclass(frozen=True, slots=True)
class _Place:
    """A policy on a workload, and where."""

    speedup: float
    low: float | None
    high: float | None
    policy: str
    where: str

    def said(self, named: bool) -> str:
        """Return it in words, with the policy's name or without."""
        name = f"{self.policy}, " if named else ""
        within = "too few prompts for an interval"
        if self.low is not None and self.high is not None:
            within = f"{pace(self.high)} to {pace(self.low)}"
        return f"{pace(self.speedup)} ({name}{self.where}; {within})"


def _worst(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Finding]:
    """Return the worst workload of a model, as the paper has it, and at a single temperature."""
    made = []
    for kind, beside in {"cascade": "cascade", "marginal": "", "static:": "static"}.items():
        several = kind not in ADAPTIVE
        together = [place for place in _of_models(rows) if _is(place.policy, kind)]
        single = [place for place in _of_conditions(cells) if _is(place.policy, kind)]
        if not together or not single:
            continue
        said = _lowest(together, several)
        if len({cell.temperature for cell in cells}) > 1:
            said += f"; at one temperature: {_lowest(single, several)}"
        what = f"{'a static K' if several else kind}: worst workload against no speculation"
        made.append(Finding(what, said, paper.WORST.get(beside, "")))
    return made


def _is(policy: str, kind: str) -> bool:
    return policy == kind if kind in ADAPTIVE else policy.startswith(kind)


def _of_models(rows: Sequence[Row]) -> list[_Place]:
    """Return every policy on every workload of a model, its temperatures together."""
    made = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model and row.concurrency == 1]
        made_of = workloads(list(dict.fromkeys(row.task for row in mine)))
        for policy in dict.fromkeys(row.policy for row in mine):
            for workload, tasks in made_of.items():
                of_it = [row for row in mine if row.task in tasks]
                if found := diagnostics.ratio(of_it, policy, BASELINE):
                    where = f"{workload}, {model}"
                    made.append(_Place(found.value, found.low, found.high, policy, where))
    return made


def _of_conditions(cells: Sequence[Cell]) -> list[_Place]:
    """Return every policy on every workload under every condition, one request at a time."""
    return [
        _Place(c.speedup, c.low, c.high, c.policy, f"{c.workload}, {c.condition.title}")
        for c in cells
        if c.concurrency == 1 and c.speedup is not None
    ]


def _lowest(places: Sequence[_Place], named: bool) -> str:
    """Return the lowest speed-up; where it has no interval, the lowest of those with one too."""
    shown = [min(places, key=lambda place: place.speedup)]
    judged = [place for place in places if place.low is not None]
    if shown[0].low is None and judged:
        shown.append(min(judged, key=lambda place: place.speedup))
    return "; with an interval: ".join(place.said(named) for place in shown)


def pace(speedup: float) -> str:
    """Return a speed-up in words: slower by so much more time, as in the paper, or faster."""
    if abs(speedup - 1) < 0.0005:
        return "no slower"
    return f"{1 / speedup - 1:.1%} slower" if speedup < 1 else f"{speedup - 1:.1%} faster"


def _crowds(rows: Sequence[Row]) -> list[Finding]:
    """Return what several requests in flight gain, over none and over the best table of K."""
    made = []
    by_flight = {
        n: [row for row in rows if row.concurrency == n]
        for n in sorted({row.concurrency for row in rows})
        if n > 1
    }
    for n, here in by_flight.items():
        if len({row.policy for row in here if row.policy.startswith("static:")}) > 1:
            by_flight[n] = [*here, *diagnostics.with_hindsight(here)]
    for policy in ADAPTIVE:
        for other, name in ((BASELINE, "no speculation"), (HINDSIGHT, "the best table of K")):
            parts = [
                f"{n} at once: {change(found)}"
                for n, here in by_flight.items()
                if (found := diagnostics.ratio(here, policy, other))
            ]
            if parts:
                made.append(Finding(f"{policy}: throughput against {name}", "; ".join(parts)))
    return made


def _within(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return " (too few prompts for an interval)"
    return f" ({cell.low - 1:+z.1%} to {cell.high - 1:+z.1%})"


def _advantage(rows: Sequence[Row]) -> list[Finding]:
    """Return how the policies compare, one request at a time."""
    made: list[Finding] = []
    rows = [row for row in rows if row.concurrency == 1]
    if not rows:
        return made
    best = diagnostics.with_hindsight(rows)
    for policy in ADAPTIVE:
        if found := diagnostics.ratio([*rows, *best], policy, HINDSIGHT):
            beside = paper.BEST_STATIC if policy == "cascade" else ""
            what = f"{policy} over the best static K of each model, in hindsight"
            made.append(Finding(what, change(found), beside))
    made += _each_static(rows)
    if found := diagnostics.ratio(rows, "marginal", "cascade"):
        made.append(Finding("marginal over cascade", change(found)))
    peers = {peer.name: diagnostics.ratio(rows, "marginal", peer.name) for peer in registry.PEERS}
    ran = {name: found for name, found in peers.items() if found}
    if ran:
        fastest = min(ran, key=lambda name: ran[name].value)
        level = [name for name, found in ran.items() if (found.low or 0) <= ran[fastest].value]
        several = f", one of {len(level)} that are level" if len(level) > 1 else ""
        what = f"marginal over {fastest}, the fastest of what others use{several}"
        made.append(Finding(what, change(ran[fastest])))
    return made


def _each_static(rows: Sequence[Row]) -> list[Finding]:
    """Return what `cascade` gains over each fixed K."""
    specs = sorted({row.policy for row in rows if row.policy.startswith("static:")})
    parts = [
        f"K = {spec.removeprefix('static:')}: {change(found, short=True)}"
        for spec in specs
        if (found := diagnostics.ratio(rows, "cascade", spec))
    ]
    said = "; ".join(parts)
    return [Finding("cascade over each static K", said, paper.MEAN)] if len(parts) > 1 else []


def _tables(rows: Sequence[Row]) -> list[Finding]:
    """Return the tables of K by batch size that would have been best, as for vLLM's Dynamic SD.

    Batch sizes at which there was a choice, that is.
    """
    measured: dict[tuple[str, float], dict[tuple[int, int], float]] = {}
    for condition, of in totals(summarise(diagnostics.of_static(rows))).items():
        speedups = {
            (condition.concurrency, int(cell.policy.removeprefix("static:"))): cell.speedup
            for cell in of
            if cell.policy.startswith("static:") and cell.speedup is not None
        }
        if len(speedups) > 1:
            speedups[condition.concurrency, 0] = 1.0  # a table may say that nothing be drafted
            measured.setdefault((condition.model, condition.temperature), {}).update(speedups)
    said = []
    for (model, temperature), speedups in measured.items():
        ks = ", ".join(
            f"K = {k}" if first == 1 else f"from {first} at once {k}"
            for first, _, k in tuned(speedups)
        )
        said.append(f"{model}, T = {temperature:g}: {ks}")
    what = "the best table of K by batch size, in hindsight"
    return [Finding(what, "; ".join(said))] if said else []


def _apart(varied: Sequence[Cell]) -> list[Finding]:
    """Return what the policies themselves gain where their settings are varied."""
    return [
        Finding(
            f"{condition.title}, in the run that varies settings: all tasks, against no "
            "speculation",
            "; ".join(
                f"{cell.policy} {cell.speedup - 1:+z.1%}{_within(cell)}, worst workload "
                f"{_worst_of(varied, cell.policy)}"
                for cell in cells
                if cell.speedup is not None and "[" not in cell.policy and cell.policy != BASELINE
            ),
        )
        for condition, cells in totals(varied).items()
    ]


def _ablations(rows: Sequence[Row], varied: Sequence[Cell]) -> list[Finding]:
    """Return what cascade gains over itself with other settings."""
    specs = dict.fromkeys(row.policy for row in rows if row.policy.startswith("cascade["))
    made = []
    for spec in specs:
        if found := diagnostics.ratio(rows, "cascade", spec):
            runs = {row.run for row in rows if row.policy == spec}
            here = [row for row in rows if row.run in runs]
            shares = f"K = 0 in {_idle(here, 'cascade')} of steps against {_idle(here, spec)}"
            worst = [_worst_of(varied, policy) for policy in ("cascade", spec)]
            said = f"{change(found)}; {shares}; worst workload {worst[0]} against {worst[1]}"
            what = f"cascade over cascade {without(spec)}"
            made.append(Finding(what, said, paper.WORST.get(spec, "")))
    return made


def without(spec: str) -> str:
    """Return in words what the settings in a spec of `cascade` change, with the spec."""
    words = {
        "backoff=1": "without back-off",
        "max_trials=1": "without hill-climbing",
    }
    inside = spec.partition("[")[2].removesuffix("]")
    said = words.get(inside)
    if said is None:
        return f"with {inside.replace('=', ' = ').replace(',', ', ')}"
    return f"{said} ({inside.replace('=', ' = ')})"


def _worst_of(cells: Sequence[Cell], policy: str) -> str:
    """Return a policy's lowest speed-up in words."""
    found = [
        cell.speedup
        for cell in cells
        if cell.policy == policy and cell.concurrency == 1 and cell.speedup is not None
    ]
    return pace(min(found)) if found else "not measured"


def _idle(rows: Sequence[Row], policy: str) -> str:
    """Return the share of a policy's steps that it ran at K = 0."""
    mine = [row for row in rows if row.policy == policy]
    return f"{sum(row.steps_at_0 for row in mine) / max(1, sum(row.steps for row in mine)):.0%}"


def _utility(points: Sequence[diagnostics.UtilityPoint]) -> list[Finding]:
    squared = diagnostics.r_squared(points)
    if squared is None:
        return []
    ours = f"{squared:.3f} over {len(points)} points"
    return [Finding("utility against measured speed-up, R²", ours, paper.UTILITY)]


def _foreseen(points: Sequence[diagnostics.UtilityPoint]) -> list[Finding]:
    """Return how far the utility that a policy acted on is from the speed-up that came."""
    if not points:
        return []
    error = median(abs(point.utility / point.speedup - 1) for point in points)
    what = f"{points[0].policy}: utility as it expected it, against measured speed-up"
    return [Finding(what, f"median error {error:.1%} over {len(points)} tasks and conditions")]


def _step_times(rows: Sequence[Row]) -> list[Finding]:
    made = []
    for model in dict.fromkeys(row.model for row in rows):
        curve = diagnostics.step_times(row for row in rows if row.model == model)
        if len(curve) > 1:
            shown = [at for at in curve if at.k == paper.STEP_AT or at is curve[-1]]
            drafts = " and ".join(str(at.k) for at in shown)
            what = f"{model}: time of a step that verifies {drafts} drafts"
            ours = " and ".join(f"{at.cost:.2f}x" for at in shown)
            made.append(Finding(what, ours, paper.STEP_TIME))
    return made


def _presence(rows: Sequence[Row]) -> list[Finding]:
    runs = {row.run for row in rows if row.policy == PLAIN}
    rows = [row for row in rows if row.concurrency == 1 and row.run in runs]
    found = diagnostics.presence(rows)
    if found is None:
        return []
    made = [Finding("speed of our engine at K = 0 against vLLM without us", change(found))]
    mine = [row for row in rows if row.policy == BASELINE and row.step_seconds]
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


def change(found: diagnostics.Ratio, *, short: bool = False) -> str:
    """Return a ratio as a change with its interval, and whether it can be told from none.

    In `short` without how many pairs of prompts it rests on.
    """
    text = f"{found.value - 1:+z.1%}"
    if found.low is None or found.high is None:
        return f"{text} (too few prompts for an interval)"
    telling = "" if found.low > 1 or found.high < 1 else "within the noise"
    behind = "" if short else f"{found.pairs} pairs of {found.prompts} prompts"
    about = "; ".join(filter(None, (behind, telling)))
    comma = ", " if behind else "; " if telling else ""
    return f"{text} ({found.low - 1:+z.1%} to {found.high - 1:+z.1%}{comma}{about})"
