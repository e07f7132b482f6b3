"""How long the controller takes for a step: decide and observe, per request.

    python benchmarks/decision_cost.py

Prints microseconds per request and step, the median over blocks of steps, for several batch sizes.
Every request has a draft of eight tokens in every step, which is more than drafters find, in a text
that repeats its phrases, as text with drafts does. One request has to stay below 50 microseconds, a
batch of 256 below 500 in all, and the paper's policy below 30 a request.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from moecascade.core.controller import Controller
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.serving.machine import caption, describe

POLICIES = ("off", "static:3", "cascade", "marginal")
BATCHES = (1, 8, 16, 64, 256)
BLOCKS = 30
MAX_K = 8
PROMPT, OUTPUT = 400, 600  # tokens
RIGHT = 0.6  # chance that a token of a draft is right, given that those before it are


@dataclass
class Writer:
    """A request that writes a given text, and its drafter, which knows most of it."""

    request_id: str
    text: list[int]
    at: int = PROMPT

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


def microseconds(spec: str, batch: int) -> float:
    """Return the median time per request and step of a controller under load."""
    rng = random.Random(0)
    controller = Controller(ServerOptions(policy=spec), MAX_K, print)
    texts = [written(rng) for _ in range(8)]
    writers: dict[str, Writer] = {}
    begun = 0
    steps = max(20, 2000 // batch)
    times = []
    for _ in range(BLOCKS):
        spent = 0.0
        for _ in range(steps):
            for writer in [w for w in writers.values() if w.at >= PROMPT + OUTPUT]:
                del writers[writer.request_id]
                controller.drop(writer.request_id)
            while len(writers) < batch:
                writer = Writer(f"r{begun}", texts[begun % len(texts)])
                writer.at += rng.randrange(OUTPUT) if begun < batch else 0  # not all end at once
                begun += 1
                writers[writer.request_id] = writer
                controller.add(writer.request_id, RequestOptions(), writer.text[: writer.at])
            drafts = {name: writer.draft(rng) for name, writer in writers.items()}
            proposals = [Proposal(name, draft) for name, draft in drafts.items()]
            began = time.perf_counter()
            decisions = controller.decide(proposals)
            spent += time.perf_counter() - began
            parts = []
            for name, decision in decisions.items():
                tokens = writers[name].write(drafts[name], decision.k)
                parts.append(RequestStep(name, decision.k, len(tokens), tokens))
            seconds = 0.02 + 0.001 * sum(part.drafted for part in parts) / batch
            step = Step(seconds * rng.lognormvariate(0.0, 0.05), True, tuple(parts))
            began = time.perf_counter()
            controller.observe(step)
            spent += time.perf_counter() - began
        times.append(spent / steps / batch * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    table = Table(title="Controller time, microseconds per request and step (median)")
    table.add_column("policy")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for spec in POLICIES:
        table.add_row(spec, *(f"{microseconds(spec, batch):.2f}" for batch in BATCHES))
    console = Console()
    console.print(table)
    console.print(f"machine: {caption(describe())}")


if __name__ == "__main__":
    main()
