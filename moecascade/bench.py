"""Measuring policies on a real server: the plan, the sending, and the rows that come of it.

A *block* is a few prompts under one policy, sent with a given number of requests in flight; with
one in flight it is one prompt. A *round* is the same prompts under every policy, block after block,
in an order that rotates from round to round, so that whatever drifts (clock speed, caches, what a
policy has learnt) meets all of them alike. Rounds of different temperatures and concurrencies
alternate, so that a run that ends early is a smaller run of the same shape; each begins elsewhere
among the prompts, so that no policy has just answered what it is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecascade import launch, luck, policies
from moecascade.client import Reply, chat
from moecascade.errors import ConfigError
from moecascade.replay import Conditions
from moecascade.rows import BASELINE, PLAIN, Row, Steps, from_json, tally
from moecascade.workloads import Prompt

if TYPE_CHECKING:
    import httpx

WARM_UP_TOKENS = 24
WARM_UP_AT_ONCE = 8  # requests in flight of those that policies are to learn from
BLOCK = 2  # prompts of a block for each request in flight, where there is more than one
ORDER = 2  # of sending; changed with it, so that no run goes on in another
DRAWN = 2  # prompts of each task whose steps are kept, to be drawn


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        policies: Specs of the policies. The baseline is added where it is missing. `rows.PLAIN`
            stands for a server without plugin and speculation.
        temperatures: Of sampling; 0 is greedy.
        concurrencies: Requests in flight at once.
        max_tokens: The longest answer.
        seed: Of sampling; the prompt's number is added to it.
    """

    policies: tuple[str, ...] = ("off", "static:1", "static:3", "static:8", "cascade", "marginal")
    temperatures: tuple[float, ...] = (0.0,)
    concurrencies: tuple[int, ...] = (1,)
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; ConfigError names the first that is wrong."""
        for spec in self.policies:
            if spec != PLAIN:
                policies.create(spec, policies.ANY_K)
        for name in ("policies", "temperatures", "concurrencies"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"no {name}: give at least one")
            if len(set(values)) < len(values):
                shown = ",".join(str(value) for value in values)
                raise ConfigError(f"{name} {shown}: name each only once")
        if self.max_tokens < 2:
            raise ConfigError(f"{self.max_tokens} tokens: give at least 2, for there to be a rate")
        if min(self.temperatures) < 0:
            raise ConfigError(f"temperature {min(self.temperatures)}: give 0 (greedy) or more")
        if min(self.concurrencies) < 1:
            raise ConfigError(f"concurrency {min(self.concurrencies)}: give 1 or more")

    @property
    def measured(self) -> tuple[str, ...]:
        """The policies with the baseline among them."""
        return self.policies if BASELINE in self.policies else (BASELINE, *self.policies)

    @property
    def conditions(self) -> int:
        """How many conditions each model is measured under."""
        return len(self.temperatures) * len(self.concurrencies)

    @property
    def max_k(self) -> int:
        """The longest draft that the policies need, at least the default drafter's."""
        longest = [
            int(spec.partition(":")[2]) for spec in self.policies if spec.startswith("static:")
        ]
        return max([int(launch.DRAFTER["num_speculative_tokens"]), *longest])


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt under a policy.

    Attributes:
        id: Its name in the step log.
        prompt: What is asked.
        seed: Seed of its sampling.
        drawn: Whether its steps are kept.
    """

    id: str
    prompt: Prompt
    seed: int
    drawn: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Requests that run together under one policy; see `rows.Row` for the names."""

    id: str
    policy: str
    temperature: float
    concurrency: int
    place: int
    requests: tuple[Request, ...]


def turned(prompts: Sequence[Prompt], part: int, parts: int) -> list[Prompt]:
    """Return the prompts from that part of them on, then the others; tasks take the same turns."""
    tasks = len({prompt.task for prompt in prompts})
    start = len(prompts) * part // parts // tasks * tasks
    return [*prompts[start:], *prompts[:start]]


