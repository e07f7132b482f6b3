"""`moecascade report`: one page from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moecascade.evaluation import session
from moecascade.evaluation.report import page as reporting


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Results files, or folders that hold some."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where it goes; by default beside the first results."),
    ] = None,
) -> None:
    """Make a report of what `bench` or `demo` has measured.

    Writes report.html, one file to open or forward that fetches nothing; report.md, for pull
    requests; and the figures as PNG. Results of several runs become one report.

    For example:

        moecascade report results/bench
        moecascade report results/bench results/dense --out results/report
    """
    found = reporting.load(sources)
    if out is None:
        out = sources[0] if sources[0].is_dir() else sources[0].parent
    session.make_folder(out)
    screen = Console(stderr=True)
    with screen.status("drawing") as status:
        written = reporting.write(
            reporting.build(found), out, lambda what: status.update(f"drawing: {what}")
        )
    print(f"Wrote {written[0]}, {written[1].name} and {len(written) - 2} figures.")
