"""How soon the cost of K = 8 is known: from the generic first guess, and from the planner's.

Each model of the planner on each of three devices, one and eight requests at once. What is true is
the planner's curve with other constants, each drawn from a range as wide as sources differ. Steps
verify drafts of random lengths; their times have 5% noise.

python benchmarks/first_costs.py
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moecascade.core.cost import CostModel
from moecascade.replay.planning import devices, plan
from moecascade.replay.planning.step_time import Constants, Setup, by_positions

DEVICES = ("H100-SXM", "A100-80GB", "RTX-6000-Ada")
MAX_K, STEPS, NOISE = 8, 200, 0.05
WITHIN = 0.1
DRAFTLESS = 0.6  # of steps
SPREAD = {
    "experts_reading": (0.6, 1.05),
    "computing": (0.6, 1.4),
    "layer": (0.5, 2.0),
    "routed": (0.5, 2.0),
    "step": (0.5, 2.0),
    "verifying": (0.3, 3.0),
    "affinity": (0.3, 1.8),
}
"""Factors on the planner's constants."""


def another_world(rng: random.Random) -> Constants:
    """Return constants as they may be on somebody's machine."""
    fitted = Constants()
    drawn = {
        name: getattr(fitted, name) * math.exp(rng.uniform(math.log(low), math.log(high)))
        for name, (low, high) in SPREAD.items()
    }
    return replace(fitted, **drawn)


def steps_until_known(costs: CostModel, truth: Sequence[float], n: int, seed: int) -> int:
    """Return after how many steps the cost of one request's 8 drafts stays within 10%."""
    rng = random.Random(seed)
    wanted, last = truth[n + MAX_K - 1] / truth[n - 1], 0
    for step in range(STEPS):
        if abs(costs.cost(n, MAX_K) / wanted - 1.0) > WITHIN:
            last = step + 1
        draftless = rng.random() < DRAFTLESS
        positions = n + (0 if draftless else sum(rng.randint(0, MAX_K) for _ in range(n)))
        costs.observe(positions, truth[positions - 1] * rng.lognormvariate(0.0, NOISE))
    return last


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rng = random.Random(0)
    found: dict[int, list[tuple[int, int]]] = {1: [], 8: []}
    for name in track(plan.known_models(), "models", console=Console(stderr=True), transient=True):
        model = plan.find_model(name)
        for device in DEVICES:
            cards = 8 if model.total > 1e11 else 1
            setup = Setup(devices.find(device), cards)
            expected = plan.expected_times(model, setup, max_k=MAX_K)
            for n, pairs in found.items():
                there = replace(setup, constants=another_world(rng))
                truth = by_positions(model, there, requests=n, max_k=MAX_K, context=1024)
                experts, top_k = model.routing
                generic = CostModel(max(1, experts), max(1, top_k))
                planned = CostModel(expected=expected)
                a, b = (steps_until_known(m, truth, n, len(pairs)) for m in (generic, planned))
                pairs.append((a, b))
    table = Table(
        "at once", "first guess", "engines", "median steps", "mean", "at once known", "sooner"
    )
    for n, pairs in found.items():
        for i, guess in enumerate(("generic", "planner's")):
            mine = [pair[i] for pair in pairs]
            sooner = sum(pair[i] < pair[1 - i] for pair in pairs) / len(pairs)
            known = sum(steps == 0 for steps in mine) / len(mine)
            table.add_row(
                str(n),
                guess,
                str(len(mine)),
                f"{median(mine):.0f}",
                f"{fmean(mine):.0f}",
                f"{known:.0%}",
                f"{sooner:.0%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
