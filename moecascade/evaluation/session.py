"""Serving a model and measuring on it, with what a person sees meanwhile: for all that measure."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import runner
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.request_record import BASELINE, PLAIN
from moecascade.evaluation.schedule import Plan
from moecascade.localmodel import locate
from moecascade.serving import command, server
from moecascade.serving.flags import Flags, to_json
from moecascade.telemetry import step_log

HOST = "127.0.0.1"
SEARCH = "ngram"


def make_folder(out: Path) -> None:
    """Make the folder for results; SetupError with the reason where that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot write to {str(out)!r}: {error.strerror}; choose another folder with --out"
        ) from None


REFRESHES = 2  # a second: drawing takes processor time from what is measured


def _bars(screen: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        refresh_per_second=REFRESHES,
    )


@contextmanager
def progress(screen: Console) -> Iterator[Progress]:
    """Show progress bars with the time that is left."""
    with _bars(screen) as shown:
        yield shown


@contextmanager
def live(screen: Console, table: Callable[[], RenderableType]) -> Iterator[Progress]:
    """Show progress bars below a table that fills in, while measuring.

    Args:
        screen: Where. Without a terminal only the bars' last state is printed.
        table: Returns the table as it is now.
    """
    if not screen.is_terminal:
        with progress(screen) as shown:
            yield shown
        return
    shown = _bars(screen)
    with Live(
        get_renderable=lambda: Group(table(), shown),
        console=screen,
        refresh_per_second=REFRESHES,
        transient=True,
    ):
        yield shown


def serve_and_measure(
    model: str,
    plan: Plan,
    journal: Journal,
    out: Path,
    shown: Progress,
    *,
    flags: Sequence[str] = (),
    deadline: float | None = None,
    keep_text: bool = False,
    heard: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Start the servers that a model needs, measure on them, and end them.

    Args:
        model: A local model, a folder, a name on the hub.
        plan: What is sent.
        journal: Where rows go.
        out: Folder of the servers' logs.
        shown: Where progress is shown.
        flags: vLLM's, for all servers.
        deadline: See `runner.measure`.
        keep_text: Whether rows hold the answers.
        heard: Called each time that answers have come.

    Returns:
        What the model and the servers were, for the results.
    """
    blocks = _blocks(plan, model)
    folder, local_name = locate.find_model(model)
    settings = plan.settings
    flags = [*without_reuse(flags), *flags]
    where = ["--host", HOST, "--port"]
    with tempfile.TemporaryDirectory(prefix="moecascade-") as scratch, ExitStack() as stack:
        log = Path(scratch) / "steps.jsonl"
        launches = {
            BASELINE: command.plan(
                folder,
                [*where, str(server.free_port(HOST)), *flags],
                max_k=None if chooses_drafter(flags) else settings.max_k,
                step_log=log,
                local_name=local_name,
            )
        }
        if PLAIN in settings.measured:
            launches[PLAIN] = command.plain(
                folder, [*where, str(server.free_port(HOST)), *flags], local_name=local_name
            )
        bar = shown.add_task(f"{model}: starting vLLM", total=None)
        for name, one in launches.items():  # one after the other: starting takes all cores
            began = time.monotonic()
            logfile = out / f"server-{local_name or Path(model).name}-{name}.log"
            running = stack.enter_context(server.Server(one, logfile))
            running.wait_ready()
            shown.console.print(f"{model}: vLLM ready after {time.monotonic() - began:.0f} s")
        urls = {name: one.url for name, one in launches.items()}
        served = launches[BASELINE]
        left_out = runner.measure(
            urls,
            served.model,
            plan,
            journal,
            log=step_log.Reader(log),
            deadline=deadline,
            keep_text=keep_text,
            tell=_on(shown, bar, model, blocks, deadline, heard),
        )
        shown.update(bar, description=f"{model}: stopping the server")
    shown.update(bar, description=f"{model}: done", completed=1.0)  # also where time ran out
    about = {"name": served.model, **runner.model_facts(folder), **_without(left_out, shown)}
    return about, [
        {"of": name, "command": list(one.command), "environment": dict(one.environment)}
        for name, one in launches.items()
    ]


def on_running(
    url: str, model: str, plan: Plan, journal: Journal, shown: Progress, minutes: float | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure on a server that runs elsewhere; returns as `serve_and_measure` does."""
    blocks = _blocks(plan, model)
    runner.check_plugin(url, model)
    bar = shown.add_task(model, total=None)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    tell = _on(shown, bar, model, blocks, deadline)
    left_out = runner.measure({BASELINE: url}, model, plan, journal, deadline=deadline, tell=tell)
    shown.update(bar, description=f"{model}: done", completed=1.0)
    return {"name": model, **_without(left_out, shown)}, [{"of": BASELINE, "url": url}]


def _without(left_out: Sequence[str], shown: Progress) -> dict[str, Any]:
    """Say which prompts did not fit into the model's context, and return it for the results."""
    if not left_out:
        return {}
    shown.console.print(f"Left out, too long for the model: {escape(', '.join(left_out))}")
    return {"left_out": list(left_out)}


def _blocks(plan: Plan, model: str) -> int:
    """Return how many blocks there will be; ConfigError, before anything starts, where none can."""
    return sum(len(blocks) for blocks in plan.rounds(model))


def _on(
    shown: Progress,
    bar: TaskID,
    model: str,
    blocks: int,
    deadline: float | None,
    heard: Callable[[], None] = lambda: None,
) -> Callable[[str, int], None]:
    """Return what shows on a bar how far measuring is: of the blocks, or sooner of the time."""
    began = time.monotonic()
    given = math.inf if deadline is None else max(1.0, deadline - began)
    shown.update(bar, description=f"{model}: warming up", total=1.0, completed=0)

    def tell(what: str, sent: int) -> None:
        done = max(sent / blocks, (time.monotonic() - began) / given)
        many = f"{sent}" if deadline is not None else f"{sent} of {blocks}"
        said = escape(f"{model}: {what[:28]:<28} {many}")
        shown.update(bar, description=said, completed=min(1.0, done))
        heard()

    return tell


def without_reuse(flags: Sequence[str]) -> list[str]:
    """Return what keeps servers from reusing a prompt's KV cache, where the user did not decide.

    Every policy gets the same prompts, and all but the first would find theirs computed.
    """
    names = ("enable-prefix-caching", "no-enable-prefix-caching")
    decided = any(name in Flags(flags) for name in names)
    return [] if decided else ["--no-enable-prefix-caching"]


DRAFTER = typer.Option(
    metavar="NAME",
    help="Who drafts: ngram searches the text; draft, a small model, and eagle, a head on the "
    "model's last state, are for the local models. Others by vLLM's --speculative-config.",
)


def with_drafter(flags: Sequence[str], drafter: str, model: str, max_k: int) -> list[str]:
    """Return vLLM's flags with those that choose a drafter for a model.

    Raises:
        ConfigError: An unknown drafter, one that is not for this model, or the flags choose one.
    """
    if drafter == SEARCH:
        return list(flags)
    if chooses_drafter(flags):
        raise ConfigError(
            f"--drafter {drafter} and --speculative-config both choose a drafter; drop one of them"
        )
    chosen = {**locate.drafter(drafter, model), "num_speculative_tokens": max_k}
    return [*flags, "--speculative-config", to_json(chosen)]


def chooses_drafter(flags: Sequence[str]) -> bool:
    """Return whether the user chose a drafter, and with it how long drafts are."""
    return "speculative-config" in Flags(flags)
