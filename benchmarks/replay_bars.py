"""What `marginal` has to reach in replay, on any traces: each bar, and whether it holds.

    moecascade record PROMPTS... --out greedy.jsonl
    moecascade record PROMPTS... --temperature 0.8 --out sampled.jsonl
    python benchmarks/replay_bars.py --greedy greedy.jsonl --sampled sampled.jsonl

Takes a minute for some three hundred requests on two cores. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from moecascade import policies
from moecascade.replay import player
from moecascade.replay.player import MIXTRAL_LIKE, Oracle, ReplayConditions, ReplaySummary
from moecascade.telemetry import traces
from moecascade.telemetry.traces import Trace

STATIC = tuple(f"static:{k}" for k in (1, 2, 3, 5, 8))
ALL = (*STATIC, "cascade", "marginal", Oracle.name)
STEEPER = tuple(1 + 1.5 * (cost - 1) for cost in MIXTRAL_LIKE)
TWICE = tuple(1 + 2 * (cost - 1) for cost in MIXTRAL_LIKE)
DENSE = tuple(1 + 0.005 * k for k in range(len(MIXTRAL_LIKE)))
CURVES = {"Mixtral-like": tuple(MIXTRAL_LIKE), "1.5 times as steep": STEEPER, "dense": DENSE}
NOISE = 0.05
ADVANTAGE = {"greedy": 1.08, "sampled": 1.04}
CLOSED = {"greedy": 0.25, "sampled": 0.15}


@dataclass(frozen=True)
class Task:
    """One replay: a policy on a set of traces under a curve."""

    name: str
    curve: str
    policy: str
    seed: int


@dataclass(frozen=True)
class Bar:
    """A bar, as a person reads it."""

    name: str
    where: str
    wanted: str
    found: str
    held: bool


SETS: dict[str, list[Trace]] = {}  # of each process


def read(paths: dict[str, list[Path]]) -> None:
    """Read the traces, once a process."""
    SETS.update({name: list(traces.read(files)) for name, files in paths.items() if files})


def played(task: Task) -> tuple[Task, ReplaySummary]:
    """Replay one task."""
    conditions = ReplayConditions(CURVES[task.curve], NOISE, task.seed)
    return task, player.summarise(player.play(SETS[task.name], task.policy, conditions))


def garbled(trace: Trace, seed: int) -> Trace:
    """Return a trace with about half of its output's tokens replaced: drafts are wrong."""
    rng = random.Random(seed)
    output = [rng.randrange(10**6) if rng.random() < 0.5 else token for token in trace.output]
    return replace(trace, output=tuple(output))


