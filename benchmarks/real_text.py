"""Speed-up and worst answer of each policy on recorded answers: the figure of README.

    python benchmarks/real_text.py TRACES... [--figure docs/images/real-text.png]
    python benchmarks/real_text.py TRACES... --late [--filled]

Replays n-gram drafts under a Mixtral-like cost curve with 5% noise, one request at a time: a
minute for a thousand answers on two cores. `--late` decides as asynchronous scheduling makes
policies decide: a step early, drafts unseen; `--filled` pays for what was not found as well. Each
file is a source of its own; texts of real models are not part of the repository
(docs/experiments.md says where ours came from).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from moecascade.replay import player
from moecascade.telemetry import traces

POLICIES = ("static:1", "static:3", "static:8", "cascade", "marginal", "oracle")
NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Fared:
    """How a policy fared on a source: over no speculation, all together and the worst answer."""

    speedup: float
    worst: float


def fared(job: tuple[Path, str, int, player.ReplayConditions]) -> Fared:
    """Replay one policy on one file with as many seeds as asked."""
    path, policy, seeds, conditions = job
    requests = list(traces.read([path]))
    found = [
        player.summarise(player.play(requests, policy, replace(conditions, seed=seed)))
        for seed in range(seeds)
    ]
    return Fared(fmean(one.speedup for one in found), min(one.worst_request for one in found))


def table(found: dict[tuple[Path, str], Fared], paths: Sequence[Path]) -> Table:
    """Return the figure as numbers."""
    columns = [Column(path.stem, justify="right") for path in paths]
    shown = Table(Column("policy", no_wrap=True), *columns)
    for policy in POLICIES:
        cells = [found[path, policy] for path in paths]
        shown.add_row(policy, *(f"{cell.speedup:.2f} ({cell.worst:.2f})" for cell in cells))
    shown.caption = (
        "Speed-up over no speculation; in brackets the worst answer of 100 tokens or more."
    )
    return shown


def draw(found: dict[tuple[Path, str], Fared], paths: Sequence[Path], out: Path) -> None:
    """Draw two dots for each policy and source: the mean, and the worst answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.55 + 0.36 * len(POLICIES)), layout="constrained")
    panels = figure.subplots(1, len(paths), sharex=True, sharey=True, squeeze=False)[0]
    for panel, path in zip(panels, paths, strict=True):
        panel.axvline(1.0, color="0.6", linewidth=1)
        for place, policy in enumerate(reversed(POLICIES)):
            at, ours = found[path, policy], policy == "marginal"
            color = "#c1440e" if ours else "0.55" if policy == "oracle" else "#2b5c8a"
            panel.plot([at.worst, at.speedup], [place] * 2, color=color, linewidth=1.5, alpha=0.5)
            panel.plot(at.worst, place, "o", color=color, markerfacecolor="white", markersize=6)
            panel.plot(at.speedup, place, "o", color=color, markersize=7)
        panel.set_title(path.stem, fontsize=9)
        panel.set_yticks(range(len(POLICIES)), reversed(POLICIES), fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    figure.supxlabel("speed-up over no speculation   (● all answers, ○ worst answer)", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160)


def main() -> None:
    """Replay, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path, help="files as 'moecascade record' writes")
    parser.add_argument("--figure", type=Path, help="draw it there (PNG or SVG)")
    parser.add_argument("--seeds", type=int, default=1, help="orders and noises, averaged")
    parser.add_argument("--late", action="store_true", help="decide a step early, drafts unseen")
    parser.add_argument("--filled", action="store_true", help="pay for what was not found as well")
    parser.add_argument("--ngram-min", type=int, default=2, help="least length of a match")
    asked = parser.parse_args()
    conditions = player.ReplayConditions(
        player.MIXTRAL_LIKE,
        NOISE,
        ngram_min=asked.ngram_min,
        late=asked.late,
        filled=asked.filled,
    )
    jobs = [(path, policy, asked.seeds, conditions) for path in asked.traces for policy in POLICIES]
    console = Console(stderr=True)
    with ProcessPoolExecutor() as pool, Progress(console=console, transient=True) as shown:
        results = shown.track(pool.map(fared, jobs), total=len(jobs), description="replaying")
        found = {job[:2]: one for job, one in zip(jobs, results, strict=True)}
    Console().print(table(found, asked.traces))
    if asked.figure:
        draw(found, asked.traces, asked.figure)


if __name__ == "__main__":
    main()
