"""`moecascade simulate`: policies on models and devices that are not here, on recorded text."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moecascade.cli.plan import CARDS, EXPERT_PARALLEL, bits_of
from moecascade.core import registry
from moecascade.core.spec import split
from moecascade.errors import ConfigError, nearest
from moecascade.evaluation.report import paper
from moecascade.evaluation.workloads import workloads
from moecascade.replay import simulation
from moecascade.replay.planning import devices, plan
from moecascade.replay.planning.plan import Profile
from moecascade.replay.planning.step_time import Setup
from moecascade.replay.player import Oracle, ReplayConditions
from moecascade.replay.simulation import Fared
from moecascade.serving import machine
from moecascade.telemetry import traces as trace_files

MAX_K = 8


def simulate(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files: JSON Lines, one request a line.")
    ],
    *,
    models: Annotated[
        str,
        typer.Option(metavar="NAMES", help="As for 'plan', with commas between; the paper's five."),
    ] = ",".join(simulation.PAPER),
    device: Annotated[
        str, typer.Option(metavar="NAME", help="As for 'plan'; the paper's.")
    ] = "RTX-6000-Ada",
    policies: Annotated[
        str, typer.Option(metavar="SPECS", help="To compare; 'oracle' knows each match.")
    ] = "static:1,static:2,static:3,cascade,marginal,oracle",
    drafter: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="ngram: found in the text; eagle, eagle3, mtp, draft_model:CONFIG: those that the "
            "traces hold, or --acceptance, at the cost of such a drafter.",
        ),
    ] = "ngram",
    acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Let a model's drafts be right as often as published, each place on its own: "
            "'chat, EAGLE-3' and others that 'plan' prints. Implies --late.",
        ),
    ] = None,
    ngram_min: Annotated[
        int,
        typer.Option(
            metavar="N", help="Least length of a match; by default that of the paper's vLLM."
        ),
    ] = 1,
    ngram_max: Annotated[int, typer.Option(metavar="N", help="Greatest length of a match.")] = 4,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Of weights, as for 'plan'; of the paper's models the paper's."
        ),
    ] = None,
    cards: Annotated[int, CARDS] = 1,
    expert_parallel: Annotated[bool, EXPERT_PARALLEL] = False,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Requests at once.")] = 1,
    context: Annotated[int, typer.Option(metavar="N", min=0, help="Tokens of a request.")] = 1024,
    late: Annotated[
        bool, typer.Option("--late", help="Decide one step early, drafts unseen: asynchronous.")
    ] = False,
    noise: Annotated[
        float, typer.Option(metavar="SIGMA", help="Of log-normal noise on each step's time.")
    ] = 0.05,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Repetitions.")] = 1,
    jobs: Annotated[int, typer.Option(metavar="N", min=0, help="Processes; 0 for one a core.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Play policies on the paper's models, or others, on a device that is not here.

    Text is recorded, step times are those of 'moecascade plan', and the policies are the objects
    that serve. Of up to three tasks all mixes are workloads, as in the paper.

    For example:

        moecascade simulate traces.jsonl
        moecascade simulate traces.jsonl --models Qwen3-30B-A3B --device H100 --batch 16
        moecascade simulate eagle.jsonl --models Qwen3-235B-A22B --device H200 --tensor-parallel 8
            --expert-parallel --drafter eagle3 --late
        moecascade simulate traces.jsonl --models gpt-oss-120b --device H100 --drafter eagle3
            --acceptance 'chat, EAGLE-3' --batch 64
    """
    requests = list(trace_files.read(traces))
    tasks = list(dict.fromkeys(trace.task for trace in requests))
    specs = [spec for spec in split(policies) if spec]
    if not tasks or not specs:
        raise ConfigError(
            f"{', '.join(map(str, traces))}: no requests, or no --policies; give both"
        )
    max_k = MAX_K
    if acceptance is not None:
        profile = _profile(acceptance, drafter)
        requests, max_k = simulation.with_drafts(requests, profile), len(profile.survival)
        late = True  # nobody can see drafts that have no tokens
    for spec in specs:
        if spec != Oracle.name:
            registry.settings_for(spec, max_k)
    engines = []
    for name in models.split(","):
        model = plan.find_model(name.strip())
        setup = Setup(devices.find(device), cards, expert_parallel, bits_of(dtype))
        if dtype is None and model.name in simulation.IN_FP8:
            setup = Setup(setup.device, cards, expert_parallel, 8.0)
        chosen = plan.find_drafter(drafter, model)
        if chosen.pass_ is not None and any(not trace.drafts for trace in requests):
            raise ConfigError(
                f"--drafter {drafter}: the traces hold no drafts; record them: moecascade record "
                f"--drafter eagle; or draw them: --acceptance PROFILE{_known(drafter)}"
            )
        conditions = simulation.conditions_of(
            model,
            setup,
            chosen,
            max_k=max_k,
            batch=batch,
            context=context,
            noise=noise,
            late=late,
            ngram_min=ngram_min,
            ngram_max=ngram_max,
        )
        engines.append((model.name, conditions))
    mixes = workloads(tasks)
    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(engines) * len(mixes) * len(specs))
        found = simulation.simulate(
            requests,
            engines,
            mixes,
            specs,
            seeds=seeds,
            jobs=jobs or machine.cores(),
            tell=lambda: progress.advance(bar),
        )
    if json:
        curves = {name: list(conditions.costs) for name, conditions in engines}
        print(jsonlib.dumps({"costs": curves, "found": [asdict(one) for one in found]}))
        return
    screen = Console()
    for name, conditions in engines:
        screen.print(_table(name, conditions, [f for f in found if f.model == name], specs))
    screen.print(_summary(found, specs))


