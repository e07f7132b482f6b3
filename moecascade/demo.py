"""The demo: the same prompts under several policies on a real server, one request at a time.

For each prompt the policies follow each other, in an order that rotates from prompt to prompt, so
that whatever drifts (clock speed, cache, what a policy has learnt) meets all of them alike.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecascade import launch, policies, prompts
from moecascade.client import Reply, chat
from moecascade.errors import ConfigError
from moecascade.prompts import Prompt
from moecascade.summary import BASELINE, Row

WARM_UP_TOKENS = 24
_MARK = re.compile(r"mc-[0-9a-f]{8}-[0-9]{4}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo measures.

    Attributes:
        policies: Specs of the policies. The baseline is added where it is missing.
        prompts_per_task: Prompts of each task.
        max_tokens: The longest answer.
        temperature: 0 for greedy.
        seed: The prompt's number is added to it.
    """

    policies: tuple[str, ...] = ("off", "static:1", "static:3", "static:8", "cascade")
    prompts_per_task: int = 6
    max_tokens: int = 96
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; ConfigError names the first that is wrong."""
        for spec in self.policies:
            policies.create(spec, policies.ANY_K)
        if len(set(self.policies)) < len(self.policies):
            raise ConfigError(f"policies {','.join(self.policies)}: name each only once")
        if self.max_tokens < 2:
            raise ConfigError(f"{self.max_tokens} tokens: give at least 2, for there to be a rate")
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature}: give 0 (greedy) or more")
        prompts.mix(self.prompts_per_task)

    @property
    def measured(self) -> tuple[str, ...]:
        """The policies with the baseline among them."""
        return self.policies if BASELINE in self.policies else (BASELINE, *self.policies)

    @property
    def max_k(self) -> int:
        """The longest draft that the policies need, at least the default drafter's."""
        longest = [
            int(spec.partition(":")[2]) for spec in self.policies if spec.startswith("static:")
        ]
        return max([int(launch.DRAFTER["num_speculative_tokens"]), *longest])


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the plan: a prompt under a policy.

    Attributes:
        id: Its name in the step log.
        prompt: What is asked.
        policy: Spec of the policy.
        place: Which it is among the policies on this prompt, from 0.
        seed: Seed of its sampling.
    """

    id: str
    prompt: Prompt
    policy: str
    place: int
    seed: int


def plan(asked: Sequence[Prompt], settings: Settings) -> list[Request]:
    """Return the requests in the order of sending.

    The order of policies moves on by one with each prompt of a task, and starts elsewhere for each
    task, so that every policy takes every place equally often where there are prompts enough.
    """
    run = uuid.uuid4().hex[:8]
    requests: list[Request] = []
    tasks = list(dict.fromkeys(prompt.task for prompt in asked))
    seen = dict.fromkeys(tasks, 0)
    for number, prompt in enumerate(asked):
        turn = seen[prompt.task] + tasks.index(prompt.task)
        seen[prompt.task] += 1
        specs = settings.measured
        for place in range(len(specs)):
            spec = specs[(turn + place) % len(specs)]
            name = f"mc-{run}-{len(requests):04d}"
            requests.append(Request(name, prompt, spec, place, settings.seed + number))
    return requests


async def measure(
    url: str,
    model: str,
    requests: Sequence[Request],
    settings: Settings,
    tell: Callable[[Request | None], None] = lambda _request: None,
) -> list[tuple[Request, Reply]]:
    """Send the requests one after the other and return the answers.

    A short request under each policy goes first, unmeasured, so that what happens once (code that
    is compiled, memory that is touched for the first time) is not counted.

    Args:
        url: The server's address.
        model: The name under which it serves the model.
        requests: The plan.
        settings: Length and temperature of answers.
        tell: Called before each request, with None for those of the warm-up.

    Raises:
        SetupError: The server refuses a request or fails.
    """
    return [pair async for pair in _answers(url, model, requests, settings, tell)]


async def _answers(
    url: str,
    model: str,
    requests: Sequence[Request],
    settings: Settings,
    tell: Callable[[Request | None], None],
) -> AsyncIterator[tuple[Request, Reply]]:
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600.0)) as http:
        for spec in settings.measured:
            tell(None)
            await chat(
                http,
                model,
                "Count from one to ten, twice.",
                request_id=f"warm-up-{spec}",
                max_tokens=WARM_UP_TOKENS,
                xargs={"cascade_policy": spec},
            )
        for request in requests:
            tell(request)
            reply = await chat(
                http,
                model,
                request.prompt.prompt,
                request_id=request.id,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=request.seed,
                xargs={"cascade_policy": request.policy},
            )
            yield request, reply


@dataclass(slots=True)
class Steps:
    """Sums over a request's decode steps; see `moecascade.summary.Row`."""

    steps: int = 0
    emitted: int = 0
    drafted: int = 0
    k_total: int = 0
    steps_at_0: int = 0
    step_seconds: float = 0.0

    def add(self, part: Mapping[str, Any], seconds: float | None) -> None:
        """Count one step that took `seconds`."""
        self.steps += 1
        self.emitted += part["emitted"]
        self.drafted += part["drafted"]
        self.k_total += part["k"]
        self.steps_at_0 += part["k"] == 0
        self.step_seconds += seconds or 0.0


def tally(log: Iterable[Mapping[str, Any]]) -> dict[str, Steps]:
    """Return the sums of a step log by our names of requests; steps with prefill do not count.

    vLLM wraps the name that a client gives (``chatcmpl-NAME-1f2e3d4c``), so it is searched for.
    """
    found: dict[str, Steps] = {}
    for step in log:
        if not step["decode"]:
            continue
        for part in step["requests"]:
            if match := _MARK.search(part["id"]):
                found.setdefault(match.group(), Steps()).add(part, step["seconds"])
    return found


def rows(answers: Sequence[tuple[Request, Reply]], steps: Mapping[str, Steps]) -> list[Row]:
    """Return what was measured, answers joined with the step log."""
    joined = []
    for request, reply in answers:
        seen = steps.get(request.id, Steps())
        joined.append(
            Row(
                request=request.id,
                prompt=request.prompt.id,
                task=request.prompt.task,
                policy=request.policy,
                place=request.place,
                seed=request.seed,
                prompt_tokens=reply.prompt_tokens,
                tokens=reply.tokens,
                decoded=reply.decoded,
                first_seconds=reply.first_seconds,
                decode_seconds=reply.decode_seconds,
                finish_reason=reply.finish_reason,
                steps=seen.steps,
                emitted=seen.emitted,
                drafted=seen.drafted,
                k_total=seen.k_total,
                steps_at_0=seen.steps_at_0,
                step_seconds=seen.step_seconds,
                text=reply.text,
            )
        )
    return joined


def model_facts(folder: str) -> dict[str, Any]:
    """Return the sizes of the model in a folder as its ``config.json`` gives them."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    wanted = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    moe = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return {name: config[name] for name in (*wanted, *moe) if name in config}
