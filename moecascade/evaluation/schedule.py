"""What is measured, and in which order it is sent.

A *block* is a few prompts under one policy, sent with a given number of requests in flight; with
one in flight it is one prompt. A *round* is the same prompts under every policy, block after block,
in an order that rotates from round to round, so that whatever drifts (clock speed, caches, what a
policy has learnt) meets all of them alike. Rounds of different temperatures and concurrencies
alternate, so that a run that ends early is a smaller run of the same shape; each begins elsewhere
among the prompts, so that no policy has just answered what it is asked. With another seed all begin
elsewhere again, so that runs that end early add up.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, product, zip_longest

from moecascade.core import registry
from moecascade.errors import ConfigError
from moecascade.evaluation.request_record import BASELINE, PLAIN
from moecascade.evaluation.workloads import Prompt
from moecascade.serving import command

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
        seed: Of sampling; the prompt's number is added to it. Of where among the prompts it begins.
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
                registry.settings_for(spec, registry.ANY_K)
        for name in ("policies", "temperatures", "concurrencies"):
            _check_list(name, getattr(self, name))
        if self.max_tokens < 2:
            raise ConfigError(
                f"answers of {self.max_tokens} tokens (--max-tokens): give at least 2, for there "
                "to be a rate"
            )
        for temperature in self.temperatures:
            if not 0 <= temperature < math.inf:
                raise ConfigError(
                    f"temperature {temperature} (--temperatures): give 0 (greedy) or more"
                )
        for name, value, least in (
            ("concurrency", min(self.concurrencies), 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} {value} (--{name}): give {least} or more")

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
        return max([int(command.DRAFTER["num_speculative_tokens"]), *longest])


def _check_list(name: str, values: Sequence[object]) -> None:
    """Refuse an empty list and one with repetitions."""
    if not values:
        raise ConfigError(f"no {name}: give at least one")
    if len(set(values)) < len(values):
        shown = ",".join(str(value) for value in values)
        raise ConfigError(f"{name} {shown}: name each only once")


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
    run: str
    policy: str
    temperature: float
    concurrency: int
    place: int
    requests: tuple[Request, ...]


def turned(prompts: Sequence[Prompt], part: float, parts: int) -> list[Prompt]:
    """Return the prompts from that part of them on, then the others; tasks take the same turns."""
    tasks = len({prompt.task for prompt in prompts})
    start = int(len(prompts) * part / parts) // tasks * tasks
    return [*prompts[start:], *prompts[:start]]


def spread(seed: int) -> float:
    """Return 0, 1/2, 1/4, 3/4, 1/8, ... for the seeds from 0 on: each far from those before.

    That is van der Corput's sequence: the seed's binary digits, read backwards after the point.
    """
    return int(f"{seed:b}"[::-1], 2) / (1 << seed.bit_length())


@dataclass(frozen=True, slots=True)
class Plan:
    """Prompts under conditions.

    Attributes:
        prompts: What is asked, tasks in turn.
        settings: Under which policies and conditions.
        warm: Prompts that policies learn from before anything is measured.
        part: Which it is of the plans for several models.
    """

    prompts: Sequence[Prompt]
    settings: Settings
    warm: Sequence[Prompt] = ()
    part: int = 0

    @property
    def digest(self) -> str:
        """What is asked and in which order, in a few signs: other prompts, another digest."""
        asked = [asdict(prompt) for prompt in (*self.prompts, *self.warm)]
        return hashlib.sha256(json.dumps([ORDER, asked]).encode()).hexdigest()[:8]

    def turned(self, part: int, parts: int) -> Plan:
        """Return the plan for one of several models, each beginning at prompts of its own.

        Where a run ends early it has then asked as many as it can: a model begins between the
        places where the conditions of another do, and with another seed between all those.
        """
        begin = part + spread(self.settings.seed)
        prompts = turned(self.prompts, begin, parts * self.settings.conditions)
        return replace(self, prompts=prompts, part=part)

    def rounds(self, model: str) -> list[list[Block]]:
        """Return the rounds in the order of sending, each a list of blocks.

        Names follow from what is asked for, so that a run that was interrupted can find its place.

        Raises:
            ConfigError: There are fewer prompts than requests in flight.
        """
        asked = [asdict(prompt) for prompt in self.prompts]
        what = json.dumps([ORDER, model, self.part, asdict(self.settings), asked])
        run = hashlib.sha256(what.encode()).hexdigest()[:8]
        names = (f"mc-{run}-{number:05d}" for number in count())
        conditions = list(product(self.settings.temperatures, self.settings.concurrencies))
        by_condition = [
            self._rounds(run, turned(self.prompts, part, len(conditions)), *condition, names)
            for part, condition in enumerate(conditions)
        ]
        return [blocks for turn in zip_longest(*by_condition) for blocks in turn if blocks]

    def _rounds(
        self,
        run: str,
        prompts: Sequence[Prompt],
        temperature: float,
        concurrency: int,
        names: Iterator[str],
    ) -> list[list[Block]]:
        """Return the rounds of one condition."""
        specs = self.settings.measured
        tasks = list(dict.fromkeys(prompt.task for prompt in self.prompts))
        drawn = {p.id for task in tasks for p in [q for q in prompts if q.task == task][:DRAWN]}
        size = 1 if concurrency == 1 else BLOCK * concurrency
        if len(prompts) < size:
            raise ConfigError(
                f"{len(prompts)} prompts are too few for {concurrency} in flight; "
                f"give at least {size}"
            )
        rounds = []
        for at in range(0, len(prompts) - len(prompts) % size, size):
            turn = at // size
            if size == 1:  # rotate within each task, and begin elsewhere for each
                task = prompts[at].task
                turn = sum(p.task == task for p in prompts[:at]) + tasks.index(task)
            blocks = []
            for place in range(len(specs)):
                requests = tuple(
                    Request(
                        next(names),
                        prompt,
                        self.settings.seed + at + i,
                        concurrency == 1 and prompt.id in drawn,
                    )
                    for i, prompt in enumerate(prompts[at : at + size])
                )
                spec = specs[(turn + place) % len(specs)]
                blocks.append(
                    Block(requests[0].id, run, spec, temperature, concurrency, place, requests)
                )
            rounds.append(blocks)
        return rounds
