"""A server under all that clients do to it, for half an hour.

    python benchmarks/soak.py [--minutes 30] [--model local] [--seed 0]

Serves a model in float32 with little KV cache and lets eight clients at it: every policy, caps,
temperatures, grammars, long and short answers, common beginnings (prefix caching), bad options,
streams that are left, clients that vanish; and now and then the engine is stopped for a moment.
The load changes its kind every sixth of the time.

Ends with a table, and with exit code 1 where something is not as it should be: a request that was
lost, a fault, something left behind, text of a greedy request that is not the one that the same
server gave without drafts before all began, memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moecascade.core.options import CONFIG_KEY
from moecascade.localmodel.locate import find_model
from moecascade.serving import command, server
from moecascade.serving.machine import caption, describe
from moecascade.serving.server import Server
from moecascade.telemetry.metrics import PREFIX

CLIENTS = 8
PHASES = 6
PAUSES = (0.3, 2.0)  # seconds that the engine stands still
PAUSE_EVERY = 30.0  # seconds
IDLE = 2.0  # seconds after which clients give a connection up; the server does after five
GREEDY = 24  # prompts whose text is known
GREEDY_TOKENS = 48
MOST_GROWTH = 1.0  # MB for a thousand requests
LONG = 10.0  # minutes after which growth can be told from warming up
BLOCKS = 14  # of the KV cache, 128 tokens each: room for eight short requests, not for long ones
POLICIES = ("marginal", "cascade", "off", "static:1", "static:3", "static:8", "goodput",
            "sglang-adaptive", "dynamic-table", "hf-heuristic", "bandit", "survival-budget",
            "cascade[backoff=1]", "marginal[crowd=2]")  # fmt: skip
BAD = ({"cascade_policy": "no-such"}, {"cascade_max_k": 99}, {"cascade_policy": "static:-1"},
       {"cascade_kmax": 1}, {"cascade_max_k": "3"})  # fmt: skip
BAD_OUTCOMES = ("failed", "status", "not refused", "report")
WORDS = range(100, 140)  # token ids that every model has; a text of few words repeats itself
COMMON = [random.Random(0).choice(WORDS) for _ in range(60)]  # what half of the prompts begin with


@dataclass
class Soak:
    """What is known of a run so far."""

    url: str
    model: str
    rng: random.Random
    texts: dict[tuple[int, ...], str] = field(
        default_factory=dict
    )  # of greedy requests without drafts
    outcomes: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests, MB of the engine
    pauses: int = 0

    def prompt(self) -> list[int]:
        """Return a prompt: half of them begin alike."""
        words = self.rng.choices(WORDS, k=self.rng.randint(3, 60))
        return (COMMON if self.rng.random() < 0.5 else []) + words


def body_of(soak: Soak, kind: str) -> dict[str, Any]:
    """Return a request of a kind of load."""
    rng = soak.rng
    xargs: dict[str, Any] = {}
    if rng.random() < 0.8:
        xargs["cascade_policy"] = rng.choice(POLICIES)
    if rng.random() < 0.2:
        xargs["cascade_max_k"] = rng.randint(0, 8)
    if rng.random() < 0.2:
        xargs["cascade_report"] = True
    long = {"long": 0.8, "short": 0.0}.get(kind, 0.15)
    body: dict[str, Any] = {
        "model": soak.model,
        "prompt": soak.prompt(),
        "max_tokens": rng.randint(150, 400) if rng.random() < long else rng.randint(1, 60),
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.3)),
        "ignore_eos": rng.random() < 0.5,
        "stream": rng.random() < 0.4,
        "vllm_xargs": xargs,
    }
    if rng.random() < 0.1:
        body["structured_outputs"] = rng.choice(
            ({"regex": "(red|green|blue)(, (red|green|blue)){3}"}, {"choice": ["one", "two"]})
        )
    if rng.random() < 0.1:
        body |= {"presence_penalty": 0.5, "logprobs": 2}
    if rng.random() < 0.1:
        body["n"] = 2
        body["temperature"] = 0.8
    return body


async def known(soak: Soak, http: httpx.AsyncClient) -> None:
    """Ask what was asked without drafts before; the text has to be the same."""
    prompt = soak.rng.choice(list(soak.texts))
    xargs = {"cascade_policy": soak.rng.choice(POLICIES)}
    got = await greedy(soak, http, prompt, xargs)
    if got != soak.texts[prompt]:
        soak.wrong.append(f"{xargs['cascade_policy']}: {soak.texts[prompt]!r} became {got!r}")
    soak.outcomes["finished, text compared"] += 1


async def greedy(
    soak: Soak, http: httpx.AsyncClient, prompt: Sequence[int], xargs: dict[str, Any]
) -> str:
    """Return the greedy text of a prompt."""
    body = {
        "model": soak.model,
        "prompt": list(prompt),
        "max_tokens": GREEDY_TOKENS,
        "temperature": 0,
    }
    answer = await http.post("/v1/completions", json={**body, "vllm_xargs": xargs})
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


async def leave(soak: Soak, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Read a little of a stream, then go away."""
    body |= {"stream": True, "max_tokens": 300, "ignore_eos": True}
    body.pop("structured_outputs", None)
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        left = soak.rng.randint(1, 10)
        async for _ in answer.aiter_lines():
            left -= 1
            if not left:
                break
    soak.outcomes["left by the client"] += 1


