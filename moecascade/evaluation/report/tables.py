"""The report's tables, and the one way in which tables and numbers are written.

`Table` holds text; a terminal, Markdown and the page (its template) each draw it in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING

from moecascade.evaluation.report.analysis import Analysis
from moecascade.evaluation.report.diagnostics import Calibration
from moecascade.evaluation.report.headline import Form, Number
from moecascade.evaluation.report.roles import OURS
from moecascade.evaluation.report.speedups import (
    Cell,
    Comparison,
    Speedups,
    Standing,
    by_workload,
    fastest,
    totals,
)
from moecascade.evaluation.report.statistics import Speedup
from moecascade.evaluation.request_record import BASELINE
from moecascade.evaluation.workloads import ALL

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Write = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A number in a table.

    Attributes:
        text: The number, "" for none.
        interval: "low - high", or with a "to" where numbers have signs or words; "" for none.
        verdict: "faster" or "slower", "" where it cannot be told.
        best: Whether it is beyond doubt the best of its column.
    """

    text: str = ""
    interval: str = ""
    verdict: str = ""
    best: bool = False

    def __str__(self) -> str:
        """Return both in a line."""
        return f"{self.text} ({self.interval})" if self.interval else self.text


@dataclass(frozen=True, slots=True)
class Table:
    """Names down, numbers across.

    Attributes:
        title: What it is of.
        head: The columns' heads, the names' first.
        lines: Each a line's names and numbers.
        note: What else a reader must know.
        names: How many columns hold names.
    """

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[Entry, ...], ...]
    note: str = ""
    names: int = 1


def factor(value: float) -> str:
    """Return a speed-up as a factor."""
    return f"{value:.2f}"


def change(value: float) -> str:
    """Return a speed-up as a change of speed."""
    return f"{value - 1:+z.1%}"


def pace(value: float) -> str:
    """Return a speed-up as a delay: slower by so much more time, as in the paper, or faster."""
    if abs(value - 1) < 0.0005:
        return "no slower"
    return f"{1 / value - 1:.1%} slower" if value < 1 else f"{value - 1:.1%} faster"


WRITE: Mapping[Form, Write] = {
    "change": change,
    "pace": pace,
    "times": lambda value: f"{value:.2f}x",
    "share": lambda value: f"{value:.1%}",
    "number": lambda value: f"{value:.3f}",
}


def entry(found: Speedup | None, write: Write = factor, best: bool = False) -> Entry:
    """Return a speed-up with its interval."""
    if found is None:
        return Entry()
    return Entry(write(found.value), _interval(found.low, found.high, write), found.verdict, best)


def _interval(low: float | None, high: float | None, write: Write) -> str:
    if low is None or high is None:
        return ""
    return f"{write(low)} {'-' if write is factor else 'to'} {write(high)}"


def _number(value: float | None, form: str, times: float = 1) -> Entry:
    return Entry() if value is None else Entry(form.format(times * value))


# ---- which tables there are ----------------------------------------------------------------------


def first(numbers: Iterable[Number]) -> Table:
    """Return the headline as a table."""
    lines = []
    for number in numbers:
        write = WRITE[number.form]
        ends = (number.high, number.low) if number.form == "pace" else (number.low, number.high)
        told = number.low is None or number.low > 1 or (number.high or 0) < 1
        behind = number.behind if told else f"{number.behind}; within the noise"
        this = Entry(write(number.value), _interval(*ends, write))
        lines.append((Entry(number.what), this, Entry(behind), Entry(number.paper)))
    return Table("In short", ("", "this run", "of", "the paper"), tuple(lines), names=4)


def tables(analysis: Analysis, flags: str = "") -> list[Table]:
    """Return every policy on every workload by condition; before them all of these together.

    Args:
        analysis: The numbers.
        flags: What the servers ran with where settings of policies were varied.
    """
    made = []
    alone = {c: of for c, of in by_workload(analysis.main.cells).items() if c.concurrency == 1}
    if len(alone) > 1:
        made.append(overview(analysis.main))
    made += [_speedups(condition.title, across) for condition, across in alone.items()]
    made += filter(None, [crowds(analysis)])
    note = f"Servers ran with {flags}" if flags else ""
    for condition, across in by_workload(analysis.varied.cells).items():
        made.append(_speedups(f"Other settings: {condition.title}", across, note=note))
    return made


def overview(speedups: Speedups) -> Table:
    """Return all tasks together, one request at a time, conditions across."""
    across = {c.head: of for c, of in totals(speedups.cells).items() if c.concurrency == 1}
    return _speedups("All tasks together", across, spread=False)


def _speedups(
    title: str, across: Mapping[str, Sequence[Cell]], *, note: str = "", spread: bool = True
) -> Table:
    """Return policies down, workloads or conditions across; `spread`: and the worst of them.

    Pairs are those of the last column, all tasks together, or of all conditions.
    """
    columns = [{cell.policy: cell.speedup for cell in cells} for cells in across.values()]
    best = [fastest(cells) for cells in across.values()]
    lines = []
    for policy in dict.fromkeys(policy for column in columns for policy in column):
        found = [column.get(policy) for column in columns]
        known = [of.value for of in found if of is not None]
        shown = [
            Entry(factor(of.value))
            if policy == BASELINE and of is not None
            else entry(of, best=policy == winner)
            for of, winner in zip(found, best, strict=True)
        ]
        if spread:
            worst, mean = (min(known), geometric_mean(known)) if known else (None, None)
            shown += [_number(worst, "{:.2f}"), _number(mean, "{:.2f}")]
        pairs = sum(of.pairs for of in (found[-1:] if spread else found) if of is not None)
        lines.append((Entry(policy), *shown, Entry(str(pairs))))
    more = ("worst", "mean") if spread else ()
    return Table(title, ("policy", *across, *more, "pairs"), tuple(lines), note)


