"""`moecascade replay`: policies on recorded requests, thousands a minute, without an engine."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moecascade.cli.numbers import numbers
from moecascade.core import registry
from moecascade.core.spec import split
from moecascade.errors import ConfigError
from moecascade.evaluation import results
from moecascade.evaluation.report.diagnostics import step_times_by_model
from moecascade.evaluation.request_record import from_json
from moecascade.replay.player import (
    LONG,
    MIXTRAL_LIKE,
    Oracle,
    ReplayConditions,
    ReplaySummary,
    play,
    summarise,
)
from moecascade.telemetry import traces as trace_files
from moecascade.telemetry.traces import Trace

DRAFTERS = ("ngram", "recorded")
COSTS = ",".join(f"{time:g}" for time in MIXTRAL_LIKE)
NOTES = (
    "Speed-up over no speculation, time in baseline steps; worst and 5th percentile: of single "
    f"requests of {LONG} tokens or more; K: drafts verified a step; off: steps without."
)


def replay(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files: JSON Lines, one request a line.")
    ],
    policies: Annotated[
        str, typer.Option(metavar="SPECS", help="Policies to compare; 'oracle' knows each match.")
    ] = "off,static:1,static:3,static:8,cascade,marginal,oracle",
    drafter: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ngram: found in the text; recorded: those in the traces, of a model.",
        ),
    ] = "ngram",
    ngram_min: Annotated[int, typer.Option(metavar="N", help="Least length of a match.")] = 2,
    ngram_max: Annotated[int, typer.Option(metavar="N", help="Greatest length of a match.")] = 4,
    max_k: Annotated[int, typer.Option(metavar="K", help="Longest draft.")] = 8,
    cost: Annotated[
        str,
        typer.Option(
            metavar="TIMES",
            help="Step time over the baseline, at K = 0, 1, ..., or a file of measured ones "
            "(benchmarks/gpu/step_times.py, bench).",
        ),
    ] = COSTS,
    pass_cost: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            help="Of one pass of the drafter, over the baseline; one is made in every step.",
        ),
    ] = 0.0,
    noise: Annotated[
        float, typer.Option(metavar="SIGMA", help="Of log-normal noise on each step's time.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order and of the noise.")] = 0,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Requests at once; costs follow the expert union.")
    ] = 1,
    late: Annotated[
        bool, typer.Option("--late", help="Decide one step early, drafts unseen: asynchronous.")
    ] = False,
    filled: Annotated[
        bool, typer.Option("--filled", help="What was not found is verified and paid for.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay recorded requests under policies: no engine, thousands of requests a minute.

    A trace line holds `id`, `task`, `prompt_token_ids` and `output_token_ids`. The policies are the
    same objects that serve in vLLM; drafts are those that vLLM's n-gram drafter would propose, or
    those of a model that `record --drafter` wrote down; a step costs what the curve says, and each
    pass of the model `--pass-cost`.

    For example:

        moecascade replay traces.jsonl
        moecascade replay traces.jsonl --policies static:2,cascade --cost 1,1.2,1.4 --max-k 2
        moecascade replay traces.jsonl --batch 8 --json
        moecascade replay eagle.jsonl --drafter recorded --pass-cost 0.05 --late
    """
    if drafter not in DRAFTERS:
        raise ConfigError(f"unknown drafter {drafter!r}; allowed: {', '.join(DRAFTERS)}")
    recorded = drafter == "recorded"
    if pass_cost and not recorded:
        raise ConfigError(
            f"--pass-cost {pass_cost:g}: the drafter 'ngram' has no passes; add --drafter recorded"
        )
    specs = [spec for spec in split(policies) if spec]
    if not specs:
        raise ConfigError(f"--policies {policies!r}: name at least one")
    for spec in specs:
        if spec != Oracle.name:
            registry.settings_for(spec, max_k)
    costs = _measured(Path(cost)) if Path(cost).is_file() else numbers("--cost", cost, float)
    if cost == COSTS:  # nobody chose it: a shorter draft needs less of it
        costs = costs[: max_k + 1]
    conditions = ReplayConditions(
        costs,
        noise,
        seed,
        max_k,
        ngram_min,
        ngram_max,
        batch,
        late=late,
        filled=filled,
        recorded=recorded,
        pass_cost=pass_cost,
    )
    requests = list(trace_files.read(traces))
    if recorded and (bare := [trace.id for trace in requests if not trace.drafts]):
        raise ConfigError(
            f"{len(bare)} of {len(requests)} requests hold no drafts, {bare[0]!r} is the first; "
            "record them: moecascade record --drafter eagle"
        )
    if not any(len(trace.output) > 1 for trace in requests):
        raise ConfigError(
            f"no request with two tokens or more in {', '.join(map(str, traces))}; give a trace"
        )
    found = _play(requests, specs, conditions)
    if json:
        tokens = sum(len(trace.output) for trace in requests)
        shown = {spec: asdict(summary) for spec, summary in found.items()}
        print(jsonlib.dumps({"requests": len(requests), "tokens": tokens, "policies": shown}))
    else:
        at_once = f", {batch} at once" if batch > 1 else ""
        console = Console()
        console.print(_table(found, f"{len(requests)} requests{at_once}", console))


