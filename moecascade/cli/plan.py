"""`moecascade plan`: will speculation pay on this model, on this device?"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecascade.cli.numbers import numbers
from moecascade.errors import ConfigError, nearest
from moecascade.replay.planning import devices
from moecascade.replay.planning import plan as planning
from moecascade.replay.planning.architecture import Model
from moecascade.replay.planning.plan import Choice, Profile
from moecascade.replay.planning.step_time import Drafter, Setup, as_dict

SHORT = {
    "attention": "attn",
    "cache": "KV",
    "launches": "launch",
    "network": "net",
    "drafting": "draft",
}
"""Heads of columns, so that all fit 80."""
CARDS = typer.Option("--tensor-parallel", metavar="N", min=1, help="Cards that share the model.")
EXPERT_PARALLEL = typer.Option("--expert-parallel", help="Experts lie whole on the cards.")
BITS = {"bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4.5, "fp4": 4.5}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, its folder, a name on the hub; the configurations of some twenty "
            "models come with this package.",
        ),
    ],
    *,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="A GPU or processor, or a JSON file for others.")
    ],
    drafter: Annotated[
        str,
        typer.Option(metavar="KIND", help="ngram, suffix, eagle, eagle3, mtp, draft_model:CONFIG."),
    ] = "ngram",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help=f"Of weights: {', '.join(BITS)}; by default what the configuration says.",
        ),
    ] = None,
    cards: Annotated[int, CARDS] = 1,
    expert_parallel: Annotated[bool, EXPERT_PARALLEL] = False,
    concurrency: Annotated[
        str, typer.Option(metavar="N,...", help="Requests at once.")
    ] = "1,4,16,64",
    context: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens of a request, prompt and answer.")
    ] = 1024,
    max_k: Annotated[int, typer.Option(metavar="K", min=1, help="Longest draft.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw costs and gains, too (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """Say what drafts would cost and gain on MODEL, before anything is deployed.

    From the model's configuration and the device's data sheet: where the time of a step goes, what
    verifying K drafts costs, how often tokens must be right for that to pay, and how much faster
    text is of which measured acceptance is known. An estimate: docs/planning.md says of what.

    For example:

        moecascade plan Qwen/Qwen3-30B-A3B --device H100 --drafter eagle3
        moecascade plan mistralai/Mixtral-8x7B-v0.1 --device RTX-6000-Ada --dtype fp8
        moecascade plan ./my-moe --device my-card.json --tensor-parallel 8 --expert-parallel
    """
    found_model = planning.find_model(model)
    setup = Setup(devices.find(device), cards, expert_parallel, bits_of(dtype))
    chosen = planning.find_drafter(drafter, found_model)
    profiles = planning.profiles_for(drafter.partition(":")[0])
    found = planning.choices(
        found_model,
        setup,
        chosen,
        requests=numbers("--concurrency", concurrency, int),
        max_k=max_k,
        context=context,
        profiles=profiles,
    )
    if plot is not None:
        _draw(plot, found_model, setup, chosen, found, profiles)
    if json:
        print(jsonlib.dumps(_as_json(found_model, setup, chosen, found, profiles), indent=1))
        return
    screen = Console()
    screen.print(escape(_about(found_model, setup)), highlight=False)
    for table in (_times(found), _costs(found, max_k), *_gains(found, profiles, max_k)):
        screen.print(table)
    screen.print(escape(_advice(found_model, setup, chosen, found, profiles)), highlight=False)


def _draw(
    path: Path,
    model: Model,
    setup: Setup,
    drafter: Drafter,
    found: Sequence[Choice],
    profiles: Sequence[Profile],
) -> None:
    """Write the chart; SetupError or ConfigError where that cannot be."""
    from moecascade.evaluation.report import charts

    figure = charts.planned(found, profiles, narrow=False)
    cards = f"{setup.cards} x {setup.device.name}" if setup.cards > 1 else setup.device.name
    caption = (
        "Estimated from the model's configuration and the device's data sheet. A draft pays where "
        "the text's line lies above the load's."
    )
    title = f"{model.name.rpartition('/')[2]} on {cards}, drafter {drafter.name}"
    try:
        charts.save(figure, path, title, caption)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error})") from None


def bits_of(dtype: str | None) -> float | None:
    """Return the bits a weight of a type; ConfigError for one that is not known."""
    if dtype is None:
        return None
    if dtype not in BITS:
        raise ConfigError(f"unknown type {dtype!r}{nearest(dtype, BITS)}; known: {', '.join(BITS)}")
    return BITS[dtype]


def _about(model: Model, setup: Setup) -> str:
    experts, top_k = model.routing
    moe = f", {top_k} of {experts} experts a token" if model.is_moe else ", dense"
    bits = model.bits if setup.bits is None else setup.bits
    size = (model.total - model.head) * bits / 8 / 1e9 + model.head * 2 / 1e9
    room = setup.device.memory_gb * setup.cards
    fits = "" if size < 0.9 * room else f": MORE THAN {room:g} GB OF MEMORY HOLD"
    cards = f"{setup.cards} x {setup.device.name}" if setup.cards > 1 else setup.device.name
    return (
        f"{model.name}: {model.total / 1e9:.1f}B parameters, {model.active / 1e9:.1f}B a token"
        f"{moe}; {size:.0f} GB of weights{fits}. On {cards} ({setup.device.source})."
    )


def _times(found: Sequence[Choice]) -> Table:
    """Return where the time of a step without drafts goes, and of the longest."""
    title = "Where a step's milliseconds go, n requests at once"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("n", justify="right")
    table.add_column("K", justify="right")
    ends = [c for c in found if c.k in (0, max(choice.k for choice in found))]
    parts = [name for name in as_dict(ends[0].step) if any(as_dict(c.step)[name] for c in ends)]
    for name in parts:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for choice in ends:
        took = as_dict(choice.step)
        cells = (f"{took[name]:.2f}" for name in parts)
        table.add_row(str(choice.requests), str(choice.k), *cells, end_section=choice.k > 0)
    return table


def _costs(found: Sequence[Choice], max_k: int) -> Table:
    table = Table(
        title="Cost of a step over one without drafter; chance of a token at which it pays",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("n", justify="right")
    for k in range(max_k + 1):
        table.add_column(f"K = {k}", justify="right")
    for n in dict.fromkeys(choice.requests for choice in found):
        mine = [choice for choice in found if choice.requests == n]
        table.add_row(str(n), *(f"{c.cost:.2f}" for c in mine))
        even = [
            "" if c.k == 0 else "never" if c.break_even is None else f"{c.break_even:.0%}"
            for c in mine
        ]
        table.add_row("", *even, end_section=True)
    return table


def _gains(found: Sequence[Choice], profiles: Sequence[Profile], max_k: int) -> list[Table]:
    tables = []
    for profile in profiles:
        many = min(max_k, len(profile.survival))
        table = Table(
            title=f"Speed-up at a fixed K, {escape(profile.name)} ({escape(profile.source)})",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            min_width=76,
        )
        table.add_column("n", justify="right")
        for k in range(1, many + 1):
            table.add_column(f"K = {k}", justify="right")
        for n, top in planning.best(found, profile.name).items():
            mine = [c for c in found if c.requests == n and 0 < c.k <= many]
            cells = (
                f"[bold]{c.speedups[profile.name]:.2f}[/]"
                if c is top
                else f"{c.speedups[profile.name]:.2f}"
                for c in mine
            )
            table.add_row(str(n), *cells)
        tables.append(table)
    return tables


def _advice(
    model: Model,
    setup: Setup,
    drafter: Drafter,
    found: Sequence[Choice],
    profiles: Sequence[Profile],
) -> str:
    """Return what limits it, and how to start."""
    first, last = found[0], max((c for c in found if c.requests == found[0].requests), key=_k)
    grown = {
        name: value - as_dict(first.step)[name]
        for name, value in as_dict(last.step).items()
        if name != "total"
    }
    most = max(grown, key=lambda name: grown[name])
    share = grown[most] / max(1e-12, sum(grown.values()))
    lines = [f"What drafts cost is {share:.0%} {most} ({last.requests} at once, K = {last.k})."]
    steps = planning.ladder(found, profiles)
    method = drafter.name.partition(":")[0]
    words = ["moecascade serve", model.name]
    if setup.cards > 1:
        words += [f"--tensor-parallel-size {setup.cards}"]
    if setup.expert_parallel:
        words += ["--enable-expert-parallel"]
    if method != "ngram":
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": max(steps)}
        if method not in planning.SEARCHES and method != "mtp":
            config["model"] = "..."
        words += [f"--speculative-config '{jsonlib.dumps(config)}'"]
    words += [f"--ladder {','.join(map(str, steps))}"]
    lines.append(f"To start with: {' '.join(words)}")
    return "\n".join(lines)


def _k(choice: Choice) -> int:
    return choice.k


def _as_json(
    model: Model,
    setup: Setup,
    drafter: Drafter,
    found: Sequence[Choice],
    profiles: Sequence[Profile],
) -> dict[str, Any]:
    return {
        "model": model.name,
        "parameters": model.total,
        "active": model.active,
        "device": setup.device.name,
        "cards": setup.cards,
        "drafter": drafter.name,
        "ladder": planning.ladder(found, profiles),
        "choices": [
            {
                "requests": c.requests,
                "k": c.k,
                "milliseconds": as_dict(c.step),
                "cost": c.cost,
                "break_even": c.break_even,
                "speedups": dict(c.speedups),
            }
            for c in found
        ],
    }
