"""`moecascade record`: make traces of prompts with a real engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moecascade.core import registry
from moecascade.errors import ConfigError, SetupError, TooLongError
from moecascade.evaluation import runner, session, workloads
from moecascade.evaluation.request_record import BASELINE, MARK
from moecascade.evaluation.schedule import Block, Request, Settings
from moecascade.localmodel.locate import find_model
from moecascade.serving import command, server
from moecascade.telemetry.files import json_line, records, write_whole
from moecascade.vllm import support


def record(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPTS]...",
            help="Prompt files, as for 'moecascade bench'; our own if none is given.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the traces go.")],
    model: Annotated[
        str, typer.Option(help="What to serve: a local model, a folder, a name on the hub.")
    ] = "local",
    prompts_per_task: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts of each task; all if not given.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of sampling; 0 is greedy.")] = 0,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling, one request at a time.")] = 0,
    concurrency: Annotated[int, typer.Option(metavar="N", help="Requests in flight.")] = 8,
    policy: Annotated[
        str, typer.Option(metavar="SPEC", help="Who chooses K meanwhile; the text is the same.")
    ] = BASELINE,
    drafter: Annotated[str, session.DRAFTER] = session.SEARCH,
) -> None:
    """Record what a model answers, so that policies can be replayed on it without an engine.

    Serves the model with the plugin, sends every prompt once, and writes a line for each request:
    token ids of prompt and answer, and the engine's steps. With a drafter that is a model, also
    what it proposes at every place of the answer, none of which is verified: see 'replay --drafter
    recorded'. What is not listed below goes to vLLM's server as it is.

    For example:

        moecascade record --out traces.jsonl
        moecascade record HumanEval.jsonl --model org/my-moe --temperature 0.8 --out t08.jsonl
        moecascade record --out traces.jsonl --dtype float32
        moecascade record --out eagle.jsonl --drafter eagle
        moecascade replay traces.jsonl
    """
    settings = Settings(
        policies=(policy,),
        temperatures=(temperature,),
        concurrencies=(concurrency,),
        max_tokens=max_tokens,
        seed=seed,
    )
    registry.settings_for(policy, settings.max_k)
    files, flags = files_and_flags(prompts or [])
    given = session.with_drafter([*flags, *context.args], drafter, model, settings.max_k)
    drafts = drafter != session.SEARCH
    if drafts:
        if policy != BASELINE:
            raise ConfigError(
                f"--policy {policy} with --drafter {drafter}: drafts are recorded at every place, "
                "so none is verified; drop --policy"
            )
        policy = f"static:0[ahead={settings.max_k}]"
    asked = workloads.mix(workloads.read(files), prompts_per_task)
    support.check_version()
    session.make_folder(out.parent)
    folder, local_name = find_model(model)
    requests = tuple(
        Request(f"mc-{0:08x}-{i:05d}", prompt, seed + i, drawn=False)
        for i, prompt in enumerate(asked)
    )
    block = Block("record", "record", policy, temperature, concurrency, 0, requests)
    with tempfile.TemporaryDirectory(prefix="moecascade-") as scratch:
        log = Path(scratch) / "traces.jsonl"
        planned = command.plan(
            folder,
            ["--host", session.HOST, "--port", str(server.free_port()), *given],
            max_k=None if session.chooses_drafter(given) else settings.max_k,
            trace_log=log,
            trace_drafts=drafts,
            local_name=local_name,
        )
        with session.progress(Console(stderr=True)) as shown:
            bar = shown.add_task(f"{model}: starting vLLM", total=None)
            with server.Server(planned, out.with_suffix(".server.log")) as running:
                running.wait_ready()
                shown.update(bar, description=f"{model}: recording", total=len(requests))

                async def send() -> None:
                    async with runner.client(planned.url) as http:
                        await runner.send(
                            {BASELINE: http},
                            planned.model,
                            block,
                            max_tokens,
                            lambda _request: shown.advance(bar),
                        )

                left_out: set[str] = set()
                try:
                    asyncio.run(send())
                except TooLongError as error:  # all others have been answered
                    left_out.update(str(error).split(", "))
                    shown.console.print(f"Left out, too long for the model: {escape(str(error))}")
            # The server has ended, so its log is whole.
        kept = tuple(request for request in requests if request.prompt.id not in left_out)
        lines = _lines(log, kept, out.with_suffix(".server.log"))
    write_whole(out, "".join(lines))
    print(f"Recorded {len(lines)} requests in {out}. Replay them: moecascade replay {out}")


def files_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the prompt files, and vLLM's flags, which may follow them."""
    files = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return files, list(arguments[len(files) :])


def _lines(log: Path, requests: tuple[Request, ...], said: Path) -> list[str]:
    """Return the traces in the order of the requests, under the names of their prompts."""
    found = {}
    for _, row in records(log):
        if match := MARK.search(row["id"]):
            found[match.group()] = row
    lines = []
    for request in requests:
        if request.id not in found:
            raise SetupError(
                f"the server kept no trace of {request.prompt.id!r}; see its log, {said}"
            )
        row = {**found[request.id], "id": request.prompt.id, "task": request.prompt.task}
        lines.append(json_line(row))
    return lines
