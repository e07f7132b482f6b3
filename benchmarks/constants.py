"""What each constant of `marginal` and of the cost model is worth in replay: one varied at a time.

    python benchmarks/constants.py TRACES... [--answers 60] [--only NAME...]

Prints for each constant and value the speed-up, and the worst answer of a hundred tokens or more,
with the change against the default. A constant is flat where its values hardly differ: what is
below half a percent is no reason to choose one or the other. Takes about a second for a value and
ten answers. `--batch 16` for those of large batches.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Column, Table

from moecascade.replay import player
from moecascade.telemetry import traces

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
CORE = "moecascade.core."
CONSTANTS = {
    "cost": (
        *("EXPERT_SHARE", "GROWTH", "NEARNESS", "MEMORY", "BELIEF", "SETTLED", "REDRAWN_EVERY"),
        *("FIRST", "TRACKING", "LEAP", "OUTLIER", "PAUSES"),
    ),
    "marginal.acceptance": (
        *("LEARNING_RATE", "SLOPE_RATE", "SLOPE_EVIDENCE", "FIRST_ODDS", "FIRST_HITS"),
        *("DECAY_HITS", "PLACES", "HALVED_EVERY"),
    ),
    "marginal.accounts": ("SHORTEST", "FIRST_RATE", "FIRST_TIME", "DECAY_ALL"),
    "marginal.recent": ("RENEWED_EVERY", "DECAY_TABLE", "BELIEF", "FIRST_CHANCE", "NEXT_CHANCE"),
}
"""By module. Sizes of tables are left out: they bound memory. So are those of model drafters
(`FIRST_PASS`, `PASS_BELIEF`, `LEAST_LEFT`, `DECAY_WORTH`, ...), of which replay has none."""
RANGES = {"DECAY": 1.0, "CHANCE": 1.0, "HITS": 1.0, "SHARE": 1.0}  # shares, by a part of the name


@dataclass(frozen=True)
class Setting:
    """A constant at a value; no module for the defaults."""

    module: str
    name: str
    value: float


def settings(only: list[str]) -> Iterator[Setting]:
    """Yield the defaults, then every constant at every value."""
    yield Setting("", "all defaults", 0.0)
    for module, names in CONSTANTS.items():
        for name in names:
            if only and name not in only:
                continue
            default = getattr(import_module(CORE + module), name)
            for factor in FACTORS:
                value = default * factor
                if name.startswith("DECAY"):  # what is forgotten is varied
                    value = 1.0 - (1.0 - default) * factor
                if name == "LEAP":  # above 1, likewise
                    value = 1.0 + (default - 1.0) * factor
                if isinstance(default, int):
                    value = max(1, round(value))
                bounded = any(part in name for part in RANGES)
                if factor != 1.0 and not (bounded and not 0.0 <= value < 1.0):
                    yield Setting(module, name, value)


def replayed(paths: list[Path], answers: int, batch: int, one: Setting) -> tuple[float, float]:
    """Return speed-up and worst answer under a setting."""
    found = list(traces.read(paths))
    found = random.Random(0).sample(found, min(answers, len(found)))
    conditions = player.ReplayConditions(player.MIXTRAL_LIKE, noise=0.05, batch=batch)
    if not one.module:
        outcomes = player.play(found, "marginal", conditions)
    else:
        with patch.object(import_module(CORE + one.module), one.name, one.value):
            outcomes = player.play(found, "marginal", conditions)
    summary = player.summarise(outcomes)
    return summary.speedup, summary.worst_request


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACES")
    parser.add_argument("--answers", type=int, default=60, help="how many, drawn at random")
    parser.add_argument("--batch", type=int, default=1, help="requests served at once")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these constants")
    asked = parser.parse_args()
    swept = list(settings(asked.only))
    replay = partial(replayed, asked.traces, asked.answers, asked.batch)
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(replay, swept))
    (speedup, worst), *_ = results
    heads = ("constant", "value", "speed-up", "change", "worst answer")
    table = Table(*[Column(head, overflow="fold") for head in heads])
    for one, (speed, low) in zip(swept, results, strict=True):
        value = f"{one.value:g}" if one.module else ""
        table.add_row(one.name, value, f"{speed:.4f}", f"{speed / speedup - 1:+.2%}", f"{low:.3f}")
    console = Console()
    console.print(table)
    console.print(f"defaults: speed-up {speedup:.4f}, worst answer {worst:.3f}")


if __name__ == "__main__":
    main()