def _profile(name: str, drafter: str) -> Profile:
    """Return a published profile; ConfigError names those of the drafter."""
    known = {profile.name: profile for profile in _profiles(drafter)}
    if name not in known:
        raise ConfigError(
            f"unknown --acceptance {name!r} of drafter {drafter!r}{nearest(name, known)}"
            f"{_known(drafter)}"
        )
    return known[name]


def _profiles(drafter: str) -> Sequence[Profile]:
    method = drafter.partition(":")[0]
    return [] if method in plan.SEARCHES else plan.profiles_for(method)


def _known(drafter: str) -> str:
    names = ", ".join(repr(profile.name) for profile in _profiles(drafter))
    return f"; known: {names}" if names else "; none is known of this drafter"


def _table(
    model: str, conditions: ReplayConditions, found: Sequence[Fared], specs: Sequence[str]
) -> Table:
    """Return one model's workloads: speed-up over no speculation, and the worst single answer."""
    n, ks = conditions.batch, range(1, conditions.max_k + 1)
    costs = ", ".join(f"{conditions.cost(n * (k + 1)) / conditions.cost(n):.2f}" for k in ks)
    each = " of each request" if n > 1 else ""
    passes = f"; a pass {conditions.pass_cost:.2f}" if conditions.pass_cost else ""
    table = Table(
        title=f"{escape(model)}: a step with 1, 2, ... drafts{each} takes {costs}{passes}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        min_width=78,
    )
    table.add_column("policy", no_wrap=True)
    names = list(dict.fromkeys(one.workload for one in found))
    for name in names:
        table.add_column(escape(name.replace("+", " +")), justify="right", overflow="fold")
    table.add_column("worst answer", justify="right")
    for spec in specs:
        mine = {one.workload: one for one in found if one.policy == spec}
        cells = (f"{mine[name].speedup:.2f}" for name in names)
        table.add_row(escape(spec), *cells, f"{min(one.worst for one in mine.values()):.2f}")
    return table


def _summary(found: Sequence[Fared], specs: Sequence[str]) -> Table:
    """Return each policy's worst and mean over models and workloads, beside the paper's."""
    table = Table(
        title="Over all models and workloads: speed-up over no speculation",
        caption=f"paper: {paper.SOURCE}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    for name in ("mean", "worst", "paper's worst", "worst answer"):
        table.add_column(name, justify="right")
    for spec in specs:
        mine = [one.speedup for one in found if one.policy == spec]
        slower = paper.SLOWER.get(spec)
        theirs = "" if slower is None else f"{1 / (1 + slower):.2f}"
        worst = min(one.worst for one in found if one.policy == spec)
        cells = (f"{fmean(mine):.2f}", f"{min(mine):.2f}", theirs, f"{worst:.2f}")
        table.add_row(escape(spec), *cells)
    return table