def crowds(analysis: Analysis) -> Table | None:
    """Return all tasks together by requests in flight, where several were."""
    across = totals(analysis.main.cells)
    crowded = {(c.model, c.temperature) for c in across if c.concurrency > 1}
    across = {c: cells for c, cells in across.items() if (c.model, c.temperature) in crowded}
    shown = {
        c.head if len(crowded) > 1 else f"{c.concurrency} at once": cells
        for c, cells in across.items()
    }
    title = "Several requests at once, all tasks together"
    return _speedups(title, shown, spread=False) if shown else None


def compared(speedups: Speedups, title: str) -> Table | None:
    """Return ours over every other policy: all that both ran, by requests in flight."""
    found = [c for c in speedups.comparisons if c.policy in OURS]
    if not found:
        return None
    columns = list(dict.fromkeys((c.policy, c.concurrency) for c in found))
    known: dict[tuple[str, str, int], Comparison] = {
        (c.over, c.policy, c.concurrency): c for c in found
    }
    lines = []
    for over in dict.fromkeys(c.over for c in found):
        mine = [known.get((over, *column)) for column in columns]
        lines.append((Entry(over), *(entry(c.speedup if c else None, change) for c in mine)))
    head = [policy if n == 1 else f"{policy}, {n} at once" for policy, n in columns]
    return Table(title, ("faster than", *head), tuple(lines))


def foresight(policy: str, found: Sequence[Calibration]) -> Table:
    """Return what a policy expected of its steps and what came."""
    lines = tuple(
        (
            Entry(str(at.k)),
            Entry(str(at.steps)),
            _number(at.expected, "{:.0%}"),
            _number(at.accepted, "{:.0%}"),
            Entry(f"{at.time_error:.0%}"),
        )
        for at in found
    )
    head = ("drafts verified", "steps", "accepted, expected", "accepted", "step time, median error")
    return Table(f"What {policy} expects, and what comes", head, lines)


def live(found: Sequence[Standing], title: str) -> Table:
    """Return how policies stand while a run goes on, policies down and tasks across."""
    across = tuple(found[0].by_task) if found else ()
    lines = [
        (
            Entry(of.policy),
            *(_number(of.by_task[task], "{:.2f}") for task in across),
            _number(of.speedup, "{:.2f}"),
            _number(of.tokens_per_second, "{:.1f}"),
        )
        for of in found
    ]
    return Table(title, ("policy", *across, "all tasks", "tok/s"), tuple(lines))


def tasks(cells: Iterable[Cell], title: str, note: str = "") -> Table:
    """Return one condition's tasks, policies below each: for a terminal."""
    lines: list[tuple[Entry, ...]] = []
    across: dict[str, list[Cell]] = {}
    for cell in cells:
        across.setdefault(cell.workload, []).append(cell)
    for workload, mine in across.items():
        best = fastest(mine)
        for i, cell in enumerate(mine):
            shown = entry(cell.speedup, best=cell.policy == best)
            if cell.policy == BASELINE:
                shown = Entry(shown.text)
            lines.append(
                (
                    Entry("" if i else "all tasks" if workload == ALL else workload),
                    Entry(cell.policy),
                    _number(cell.tokens_per_second, "{:.1f}"),
                    shown,
                    _number(min(cell.speedup.each) if cell.speedup else None, "{:.2f}"),
                    _number(cell.etr, "{:.2f}"),
                    _number(cell.mean_k, "{:.2f}"),
                    _number(cell.off_share, "{:.0%}"),
                )
            )
    head = ("task", "policy", "tok/s", "speed-up (95%)", "worst", "ETR", "mean K", "K = 0")
    return Table(title, head, tuple(lines), note, names=2)


# ---- how they are drawn --------------------------------------------------------------------------


def markdown(table: Table) -> list[str]:
    """Return a table's lines in Markdown."""
    return [
        "| " + " | ".join(table.head) + " |",
        "|" + " --- |" * table.names + " ---: |" * (len(table.head) - table.names),
        *(
            "| " + " | ".join(_markdown(e, i, table) for i, e in enumerate(line)) + " |"
            for line in table.lines
        ),
    ]


def _markdown(shown: Entry, column: int, table: Table) -> str:
    if table.head[column] in ("policy", "faster than"):
        return f"`{shown.text}`"
    return f"**{shown.text}**{str(shown)[len(shown.text) :]}" if shown.best else str(shown)


def terminal(table: Table) -> RichTable:
    """Return a table for `rich` to print: names are never cut, numbers stand in columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(
        title=table.title,
        caption=table.note,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    widths = []
    for i, name in enumerate(table.head):
        named = i < table.names
        shown.add_column(name, justify="left" if named else "right", no_wrap=named, overflow="fold")
        widths.append(max((len(line[i].interval) for line in table.lines), default=0))
    for at, line in enumerate(table.lines):
        if at and table.names > 1 and line[0].text:
            shown.add_section()
        style = "bold" if any(entry.best for entry in line) else None
        shown.add_row(*map(escape, map(_aligned, line, widths)), style=style)
    return shown


def _aligned(shown: Entry, width: int) -> str:
    """Return an entry so that its number stands right above those with an interval."""
    within = f"({shown.interval})" if shown.interval else ""
    return f"{shown.text} {within:{width + 2}}" if width else shown.text
