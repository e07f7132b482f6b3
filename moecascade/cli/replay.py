"""`moecascade replay`: policies on recorded requests, thousands a minute, without an engine."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moecascade.core import registry
from moecascade.core.spec import split
from moecascade.errors import ConfigError
from moecascade.replay import player as replaying
from moecascade.telemetry import traces as recorded

COSTS = ",".join(f"{time:g}" for time in replaying.MIXTRAL_LIKE)
NOTES = (
    "Speed-up over no speculation, time in baseline steps; worst and 5th percentile: of single "
    f"requests of {replaying.LONG} tokens or more; K: drafts verified a step; off: steps without."
)


def replay(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files: JSON Lines, one request a line.")
    ],
    policies: Annotated[
        str, typer.Option(metavar="SPECS", help="Policies to compare; 'oracle' knows each match.")
    ] = "off,static:1,static:3,static:8,cascade,marginal,oracle",
    drafter: Annotated[str, typer.Option(help="Only 'ngram' so far.")] = "ngram",
    ngram_min: Annotated[int, typer.Option(metavar="N", help="Least length of a match.")] = 2,
    ngram_max: Annotated[int, typer.Option(metavar="N", help="Greatest length of a match.")] = 4,
    max_k: Annotated[int, typer.Option(metavar="K", help="Longest draft.")] = 8,
    cost: Annotated[
        str, typer.Option(metavar="TIMES", help="Step time over the baseline, at K = 0, 1, ...")
    ] = COSTS,
    noise: Annotated[
        float, typer.Option(metavar="SIGMA", help="Of log-normal noise on each step's time.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order and of the noise.")] = 0,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Requests at once; costs follow the expert union.")
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay recorded requests under policies: no engine, thousands of requests a minute.

    A trace line holds `id`, `task`, `prompt_token_ids` and `output_token_ids`. The policies are the
    same objects that serve in vLLM; drafts are those that vLLM's n-gram drafter would propose; a
    step costs what the curve says.

    For example:

        moecascade replay traces.jsonl
        moecascade replay traces.jsonl --policies static:2,cascade --cost 1,1.2,1.4 --max-k 2
        moecascade replay traces.jsonl --batch 8 --json
    """
    if drafter != "ngram":
        raise ConfigError(f"unknown drafter {drafter!r}; allowed: ngram")
    specs = [spec for spec in split(policies) if spec]
    if not specs:
        raise ConfigError(f"--policies {policies!r}: name at least one")
    for spec in specs:
        if spec != replaying.ORACLE:
            registry.create(spec, max_k)
    costs = _curve(cost)
    if cost == COSTS:  # nobody chose it: a shorter draft needs less of it
        costs = costs[: max_k + 1]
    conditions = replaying.Conditions(costs, noise, seed, max_k, ngram_min, ngram_max, batch=batch)
    requests = list(recorded.read(traces))
    if not any(len(trace.output) > 1 for trace in requests):
        raise ConfigError(
            f"no request with two tokens or more in {', '.join(map(str, traces))}; give a trace"
        )
    found = _play(requests, specs, conditions)
    if json:
        tokens = sum(len(trace.output) for trace in requests)
        print(jsonlib.dumps({"requests": len(requests), "tokens": tokens, "policies": found}))
    else:
        Console().print(_table(found, len(requests), batch))


def _curve(text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"cost {text!r}: give numbers with commas between, such as {COSTS}"
        ) from None


def _play(
    requests: list[recorded.Trace], specs: list[str], conditions: replaying.Conditions
) -> dict[str, dict[str, object]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    total = len(specs) * sum(len(trace.output) - 1 for trace in requests)
    found = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        for spec in specs:
            progress.update(task, description=escape(spec))
            outcomes = replaying.play(
                requests, spec, conditions, tell=lambda tokens: progress.advance(task, tokens)
            )
            found[spec] = replaying.summarise(outcomes)
    return found


def _table(found: dict[str, dict[str, object]], requests: int, batch: int) -> Table:
    at_once = f", {batch} at once" if batch > 1 else ""
    table = Table(title=f"{requests} requests{at_once}", caption=NOTES, caption_justify="left")
    table.add_column("policy")
    tasks = next(iter(found.values()))["by_task"]
    assert isinstance(tasks, dict)
    for column in ("speed-up", *tasks, "worst", "p5", "ETR", "K", "off"):
        table.add_column(column, justify="right")
    for spec, row in found.items():
        by_task = row["by_task"]
        assert isinstance(by_task, dict)
        values = [
            row["speedup"],
            *by_task.values(),
            row["worst_request"],
            row["p5_request"],
            row["etr"],
            row["mean_k"],
        ]
        table.add_row(
            escape(spec), *(f"{value:.2f}" for value in values), f"{row['off_share']:.0%}"
        )
    return table
