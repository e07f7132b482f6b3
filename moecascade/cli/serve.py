"""`moecascade serve`: vLLM's OpenAI-compatible server with the plugin on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecascade.cli.numbers import numbers
from moecascade.core.options import ServerOptions
from moecascade.core.spec import parse
from moecascade.errors import ConfigError
from moecascade.localmodel.locate import find_model
from moecascade.serving import command, server
from moecascade.vllm import support


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name on the Hugging Face hub, a folder, or the name of a local model "
            "(see 'moecascade model --list'), such as 'local'.",
        ),
    ],
    *,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Who chooses K for requests that do not say: marginal (the default), cascade "
            "(the paper's), off, or static:K.",
        ),
    ] = None,
    max_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest draft of the default n-gram drafter "
            f"(by default {command.DRAFTER['num_speculative_tokens']}).",
        ),
    ] = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            metavar="K,...",
            help="Draft lengths for which vLLM captures whole CUDA graphs, '' for its own choice "
            f"(by default {','.join(map(str, command.LADDER))} on a GPU).",
        ),
    ] = None,
    step_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a JSON line for each engine step to FILE."),
    ] = None,
    live_page: Annotated[
        bool,
        typer.Option("--live-page", help="Show at /cascade what running requests do, to whoever."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that would run, and stop.")
    ] = False,
) -> None:
    """Serve MODEL over HTTP, with draft lengths chosen while it runs.

    This is vLLM's own server. Whatever follows MODEL and is not listed below goes to vLLM as it is,
    and overrides what is chosen here: the scheduler, n-gram drafting and, on a CPU, flags that work
    there.

    For example:

        moecascade serve local
        moecascade serve Qwen/Qwen3-30B-A3B --port 8001 --tensor-parallel-size 2
        moecascade serve ./my-moe --policy static:3 --dry-run

    One request can choose for itself: add "vllm_xargs": {"cascade_policy": "off"} to its JSON, or
    cap its drafts with {"cascade_max_k": 2}.
    """
    if model.startswith("-"):
        raise ConfigError(
            f"MODEL comes first, vLLM's flags after it, but the first word is {model!r}; "
            f"write for example: moecascade serve local {' '.join([model, *context.args])}"
        )
    support.check_version()
    path, local_name = find_model(model, build=not dry_run)
    planned = command.plan(
        path,
        context.args,
        policy=policy,
        max_k=max_k,
        step_log=step_log,
        live_page=live_page,
        local_name=local_name,
        ladder=None if ladder is None else numbers("--ladder", ladder, int),
        bold=policy is None or parse(policy).name == ServerOptions().policy,
    )
    if dry_run:
        print(planned)
        return
    raise typer.Exit(server.run(planned))