def changed(job: tuple[str, str, int]) -> tuple[tuple[str, str, int], float]:
    """Return how a policy fares after an abrupt change, over one that begins there."""
    name, what, seed = job
    whole = SETS[name]
    order = random.Random(seed).sample(range(len(whole)), len(whole))
    first = [whole[i] for i in order[: len(order) // 2]]
    rest = [whole[i] for i in order[len(order) // 2 :]]
    if what == "acceptance collapses":
        rest = [garbled(trace, i) for i, trace in enumerate(rest)]
    costs = TWICE if what == "costs double" else MIXTRAL_LIKE
    served = policies.create("marginal", len(costs) - 1)
    player.play(first, served, ReplayConditions(MIXTRAL_LIKE, NOISE, seed))
    after = ReplayConditions(costs, NOISE, seed + 1)
    speeds = [
        player.summarise(player.play(rest, policy, after)).speedup
        for policy in (served, "marginal")
    ]
    return job, speeds[0] / speeds[1]


def bars(
    found: dict[Task, ReplaySummary], after: dict[tuple[str, str, int], float]
) -> Iterator[Bar]:
    """Yield the bars of the traces that there are."""

    def mean(name: str, curve: str, policy: str) -> float:
        return fmean(
            row.speedup
            for task, row in found.items()
            if (task.name, task.curve, task.policy) == (name, curve, policy)
        )

    for name in dict.fromkeys(task.name for task in found):
        curve = "Mixtral-like"
        cascade, marginal, oracle = (
            mean(name, curve, p) for p in ("cascade", "marginal", Oracle.name)
        )
        over, wanted = marginal / cascade, ADVANTAGE[name]
        yield Bar(
            "over cascade",
            f"{name}, {curve}",
            f"{wanted - 1:+.0%}",
            f"{over - 1:+.1%}",
            over >= wanted,
        )
        closed = (marginal - cascade) / (oracle - cascade)
        yield Bar(
            "of the gap to the oracle",
            f"{name}, {curve}",
            f"{CLOSED[name]:.0%}",
            f"{closed:.0%}",
            closed >= CLOSED[name],
        )
        for curve in ("Mixtral-like", "1.5 times as steep"):
            mine = [
                row
                for task, row in found.items()
                if (task.name, task.curve, task.policy) == (name, curve, "marginal")
            ]
            lowest = min(speed for row in mine for speed in row.by_task.values())
            worst = min(row.worst_request for row in mine)
            where = f"{name}, {curve}"
            yield Bar("lowest task", where, "0.995", f"{lowest:.3f}", lowest >= 0.995)
            yield Bar("worst long request", where, "0.95", f"{worst:.3f}", worst >= 0.95)
        best = max(mean(name, "dense", policy) for policy in STATIC)
        level = mean(name, "dense", "marginal") / best
        yield Bar(
            "over the best static K", f"{name}, dense", "-1%", f"{level - 1:+.1%}", level >= 0.99
        )
        for what in ("costs double", "acceptance collapses"):
            kept = fmean(value for (n, w, _), value in after.items() if (n, w) == (name, what))
            yield Bar(
                f"after {what}, over a fresh start", name, "-2%", f"{kept - 1:+.1%}", kept >= 0.98
            )


def main() -> None:
    """Replay, print, and say by the exit code whether all bars hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ADVANTAGE:
        parser.add_argument(f"--{name}", nargs="+", type=Path, default=[], metavar="TRACES")
    parser.add_argument("--seeds", type=int, default=2, help="order and noise, each drawn anew")
    asked = parser.parse_args()
    paths = {name: getattr(asked, name) for name in ADVANTAGE if getattr(asked, name)}
    if not paths:
        parser.error("give traces: --greedy FILES, --sampled FILES, or both")
    tasks = [
        Task(name, curve, policy, seed)
        for name in paths
        for curve in CURVES
        for policy in ALL
        for seed in range(asked.seeds)
        if policy in ("marginal", *STATIC) or curve != "dense"
    ]
    jobs = [
        (name, what, seed)
        for name in paths
        for what in ("costs double", "acceptance collapses")
        for seed in range(asked.seeds)
    ]
    with (
        ProcessPoolExecutor(initializer=read, initargs=(paths,)) as pool,
        Progress(console=Console(stderr=True), transient=True) as shown,
    ):
        bar = shown.add_task("replaying", total=len(tasks) + len(jobs))
        found, after = {}, {}
        for task, row in pool.map(played, tasks):
            found[task] = row
            shown.advance(bar)
        for job, value in pool.map(changed, jobs):
            after[job] = value
            shown.advance(bar)
    console = Console()
    for name in paths:
        console.print(speeds(name, found))
    made = list(bars(found, after))
    heads = ("bar", "traces, curve", "wanted", "found", "")
    columns = [Column(head, overflow="fold") for head in heads]
    table = Table(*columns, title="marginal in replay")
    for one in made:
        mark = "[green]holds[/green]" if one.held else "[bold red]missed[/bold red]"
        table.add_row(one.name, one.where, one.wanted, one.found, mark)
    console.print(table)
    sys.exit(0 if all(one.held for one in made) else 1)


def speeds(name: str, found: dict[Task, ReplaySummary]) -> Table:
    """Return a table of speed-ups, in brackets the worst request of a hundred tokens or more."""
    curves = list(dict.fromkeys(task.curve for task in found if task.name == name))
    columns = [Column(head, overflow="fold") for head in ("policy", *curves)]
    table = Table(*columns, title=name)
    for policy in ALL:
        shown: list[str] = []
        for curve in curves:
            rows: Sequence[ReplaySummary] = [
                row
                for task, row in found.items()
                if (task.name, task.curve, task.policy) == (name, curve, policy)
            ]
            worst = min((row.worst_request for row in rows), default=0.0)
            shown.append(f"{fmean(r.speedup for r in rows):.2f} ({worst:.2f})" if rows else "")
        table.add_row(policy, *shown)
    return table


if __name__ == "__main__":
    main()