async def vanish(soak: Soak, body: dict[str, Any]) -> None:
    """Send a request and close the connection, without reading or saying anything."""
    port = int(soak.url.rsplit(":", 1)[1])
    text = json.dumps({**body, "stream": False, "max_tokens": 200}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text)
    await writer.drain()
    await asyncio.sleep(soak.rng.uniform(0.0, 1.0))
    writer.transport.abort()
    soak.outcomes["vanished"] += 1


async def ask(soak: Soak, http: httpx.AsyncClient, kind: str) -> None:
    """Send one request of whatever kind chance wants."""
    soak.sent += 1
    chance, body = soak.rng.random(), body_of(soak, kind)
    try:
        if chance < 0.15:
            await known(soak, http)
        elif chance < 0.25:
            await leave(soak, http, body)
        elif chance < 0.32:
            await vanish(soak, body)
        elif chance < 0.37:
            body["vllm_xargs"] = soak.rng.choice(BAD)
            answer = await http.post("/v1/completions", json=body)
            refused = answer.status_code == httpx.codes.BAD_REQUEST
            soak.outcomes["refused, as it should be" if refused else "not refused"] += 1
        else:
            answer = await http.post("/v1/completions", json=body)
            soak.outcomes[f"status {answer.status_code}" if answer.is_error else "finished"] += 1
            if not answer.is_error and not body["stream"]:
                asked = "cascade_report" in body["vllm_xargs"]
                if ("cascade" in answer.json()) is not asked:
                    soak.outcomes["report missing or unasked"] += 1
    except httpx.HTTPError as error:
        soak.outcomes[f"failed: {type(error).__name__}"] += 1


async def client(
    soak: Soak, http: httpx.AsyncClient, number: int, began: float, ends: float
) -> None:
    """Be one client until the end; some phases have fewer clients."""
    while (now := time.monotonic()) < ends:
        phase = int(PHASES * (now - began) / (ends - began))
        if phase % 3 == 1 and number >= 2:
            await asyncio.sleep(0.2)  # two clients for a while
            continue
        await ask(soak, http, ("mixed", "short", "long")[phase % 3])


async def disturb(soak: Soak, engine: psutil.Process, ends: float) -> None:
    """Stop the engine now and then; read its memory."""
    stop = time.monotonic() + PAUSE_EVERY / 2
    while (now := time.monotonic()) < ends:
        await asyncio.sleep(1.0)
        soak.memory.append((soak.sent, engine.memory_full_info().uss / 1e6))
        if now > stop:
            engine.suspend()
            await asyncio.sleep(soak.rng.uniform(*PAUSES))
            engine.resume()
            soak.pauses += 1
            stop = now + PAUSE_EVERY


