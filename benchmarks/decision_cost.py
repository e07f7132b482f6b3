"""How long the controller takes for a step: decide and observe, per request.

    python benchmarks/decision_cost.py [--cold] [--only marginal]

Prints microseconds per request and step, the median over blocks of steps, for several batch sizes.
Every request has a draft of eight tokens in every step, which is more than drafters find, in a text
that repeats its phrases, as text with drafts does. Where drafts are not seen, K is decided a step
early, as with asynchronous scheduling: `searched` is a drafter that searches the text, `model` one
that does not. `--cold` touches 64 MB of other memory while each step runs: a model leaves nothing
of ours in the processor's caches, so this is what an engine sees.

With warm caches one request is to take 20 microseconds, a batch of 256 less than 300 in all, and
the paper's policy less than 30 a request.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moecascade.core.controller import Controller
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.serving.machine import caption, describe


@dataclass(frozen=True)
class Case:
    """A policy, whether drafts are unseen, and what is known of the drafter.

    Attributes:
        policy: The spec.
        unseen: Whether K is decided without seeing the draft, a step early.
        facts: What the engine tells of the drafter.
        asks: Whether the drafter is told how far to draft, as a model is.
    """

    policy: str
    unseen: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    asks: bool = False


CASES = {
    "off": Case("off"),
    "static:3": Case("static:3"),
    "cascade": Case("cascade"),
    "marginal": Case("marginal"),
    "marginal, unseen, searched": Case("marginal", True, {"search_min": 2, "search_max": 4}),
    "marginal, unseen, model": Case("marginal", True, asks=True),
}
BATCHES = (1, 8, 16, 64, 256)
BLOCKS = 30
STEPS, LEAST_STEPS = 2000, 20  # in a block: requests and steps together, and steps
COLD_STEPS = 20  # in a block with cold caches, all batches alike: a step takes 10 ms
SETTLED = 2000  # requests and steps together before the first block
OTHER_MEMORY = 64 << 20  # bytes
MAX_K = 8
PROMPT, OUTPUT = 400, 600  # tokens
RIGHT = 0.6  # chance that a token of a draft is right, given that those before it are


@dataclass
class Writer:
    """A request that writes a given text, and its drafter, which knows most of it."""

    request_id: str
    text: list[int]
    at: int = PROMPT
    k: int = 0  # decided for the step after this one, where that is early

    def draft(self, rng: random.Random) -> list[int]:
        """Return eight tokens, right until one is not."""
        right = 0
        while right < MAX_K and rng.random() < RIGHT:
            right += 1
        following = self.text[self.at : self.at + MAX_K]
        return following[:right] + [rng.randrange(1000) for _ in range(MAX_K - right)]

    def write(self, draft: list[int], k: int) -> list[int]:
        """Return the tokens of a step that verifies `k` tokens of a draft."""
        right = 0
        while right < k and draft[right] == self.text[self.at + right]:
            right += 1
        tokens = self.text[self.at : self.at + right + 1]
        self.at += len(tokens)
        return tokens


def written(rng: random.Random) -> list[int]:
    """Return a text of phrases from a small stock, and some room for its last draft."""
    stock = [[rng.randrange(1000) for _ in range(rng.randrange(3, 20))] for _ in range(40)]
    text: list[int] = []
    while len(text) < PROMPT + OUTPUT + 2 * MAX_K:
        text += rng.choice(stock)
    return text


class Load:
    """A controller and a batch of requests that come and go.

    Args:
        case: What decides.
        batch: Requests at once.

    Attributes:
        other: Memory to touch while a step runs; none at first.
    """

    def __init__(self, case: Case, batch: int) -> None:
        """Begin without requests."""
        self._rng = random.Random(0)
        self._unseen, self._asks, self._batch = case.unseen, case.asks, batch
        self._ahead = MAX_K  # tokens that are drafted
        self.other: NDArray[np.int64] | None = None
        options = ServerOptions(policy=case.policy)
        self._controller = Controller(options, MAX_K, print, case.facts, not case.unseen)
        self._texts = [written(self._rng) for _ in range(8)]
        self._writers: dict[str, Writer] = {}
        self._begun = 0

    def step(self) -> float:
        """Let all requests do a step; return the seconds that the controller took."""
        rng, writers = self._rng, self._writers
        self._renew()
        drafts = {name: writer.draft(rng) for name, writer in writers.items()}
        proposals = [
            Proposal(name, unseen=self._ahead) if self._unseen else Proposal(name, draft)
            for name, draft in drafts.items()
        ]
        began = time.perf_counter()
        decisions = self._controller.decide(proposals)
        if self._asks:
            self._ahead = self._controller.lookahead(list(drafts))
        spent = time.perf_counter() - began
        parts = []
        for name, decision in decisions.items():
            writer, k = writers[name], decision.k
            if self._unseen:
                k, writer.k = writer.k, min(k, self._ahead)
            tokens = writer.write(drafts[name], k)
            parts.append(RequestStep(name, k, len(tokens), tokens, k if self._unseen else None))
        seconds = 0.02 + 0.001 * sum(part.drafted for part in parts) / self._batch
        step = Step(seconds * rng.lognormvariate(0.0, 0.05), True, tuple(parts))
        if self.other is not None:
            self.other += 1
        began = time.perf_counter()
        self._controller.observe(step)
        return spent + time.perf_counter() - began

    def _renew(self) -> None:
        """Put new requests in the place of those that have ended."""
        writers, rng = self._writers, self._rng
        for writer in [w for w in writers.values() if w.at >= PROMPT + OUTPUT]:
            del writers[writer.request_id]
            self._controller.drop(writer.request_id)
        while len(writers) < self._batch:
            writer = Writer(f"r{self._begun}", self._texts[self._begun % len(self._texts)])
            if self._begun < self._batch:  # not all end at once
                writer.at += rng.randrange(OUTPUT)
            self._begun += 1
            writers[writer.request_id] = writer
            prompt = writer.text[: writer.at]
            self._controller.add(writer.request_id, RequestOptions(), prompt)


def microseconds(case: Case, batch: int, cold: bool) -> float:
    """Return the median time per request and step of a controller under load."""
    load = Load(case, batch)
    for _ in range(SETTLED // batch):
        load.step()
    steps = max(LEAST_STEPS, STEPS // batch)
    if cold:
        load.other, steps = np.zeros(OTHER_MEMORY // 8, np.int64), COLD_STEPS
    times = [sum(load.step() for _ in range(steps)) / steps / batch for _ in range(BLOCKS)]
    return statistics.median(times) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cold", action="store_true", help="with cold caches, as in an engine")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    asked = parser.parse_args()
    caches = "cold" if asked.cold else "warm"
    table = Table(title=f"Controller time, microseconds per request and step (median, {caches})")
    table.add_column("policy")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for name, case in CASES.items():
        if name.startswith(asked.only):
            times = [microseconds(case, batch, asked.cold) for batch in BATCHES]
            table.add_row(name, *(f"{each:.2f}" for each in times))
    console = Console()
    console.print(table)
    console.print(f"machine: {caption(describe())}")


if __name__ == "__main__":
    main()
