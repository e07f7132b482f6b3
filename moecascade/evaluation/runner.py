"""Measuring a plan on a real server: the sending, and the rows that come of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecascade.core import registry
from moecascade.errors import SetupError, TooLongError
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.client import Reply, chat
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row, Step, summed, tally
from moecascade.evaluation.schedule import Block, Plan, Request
from moecascade.evaluation.workloads import Prompt
from moecascade.serving import command

if TYPE_CHECKING:
    import httpx

OURSELVES = ("127.0.0.1", "localhost", "::1")
WARM_UP_TOKENS = 24


async def warm_up(
    servers: Mapping[str, httpx.AsyncClient],
    model: str,
    plan: Plan,
    tell: Callable[[str], None] = lambda _spec: None,
) -> None:
    """Send a short request under each policy, and prompts under those that learn, unmeasured.

    What happens once (code that is compiled, memory that is touched for the first time) is then
    over, and policies know what those of a server that has served for a while know. As many are in
    flight as will be: some policies learn what holds for one batch size alone.
    """
    settings = plan.settings
    most = max(settings.concurrencies)
    for spec in settings.measured:
        await asyncio.gather(
            *(
                chat(
                    _client(servers, spec),
                    model,
                    "Count from one to ten, twice.",
                    request_id=f"warm-up-{spec}-{i}",
                    max_tokens=WARM_UP_TOKENS,
                    xargs=_xargs(spec, ""),
                )
                for i in range(most)
            )
        )
    gate = asyncio.Semaphore(most)

    async def one(spec: str, i: int, prompt: Prompt) -> None:
        async with gate:
            with suppress(TooLongError):
                await chat(
                    _client(servers, spec),
                    model,
                    prompt.messages,
                    request_id=f"warm-up-{spec}-prompt-{i}",
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperatures[i % len(settings.temperatures)],
                    xargs=_xargs(spec, prompt.task),
                )

    for spec in settings.measured if plan.warm else ():
        if spec != PLAIN and registry.learns(spec):
            tell(spec)
            await asyncio.gather(*(one(spec, i, prompt) for i, prompt in enumerate(plan.warm)))


async def send(
    servers: Mapping[str, httpx.AsyncClient],
    model: str,
    block: Block,
    max_tokens: int,
    tell: Callable[[Request], None] = lambda _request: None,
) -> tuple[list[Reply], float]:
    """Send a block and return its answers and the seconds from its beginning to its end.

    Args:
        servers: Clients of the server with the plugin, under `BASELINE`, and of the one without,
            under `PLAIN`.
        model: The name under which they serve the model.
        block: What to send.
        max_tokens: The longest answer.
        tell: Called with each request whose answer is whole.

    Raises:
        SetupError: The server refuses a request or fails; TooLongError, which names the prompts,
            where some do not fit into the model's context. No request is in flight any more then.
    """
    gate = asyncio.Semaphore(block.concurrency)

    async def one(request: Request) -> Reply:
        async with gate:
            reply = await chat(
                _client(servers, block.policy),
                model,
                request.prompt.messages,
                request_id=request.id,
                max_tokens=max_tokens,
                temperature=block.temperature,
                seed=_seed(block, request),
                xargs=_xargs(block.policy, request.prompt.task),
            )
            tell(request)
            return reply

    began = time.perf_counter()
    sent = (one(request) for request in block.requests)
    answers = await asyncio.gather(*sent, return_exceptions=True)
    seconds = time.perf_counter() - began
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    if any(not isinstance(fault, TooLongError) for fault in faults):
        raise next(fault for fault in faults if not isinstance(fault, TooLongError))
    if faults:
        both = zip(block.requests, answers, strict=True)
        names = [r.prompt.id for r, answer in both if isinstance(answer, TooLongError)]
        raise TooLongError(", ".join(names))
    return [answer for answer in answers if isinstance(answer, Reply)], seconds


def client(url: str) -> httpx.AsyncClient:
    """Return a client for a server; answers may take ten minutes, any number may be in flight.

    What is on this machine is not asked for through a proxy.
    """
    import httpx

    return httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(600.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=httpx.URL(url).host not in OURSELVES,
    )


def _client(servers: Mapping[str, httpx.AsyncClient], spec: str) -> httpx.AsyncClient:
    return servers[PLAIN if spec == PLAIN else BASELINE]


def _seed(block: Block, request: Request) -> int | None:
    """Return the seed to send. vLLM 0.32 on a CPU fails where a seeded prompt comes in parts."""
    return request.seed if block.temperature and block.concurrency == 1 else None


def _xargs(spec: str, task: str) -> dict[str, str]:
    return {} if spec == PLAIN else {"cascade_policy": spec, "cascade_task": task}


def rows_of(
    model: str,
    block: Block,
    replies: Sequence[Reply],
    seconds: float,
    steps: Mapping[str, Sequence[Step]],
    keep_text: bool,
) -> list[Row]:
    """Return a block's rows: the answers joined with the step log."""
    made = []
    for request, reply in zip(block.requests, replies, strict=True):
        gaps = tuple(np.percentile(reply.gaps, [50, 95, 99]).tolist()) if reply.gaps else None
        made.append(
            Row(
                run=block.run,
                request=request.id,
                model=model,
                prompt=request.prompt.id,
                task=request.prompt.task,
                policy=block.policy,
                temperature=block.temperature,
                concurrency=block.concurrency,
                block=block.id,
                block_seconds=seconds,
                place=block.place,
                seed=request.seed,
                prompt_tokens=reply.prompt_tokens,
                tokens=reply.tokens,
                decoded=reply.decoded,
                first_seconds=reply.first_seconds,
                decode_seconds=reply.decode_seconds,
                gaps=gaps,
                finish_reason=reply.finish_reason,
                text=reply.text if keep_text else "",
                engine=summed(steps.get(request.id, ()), request.drawn),
            )
        )
    return made