def _measured(path: Path) -> tuple[float, ...]:
    """Return the step times of the first model in a results file, from K = 0 on."""
    rows = [from_json(row) for row in results.read(path).rows]
    for model, curve in step_times_by_model(rows).items():
        known = {0: 1.0} | {at.k: at.cost for at in curve}
        if list(known) == list(range(len(known))) and len(known) > 1:
            return tuple(known.values())
        missing = min(set(range(max(known) + 1)) - known.keys(), default=1)
        raise ConfigError(f"--cost {path}: no step of {model} verified {missing} drafts")
    raise ConfigError(f"--cost {path}: holds no step times of one request at a time")


def _play(
    requests: Sequence[Trace], specs: Sequence[str], conditions: ReplayConditions
) -> dict[str, ReplaySummary]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    total = len(specs) * sum(len(trace.output) - 1 for trace in requests)
    found = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        for spec in specs:
            progress.update(task, description=escape(spec))
            outcomes = play(
                requests, spec, conditions, tell=lambda tokens: progress.advance(task, tokens)
            )
            found[spec] = summarise(outcomes)
    return found


def _table(found: dict[str, ReplaySummary], title: str, console: Console) -> Table:
    """Return the table with as many columns as fit; no name is ever cut."""
    columns: dict[str, Callable[[ReplaySummary], str]] = {
        "speed-up": lambda row: f"{row.speedup:.2f}",
        "worst": lambda row: f"{row.worst_request:.2f}",
        "K": lambda row: f"{row.mean_k:.2f}",
        "off": lambda row: f"{row.off_share:.0%}",
    }
    columns |= {task: _of_task(task) for task in next(iter(found.values())).by_task}
    columns |= {
        "p5": lambda row: f"{row.p5_request:.2f}",
        "ETR": lambda row: f"{row.etr:.2f}",
    }
    names = list(columns)
    for shown in range(len(names), 0, -1):
        missing = ", ".join(names[shown:])
        more = f" Not shown for want of room: {missing}; --json has it." if missing else ""
        table = Table(title=title, caption=NOTES + more, caption_justify="left", box=SIMPLE_HEAD)
        table.add_column("policy", no_wrap=True)
        for name in names[:shown]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for spec, row in found.items():
            table.add_row(escape(spec), *(columns[name](row) for name in names[:shown]))
        if _width(table) <= console.width:
            break
    return table


def _width(table: Table) -> int:
    """Return the width that the table's cells want."""
    wide = Console(width=10_000)
    caption, table.caption = table.caption, None  # it wraps
    wanted = Measurement.get(wide, wide.options, table).maximum
    table.caption = caption
    return wanted


def _of_task(task: str) -> Callable[[ReplaySummary], str]:
    return lambda row: f"{row.by_task[task]:.2f}"