def plan(model: str, given: Sequence[Prompt], settings: Settings) -> list[list[Block]]:
    """Return the rounds in the order of sending, each a list of blocks.

    Names follow from what is asked for, so that a run that was interrupted can find its place.
    """
    what = json.dumps([ORDER, model, asdict(settings), [asdict(p) for p in given]])
    run = hashlib.sha256(what.encode()).hexdigest()[:8]
    tasks = list(dict.fromkeys(prompt.task for prompt in given))
    number = iter(range(100_000))
    conditions = list(product(settings.temperatures, settings.concurrencies))
    by_condition = []
    for part, (temperature, concurrency) in enumerate(conditions):
        prompts = turned(given, part, len(conditions))
        first = {p.id for task in tasks for p in [q for q in prompts if q.task == task][:DRAWN]}
        rounds = []
        size = 1 if concurrency == 1 else BLOCK * concurrency
        for at in range(0, len(prompts) - len(prompts) % size, size):
            turn = at // size
            if size == 1:  # rotate within each task, and begin elsewhere for each
                task = prompts[at].task
                turn = sum(p.task == task for p in prompts[:at]) + tasks.index(task)
            blocks = []
            for place in range(len(settings.measured)):
                requests = tuple(
                    Request(
                        f"mc-{run}-{next(number):05d}",
                        prompt,
                        settings.seed + at + i,
                        concurrency == 1 and prompt.id in first,
                    )
                    for i, prompt in enumerate(prompts[at : at + size])
                )
                spec = settings.measured[(turn + place) % len(settings.measured)]
                blocks.append(
                    Block(requests[0].id, spec, temperature, concurrency, place, requests)
                )
            rounds.append(blocks)
        if not rounds:
            raise ConfigError(
                f"{len(prompts)} prompts are too few for {concurrency} in flight; "
                f"give at least {size}"
            )
        by_condition.append(rounds)
    return [blocks for turn in zip_longest(*by_condition) for blocks in turn if blocks]


async def warm_up(
    servers: Mapping[str, httpx.AsyncClient],
    model: str,
    settings: Settings,
    prompts: Sequence[Prompt] = (),
    tell: Callable[[str], None] = lambda _what: None,
) -> None:
    """Send a short request under each policy, and prompts under those that may learn, unmeasured.

    What happens once (code that is compiled, memory that is touched for the first time) is then
    over, and policies know what those of a server that has served for a while know.
    """
    for spec in settings.measured:
        most = max(settings.concurrencies)
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
    gate = asyncio.Semaphore(WARM_UP_AT_ONCE)

    async def one(spec: str, i: int, prompt: Prompt) -> None:
        async with gate:
            await chat(
                _client(servers, spec),
                model,
                prompt.prompt,
                request_id=f"warm-up-{spec}-prompt-{i}",
                max_tokens=settings.max_tokens,
                temperature=settings.temperatures[i % len(settings.temperatures)],
                xargs=_xargs(spec, prompt.task),
            )

    for spec in settings.measured:
        if spec not in (BASELINE, PLAIN) and not spec.startswith("static:"):
            tell(spec)
            await asyncio.gather(*(one(spec, i, prompt) for i, prompt in enumerate(prompts)))


async def send(
    servers: Mapping[str, httpx.AsyncClient],
    model: str,
    block: Block,
    settings: Settings,
    tell: Callable[[Request], None] = lambda _request: None,
) -> tuple[list[Reply], float]:
    """Send a block and return its answers and the seconds from its beginning to its end.

    Args:
        servers: Clients of the server with the plugin, under `BASELINE`, and of the one without,
            under `PLAIN`.
        model: The name under which they serve the model.
        block: What to send.
        settings: Length of answers.
        tell: Called with each request whose answer is whole.

    Raises:
        SetupError: The server refuses a request or fails.
    """
    gate = asyncio.Semaphore(block.concurrency)

    async def one(request: Request) -> Reply:
        async with gate:
            reply = await chat(
                _client(servers, block.policy),
                model,
                request.prompt.prompt,
                request_id=request.id,
                max_tokens=settings.max_tokens,
                temperature=block.temperature,
                seed=_seed(block, request),
                xargs=_xargs(block.policy, request.prompt.task),
            )
            tell(request)
            return reply

    began = time.perf_counter()
    replies = await asyncio.gather(*(one(request) for request in block.requests))
    return list(replies), time.perf_counter() - began


def client(url: str) -> httpx.AsyncClient:
    """Return a client for a server; answers may take ten minutes."""
    import httpx

    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600.0))


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
    steps: Mapping[str, Steps],
    references: Mapping[str, float],
    keep_text: bool,
) -> list[Row]:
    """Return a block's rows: the answers joined with the step log, and what their texts are worth.

    `references` are those of `luck.times`.
    """
    made = []
    for request, reply in zip(block.requests, replies, strict=True):
        median, p95, p99 = np.percentile(reply.gaps or (0.0,), [50, 95, 99]).tolist()
        made.append(
            Row(
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
                gaps=(median, p95, p99),
                finish_reason=reply.finish_reason,
                text=reply.text if keep_text else "",
                reference=references.get(request.id),
                **steps.get(request.id, Steps()).fields(request.drawn),
            )
        )
    return made