def _nothing() -> Iterator[Mapping[str, Any]]:
    """Return the lines of a log that is not kept."""
    return iter(())


def measure(
    servers: Mapping[str, str],
    model: str,
    plan: Plan,
    journal: Journal,
    *,
    log: Callable[[], Iterator[Mapping[str, Any]]] = _nothing,
    deadline: float | None = None,
    keep_text: bool = False,
    tell: Callable[[str, int], None] = lambda _what, _sent: None,
) -> list[str]:
    """Send all rounds of a plan that are not in the journal yet, and write their rows to it.

    Args:
        servers: Addresses, as `send` names them.
        model: The name under which they serve the model.
        plan: What is sent.
        journal: Where rows go.
        log: Returns the lines of the step log (`telemetry.step_log`) since it was last called.
        deadline: No round but the first begins that would end after this time of
            `time.monotonic`, if it took as long as the longest so far.
        keep_text: Whether rows hold the answers.
        tell: Called with what is done next, and how many blocks there have been.

    Returns:
        The prompts that do not fit into the model's context; rounds that hold them are left out.

    Raises:
        ConfigError: There are fewer prompts than requests in flight.
        SetupError: The server refuses a request or fails.
    """
    return asyncio.run(_measure(servers, model, plan, journal, log, deadline, keep_text, tell))


async def _measure(
    urls: Mapping[str, str],
    model: str,
    plan: Plan,
    journal: Journal,
    log: Callable[[], Iterator[Mapping[str, Any]]],
    deadline: float | None,
    keep_text: bool,
    tell: Callable[[str, int], None],
) -> list[str]:
    rounds, done = plan.rounds(model), journal.done
    left_out: list[str] = []
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(client(url)) for name, url in urls.items()}
        await warm_up(servers, model, plan, lambda spec: tell(f"warming up {spec}", 0))
        sent, longest = 0, 0.0
        for blocks in rounds:
            began = time.monotonic()
            if deadline is not None and longest and began + longest > deadline:
                break
            whole = True
            for block in blocks:
                tell(f"{block.requests[0].prompt.id} under {block.policy}", sent)
                sent += 1
                if block.id in done:
                    whole = False
                    continue
                try:
                    replies, seconds = await send(servers, model, block, plan.settings.max_tokens)
                except TooLongError as error:  # under the other policies as well
                    left_out.append(str(error))
                    break
                steps = tally(log())
                journal.add(rows_of(model, block, replies, seconds, steps, keep_text))
            if whole:  # else it says nothing about how long one takes
                longest = max(longest, time.monotonic() - began)
    tell("measured", sent)
    return list(dict.fromkeys(left_out))


def check_plugin(url: str, model: str) -> None:
    """Raise SetupError where a server does not choose by our policies: all would look alike there.

    One with the plugin and `moecascade.vllm.http` refuses a policy that does not exist.
    """

    async def ask() -> None:
        async with client(url) as http:
            xargs = {"cascade_policy": "?"}
            await chat(http, model, "Hello", request_id="check", max_tokens=2, xargs=xargs)

    try:
        asyncio.run(ask())
    except SetupError as error:
        if "unknown policy" in str(error):
            return
        raise
    raise SetupError(
        f"the server at {url} accepts a policy that does not exist, so it runs without the plugin "
        "or without its request check; start it with 'moecascade serve', or with "
        f"--scheduler-cls {command.SCHEDULER} --middleware {command.MIDDLEWARE}"
    )


def model_facts(folder: str) -> dict[str, Any]:
    """Return the sizes of the model in a folder as its ``config.json`` gives them."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8-sig"))
    wanted = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    moe = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return {name: config[name] for name in (*wanted, *moe) if name in config}
