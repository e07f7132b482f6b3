"""How long the controller takes for a step: decide and observe, per request.

    python benchmarks/decision_cost.py

Prints microseconds per request and step, the median over blocks of steps, for several batch sizes.
Every request has a draft of eight tokens in every step, which is more than drafters find. The
paper's policy has to stay below 30.
"""

from __future__ import annotations

import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from moecascade.controller import Controller
from moecascade.machine import caption, describe
from moecascade.options import RequestOptions, ServerOptions
from moecascade.steps import Proposal, RequestStep, Step

POLICIES = ("off", "static:3", "cascade", "marginal")
BATCHES = (1, 8, 64, 256)
BLOCKS = 30


def microseconds(spec: str, batch: int) -> float:
    """Return the median time per request and step of a controller under load."""
    controller = Controller(ServerOptions(policy=spec), 8, lambda _spec, fault: print(fault))
    request_ids = [f"r{i}" for i in range(batch)]
    text = [random.Random(0).randrange(50) for _ in range(1000)]  # few tokens: many matches
    for request_id in request_ids:
        controller.add(request_id, RequestOptions(), text)
    steps = max(20, 2000 // batch)
    times = []
    for _ in range(BLOCKS):
        spent = 0.0
        for i in range(steps):
            at = i % 900
            proposals = [Proposal(request_id, text[at : at + 8]) for request_id in request_ids]
            began = time.perf_counter()
            decisions = controller.decide(proposals)
            spent += time.perf_counter() - began
            parts = tuple(
                RequestStep(request_id, d.k, 1 + right, [*text[at : at + right], i % 50])
                for request_id, d in decisions.items()
                for right in [i % (d.k + 1)]
            )
            step = Step(0.02 + 0.001 * sum(p.drafted for p in parts) / batch, True, parts)
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