async def run(soak: Soak, engine: psutil.Process, seconds: float, console: Console) -> None:
    """Let all of them at the server."""
    limits = httpx.Limits(keepalive_expiry=IDLE)
    async with httpx.AsyncClient(base_url=soak.url, timeout=300, limits=limits) as http:
        for _ in range(GREEDY):
            prompt = tuple(soak.prompt())
            soak.texts[prompt] = await greedy(soak, http, prompt, {"cascade_policy": "off"})
        soak.sent = 0
        began = time.monotonic()
        ends = began + seconds
        everybody = asyncio.gather(
            disturb(soak, engine, ends),
            *(client(soak, http, number, began, ends) for number in range(CLIENTS)),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("soaking", total=seconds)
            while not everybody.done():
                said = f"{soak.sent} requests, {len(soak.wrong)} wrong"
                passed = min(seconds, time.monotonic() - began)
                progress.update(task, completed=passed, description=said)
                await asyncio.sleep(0.5)
        await everybody


def counted(url: str, name: str) -> float:
    """Return the sum of one of our metrics."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)


def growth(memory: list[tuple[int, float]]) -> float:
    """Return MB for a thousand requests, by the second half of the run."""
    rest = memory[len(memory) // 2 :]
    return 1000 * statistics.linear_regression([n for n, _ in rest], [mb for _, mb in rest]).slope


def rows(soak: Soak, minutes: float, console: Console) -> bool:
    """Print the table; return whether all is as it should be."""
    deadline = time.monotonic() + 30
    while counted(soak.url, f"{PREFIX}requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    accounted = soak.outcomes.total()
    bad = {
        k: n for k, n in soak.outcomes.items() if k.startswith(("failed", "status", "not", "rep"))
    }
    running = counted(soak.url, f"{PREFIX}requests_running")
    faults = counted(soak.url, f"{PREFIX}faults_total")
    compared = soak.outcomes["finished, text compared"]
    grows = growth(soak.memory)
    checks = [
        ("requests sent", f"{soak.sent}", True),
        *((f"  {what}", f"{n}", what not in bad) for what, n in sorted(soak.outcomes.items())),
        ("not accounted for", f"{soak.sent - accounted}", soak.sent == accounted),
        (
            "greedy texts unlike those without drafts",
            f"{len(soak.wrong)} of {compared}",
            not soak.wrong,
        ),
        ("times that the engine was stopped", f"{soak.pauses}", True),
        ("preemptions", f"{counted(soak.url, 'vllm:num_preemptions_total'):.0f}", True),
        ("requests that the controller still knows", f"{running:.0f}", not running),
        ("faults", f"{faults:.0f}", not faults),
        ("policies kept", f"{counted(soak.url, f'{PREFIX}policies'):.0f}", True),
        (
            "engine's memory, MB for 1,000 requests",
            f"{grows:+.2f}" + ("" if minutes >= LONG else ", too short to judge"),
            minutes < LONG or grows < MOST_GROWTH,
        ),
    ]
    table = Table(title="Soak")
    for name in ("what", "result", ""):
        table.add_column(name, justify="right" if name == "result" else "left")
    for what, result, good in checks:
        table.add_row(what, result, "" if good else "[bold red]wrong[/]")
    console.print(table)
    for text in soak.wrong[:10]:
        console.print(f"unlike: {text}", markup=False)
    console.print(f"machine: {caption(describe())}, {time.strftime('%Y-%m-%d')}")
    return all(good for *_, good in checks)


def main() -> None:
    """Serve, soak, say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--model", default="local", help="a local model's name, or a folder")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do (default 0)")
    asked = parser.parse_args()
    console = Console()
    path, name = find_model(asked.model, build=True)
    config = {CONFIG_KEY: {"live_page": True}}
    planned = command.plan(
        path,
        ["--host", "127.0.0.1", "--port", str(server.free_port()), "--dtype", "float32",
         "--max-num-seqs", str(CLIENTS), "--max-model-len", "1024",
         "--num-gpu-blocks-override", str(BLOCKS), "--enable-prefix-caching",
         "--additional-config", json.dumps(config)],
        local_name=name,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="moecascade-soak-") as scratch:
        with Server(planned, Path(scratch) / "server.log") as running:
            console.print("starting the server")
            running.wait_ready(600)
            family = psutil.Process(running.process_id).children(recursive=True)
            engine = next(p for p in family if "EngineCore" in " ".join(p.cmdline()))
            soak = Soak(running.launch.url, planned.model, random.Random(asked.seed))
            asyncio.run(run(soak, engine, 60 * asked.minutes, console))
            good = rows(soak, asked.minutes, console)
        left = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    if left:
        console.print(f"processes left behind: {len(left)}")
    sys.exit(0 if good and not left else 1)


if __name__ == "__main__":
    main()
