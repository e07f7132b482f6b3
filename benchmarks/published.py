"""What the planner says of published measurements, source by source: the table of docs/planning.md.

python benchmarks/published.py            # each source's errors
python benchmarks/published.py --points   # each point
python benchmarks/published.py --fit      # the constants that fit the fitting sources best
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from moecascade.replay.planning.step_time import Constants
from moecascade.replay.planning.validation import Point, errors, published, signs, typical

FREE = {
    "experts_reading": (0.3, 0.95),
    "layer": (3e-6, 6e-5),
    "routed": (2e-6, 1e-4),
    "step": (5e-5, 6e-4),
    "verifying": (5e-5, 4e-3),
    "drafting": (2e-5, 2e-3),
    "affinity": (0.05, 0.6),
}
"""The constants that are fitted on engines whose host works ahead, each within what can be."""
WAITING = {"waiting": (1e-4, 1e-2)}
"""The one that is fitted, after them, on those whose host does not."""
ROUNDS = 60


def by_source(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return points by source, in order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.source, []).append(point)
    return found


def loss(points: Sequence[Point], constants: Constants) -> float:
    """Return the mean size of logarithmic errors, each source weighing the same."""
    means = []
    for mine in by_source(points).values():
        sizes = [abs(math.log1p(error)) for error in errors(mine, constants)]
        means.append(sum(sizes) / len(sizes))
    return sum(means) / len(means)


def fitted(
    points: Sequence[Point], free: Mapping[str, tuple[float, float]], found: Constants
) -> Constants:
    """Return the constants that fit points best, found one at a time with shrinking steps."""
    least, step = loss(points, found), 0.4
    for _ in range(ROUNDS):
        for name, (low, high) in free.items():
            for factor in (1.0 + step, 1.0 / (1.0 + step)):
                value = min(max(getattr(found, name) * factor, low), high)
                tried = replace(found, **{name: value})
                if (got := loss(points, tried)) < least - 1e-6:
                    least, found = got, tried
        step = max(0.03, 0.9 * step)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--fit", action="store_true")
    asked = parser.parse_args()
    constants = Constants()
    if asked.fit:
        fits = [point for point in published() if point.fits]
        constants = fitted([point for point in fits if point.overlap], FREE, constants)
        constants = fitted([point for point in fits if not point.overlap], WAITING, constants)
        print({name: float(f"{value:.2g}") for name, value in asdict(constants).items()})
    table = Table("source", "", "points", "median error", "mean", "worst")
    for source, points in by_source(published()).items():
        found = errors(points, constants)
        worst = max(found, key=abs)
        table.add_row(
            source,
            "fits" if points[0].fits else "checks",
            str(len(points)),
            f"{typical(found):.0%}",
            f"{sum(found) / len(found):+.0%}",
            f"{worst:+.0%}",
        )
    Console().print(table)
    for what, fitting in (("fitting", True), ("checking", False)):
        points = [point for point in published() if point.fits is fitting]
        found, right = errors(points, constants), signs(points, constants)
        near = sum(abs(error) <= 0.4 for error in found) / len(found)
        line = f"{what}: {len(points)} points of {len(by_source(points))} sources, median error "
        line += f"{typical(found):.0%}, worst {max(found, key=abs):+.0%}, {near:.0%} within 40%"
        if right:
            line += f"; whether drafts pay is right for {sum(right)} of {len(right)}"
        Console().print(line, soft_wrap=True)
    if asked.points:
        each = Table("point", "model", "device", "at once", "K", "published", "predicted")
        for point in published():
            each.add_row(
                point.id,
                point.model.rpartition("/")[2],
                f"{point.cards} x {point.device}" if point.cards > 1 else point.device,
                str(point.requests),
                str(point.k),
                f"{point.cost:.2f}",
                f"{point.predicted(constants):.2f}",
            )
        Console().print(each)


if __name__ == "__main__":
    main()
