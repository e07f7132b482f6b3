"""`moecascade bench`: the paper's evaluation, with its baselines and peers, on a real engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moecascade.cli.numbers import numbers
from moecascade.core.spec import split
from moecascade.errors import ConfigError, nearest
from moecascade.evaluation import results, session, workloads
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.report import speedups, tables
from moecascade.evaluation.request_record import PLAIN
from moecascade.evaluation.schedule import Plan, Settings
from moecascade.vllm import support

DEFAULTS = Settings()
RESULTS = "bench.json"
JOURNAL = "rows.jsonl"
FILE_WIDTH = 120  # columns of a table that goes into a file


def bench(
    context: typer.Context,
    *,
    models: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Local models, folders, names on the hub; commas."),
    ] = "local",
    specs: Annotated[
        str,
        typer.Option(
            "--policies",
            metavar="SPECS",
            help=f"Policies, commas between; '{PLAIN}' is vLLM without plugin and speculation.",
        ),
    ] = ",".join(DEFAULTS.policies),
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: JSON Lines with id, task, prompt; Spec-Bench, HumanEval, GSM8K or "
            "ShareGPT as published; hf:NAME[:CONFIG[:SPLIT]]. Repeatable. Ours if none is given.",
        ),
    ] = None,
    prompts_per_task: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts of each task; all if not given.")
    ] = None,
    temperatures: Annotated[str, typer.Option(metavar="T,...", help="0 is greedy.")] = "0",
    concurrencies: Annotated[
        str, typer.Option("--concurrency", metavar="N,...", help="Requests in flight.")
    ] = "1",
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer, in tokens.")
    ] = DEFAULTS.max_tokens,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Of sampling, and of where among the prompts a run begins: runs that --minutes "
            "ends ask others with another seed, and may go into one report.",
        ),
    ] = DEFAULTS.seed,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="Stop measuring after this time, an equal share for each model. What was measured "
            "by then is complete: every prompt under every policy.",
        ),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Prompts of each task, the last ones, that every policy that learns serves before "
            "anything is measured: users meet servers that have served for a while.",
        ),
    ] = 0,
    drafter: Annotated[str, session.DRAFTER] = session.SEARCH,
    url: Annotated[
        str | None,
        typer.Option(
            help="Measure on a server that is running, with the plugin, under the name given by "
            "--models. Step times are then not known.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results and the servers' logs.")
    ] = Path("results/bench"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an interrupted run has measured.")
    ] = False,
) -> None:
    """Measure policies on a real engine: models, workloads, temperatures, requests in flight.

    The same prompts run under every policy, interleaved, so that drift cancels. Speed-ups have 95%
    intervals; what cannot be told apart is said to be so. Interrupt it (Ctrl-C) as you like: the
    same command goes on where it was. What is not listed below goes to vLLM's servers as it is.

    For example:

        moecascade bench --policies off,static:3,cascade,marginal --prompts-per-task 8
        moecascade bench --models local,mixtral-16 --temperatures 0,0.8 --minutes 60
        moecascade bench --drafter eagle --policies off,static:3,marginal
        moecascade bench --prompts HumanEval.jsonl --prompts test.jsonl --policies vllm,off,cascade
        moecascade bench --url http://localhost:8000 --models my-model --concurrency 8
        moecascade report results/bench
    """
    settings = Settings(
        policies=tuple(split(specs)),
        temperatures=numbers("--temperatures", temperatures, float),
        concurrencies=numbers("--concurrency", concurrencies, int),
        max_tokens=max_tokens,
        seed=seed,
    )
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes {minutes}: give a number above 0")
    warm, left = workloads.apart(workloads.read(prompts or []), warm_up)
    plan = Plan(workloads.mix(left, prompts_per_task), settings, warm)
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"models {models!r}: name at least one, and each only once")
    if url is None:
        support.check_version()
        for name in names:  # before anything is measured
            session.with_drafter(context.args, drafter, name, settings.max_k)
    else:
        _check_running(url, names, settings, context)
    screen = Console(stderr=True)
    session.make_folder(out)
    arguments: dict[str, Any] = {
        "models": names,
        "policies": list(settings.measured),
        "prompts": list(prompts or []),
        "prompts_per_task": prompts_per_task,
        "temperatures": list(settings.temperatures),
        "concurrencies": list(settings.concurrencies),
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        **({"warm_up": warm_up} if warm_up else {}),
        **({"drafter": drafter} if drafter != session.SEARCH else {}),
        "url": url,
        "flags": list(context.args),
    }
    asked_for = {**arguments, "minutes": minutes}  # with more time the same run may go on
    journal = Journal(out / JOURNAL, {**arguments, "asked": plan.digest}, fresh=fresh)
    if journal.rows:
        screen.print(f"Going on after {len(journal.rows)} requests in {out / JOURNAL}.")
    about, served = [], []
    try:
        with session.progress(screen) as shown:
            for i, name in enumerate(names):
                turn = plan.turned(i, len(names))
                if url is not None:
                    facts = session.on_running(url, name, turn, journal, shown, minutes)
                else:
                    deadline = None
                    if minutes is not None:
                        share = minutes * 60 / len(names)
                        deadline = time.monotonic() + share
                    flags = session.with_drafter(context.args, drafter, name, settings.max_k)
                    facts = session.serve_and_measure(
                        name, turn, journal, out, shown, flags=flags, deadline=deadline
                    )
                about.append(facts[0])
                served += facts[1]
                if i + 1 < len(names):
                    _keep(out, asked_for, about, served, journal)
    finally:
        journal.close()
    _keep(out, asked_for, about, served, journal)
    _print(journal)
    screen.print(
        f"Kept: {out / RESULTS}. See it: moecascade report {out}", soft_wrap=True, highlight=False
    )


def _check_running(url: str, models: list[str], settings: Settings, context: typer.Context) -> None:
    """Refuse what cannot be asked of a server that is running."""
    if len(models) > 1 or PLAIN in settings.measured:
        raise ConfigError(
            f"--url {url}: a running server has one model and the plugin; name one model and leave "
            f"{PLAIN!r} out"
        )
    if context.args:
        options = [name for parameter in context.command.params for name in parameter.opts]
        raise ConfigError(
            f"--url {url}: the server is already running, so vLLM's flags cannot be passed to it; "
            f"remove {context.args[0]!r}{nearest(context.args[0], options)}"
        )


def _keep(
    out: Path,
    arguments: dict[str, Any],
    about: list[dict[str, Any]],
    served: list[dict[str, Any]],
    journal: Journal,
) -> None:
    """Write what has been measured by now."""
    found = results.collect(
        "bench",
        arguments=arguments,
        models=about,
        servers=served,
        rows=[results.plain(row) for row in journal.rows],
        summary=[results.plain(cell) for cell in speedups.cells(journal.rows)],
    )
    results.write(out / RESULTS, found)


def _print(journal: Journal) -> None:
    """Print a table for each condition: each task, and all together."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    for condition, across in speedups.by_workload(speedups.cells(journal.rows)).items():
        shown = [c for workload, cells in across.items() if "+" not in workload for c in cells]
        console.print(tables.terminal(tables.tasks(shown, condition.title)))
