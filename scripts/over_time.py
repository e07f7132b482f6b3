"""Draw docs/images/over-time.png: K along one answer, where drafts are seen and where they are not.

python scripts/over_time.py TRACES [NAME]

NAME is a request's; without one, of the last hundred the one that gains most where drafts are seen.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moecascade.core.marginal.rule import Marginal
from moecascade.core.step import Step
from moecascade.policies import register
from moecascade.replay import player
from moecascade.telemetry import traces

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "over-time.png"
Row = tuple[int, int, int]  # tokens written before the step, K verified, tokens that it gave
rows: defaultdict[str, list[Row]] = defaultdict(list)


class Watched(Marginal):
    """`marginal`, what its requests did kept."""

    name = "watched"

    def observe(self, step: Step) -> None:
        """Keep each request's part of the step."""
        super().observe(step)
        if step.decode:
            for part in step.requests:
                of = rows[part.request_id]
                of.append((of[-1][0] + of[-1][2] if of else 1, part.drafted, part.emitted))


def played(
    requests: Sequence[traces.Trace], conditions: player.ReplayConditions
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """Return each request's steps, and its speed-up."""
    rows.clear()
    outcomes = player.play(requests, "watched", conditions)
    names = {id(trace): str(i) for i, trace in enumerate(requests)}
    return dict(rows), {names[id(o.trace)]: o.speedup for o in outcomes}


def main() -> None:
    """Replay twice, choose a request, draw it."""
    register(Watched)
    requests = list(traces.read(sys.argv[1:2]))
    modes = {
        "seen": player.ReplayConditions(player.MIXTRAL_LIKE, noise=0.05),
        "unseen, one step early": player.ReplayConditions(
            player.MIXTRAL_LIKE, noise=0.05, late=True
        ),
    }
    found = {name: played(requests, conditions) for name, conditions in modes.items()}
    fastest = found["seen"][1]
    late = list(fastest)[-100:]
    chosen = next(
        (str(i) for i, trace in enumerate(requests) if trace.id in sys.argv[2:]),
        max(late, key=lambda name: fastest[name]),
    )
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(len(modes), 1, sharex=True, sharey=True)
    for axes, (title, (steps, speedups)) in zip(panels, found.items(), strict=True):
        for at, k, gave in steps[chosen]:
            axes.bar(at, k, width=0.9, color="#d1d5db", align="edge")
            axes.bar(at, min(gave - 1, k), width=0.9, color="#0f766e", align="edge")
        axes.set_title(f"{title}: {speedups[chosen]:.2f} times as fast", loc="left", fontsize=10)
        axes.set_ylabel("K")
        axes.set_yticks((0, 4, 8))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("token of the answer   (green: accepted, grey: verified in vain)")
    figure.savefig(OUT, dpi=150)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