class Journal:
    """The rows of a run as they come, one JSON object a line, so that it can be interrupted.

    Args:
        path: The file; created with its folder where it is missing.
        about: What the run measures. A file about something else is refused.

    Raises:
        ConfigError: The file is about another run, or is none of ours.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Read what there is; a last line that was cut short is dropped."""
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"moecascade": "journal", **about})
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0].rstrip("\n") != head:
            raise ConfigError(
                f"{path} is of a run that measures something else; choose another folder with "
                "--out, or begin anew with --fresh"
            )
        self.rows = [from_json(json.loads(line)) for line in whole[1:]]
        text = "".join(whole) or head + "\n"
        if text != "".join(lines):
            path.write_text(text, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    @property
    def done(self) -> frozenset[str]:
        """The names of the requests that have been measured."""
        return frozenset(row.request for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append a block's rows."""
        self.rows.extend(rows)
        self._file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _nothing() -> Iterator[Mapping[str, Any]]:
    """Return the lines of a log that is not kept."""
    return iter(())


@dataclass(frozen=True, slots=True)
class Logs:
    """What servers write meanwhile. Each returns the lines since it was last called.

    Attributes:
        steps: The step log (`moecascade.steplog`).
        traces: The requests' traces with token ids (`moecascade.traces`), where their luck is to be
            known, and
        played: what they are replayed under for that.
    """

    steps: Callable[[], Iterator[Mapping[str, Any]]] = _nothing
    traces: Callable[[], Iterator[Mapping[str, Any]]] = _nothing
    played: Conditions | None = None

    def references(self) -> dict[str, float]:
        """Return `luck.times` of the requests that have ended since this was last called."""
        return luck.times(self.traces(), self.played) if self.played else {}


def measure(
    servers: Mapping[str, str],
    model: str,
    rounds: Sequence[Sequence[Block]],
    settings: Settings,
    journal: Journal,
    *,
    logs: Logs | None = None,
    deadline: float | None = None,
    keep_text: bool = False,
    tell: Callable[[Block], None] = lambda _block: None,
    warm: Sequence[Prompt] = (),
    tell_warm: Callable[[str], None] = lambda _spec: None,
) -> None:
    """Send all rounds that are not in the journal yet, and write their rows to it.

    Args:
        servers: Addresses, as `send` names them.
        model: The name under which they serve the model.
        rounds: From `plan`.
        settings: The same.
        journal: Where rows go.
        logs: What the servers write; nothing if None.
        deadline: No round begins that would end after this time of `time.monotonic`, if it took as
            long as the longest so far.
        keep_text: Whether rows hold the answers.
        tell: Called before each block.
        warm: Prompts that policies learn from before anything is measured: see `warm_up`.
        tell_warm: Called with each policy that begins to.

    Raises:
        SetupError: The server refuses a request or fails.
    """
    logs = logs or Logs()
    warming = partial(warm_up, model=model, settings=settings, prompts=warm, tell=tell_warm)
    asyncio.run(
        _measure(
            servers, model, rounds, settings, journal, logs, deadline, keep_text, tell, warming
        )
    )


async def _measure(
    servers: Mapping[str, str],
    model: str,
    rounds: Sequence[Sequence[Block]],
    settings: Settings,
    journal: Journal,
    logs: Logs,
    deadline: float | None,
    keep_text: bool,
    tell: Callable[[Block], None],
    warming: Callable[[Mapping[str, httpx.AsyncClient]], Awaitable[None]],
) -> None:
    done = journal.done
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(client(url)) for name, url in servers.items()
        }
        await warming(clients)
        longest = 0.0
        for blocks in rounds:
            began = time.monotonic()
            if deadline is not None and began + longest > deadline:
                return
            for block in blocks:
                tell(block)
                if block.id in done:
                    continue
                replies, seconds = await send(clients, model, block, settings)
                steps, references = tally(logs.steps()), logs.references()
                journal.add(rows_of(model, block, replies, seconds, steps, references, keep_text))
            longest = max(longest, time.monotonic() - began)


def model_facts(folder: str) -> dict[str, Any]:
    """Return the sizes of the model in a folder as its ``config.json`` gives them."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    wanted = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    moe = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return {name: config[name] for name in (*wanted, *moe) if name in config}
