"""Draw docs/images/marginal.png: the marginal rule on decisions of a replay.

python scripts/rule.py TRACES
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from moecascade.core.marginal.rule import Marginal
from moecascade.core.step import Decision, Proposal
from moecascade.policies import register
from moecascade.replay import player
from moecascade.telemetry import traces

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "marginal.png"
Shown = tuple[int, float, list[float], list[float]]  # K, lambda, survival, costs
seen: list[Shown] = []


class Watched(Marginal):
    """`marginal`, its decisions on whole drafts kept."""

    name = "watched"

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        """Decide, and keep what led to it."""
        decisions = super().decide(proposals)
        for proposal, decision in zip(proposals, decisions, strict=True):
            expected = self.explain(proposal.request_id)
            part = expected.parts if expected is not None else {}
            if len(part.get("survival", ())) == self.max_k:
                seen.append((decision.k, part["lambda"], part["survival"], part["costs"]))
        return decisions


def main() -> None:
    """Replay, choose three decisions, draw them."""
    register(Watched)
    conditions = player.ReplayConditions(player.MIXTRAL_LIKE, noise=0.05)
    player.play(list(traces.read(sys.argv[1:])), "watched", conditions)
    late = seen[len(seen) // 2 :]  # once it has learnt
    chosen = []
    for title, k in (("an invention: K = 0", 0), ("in doubt: K = 2", 2), ("a copy: K = 8", 8)):
        alike = [one for one in late if one[0] == k]
        alike.sort(key=lambda one: one[2][0])
        chosen.append((title, alike[len(alike) // 2]))
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (title, (k, price, survival, curve)) in zip(
        figure.subplots(1, 3, sharey=True), chosen, strict=True
    ):
        places = range(1, len(survival) + 1)
        colours = ["#0f766e" if j <= k else "#d1d5db" for j in places]
        axes.bar(places, survival, color=colours)
        steps = [price * (b - a) for a, b in pairwise(curve)]
        axes.step(places, steps, where="mid", color="#c2410c", linewidth=1.6)
        axes.set_title(f"{title}   (lambda {price:.2f})", loc="left", fontsize=10)
        axes.set_xlabel("place in the draft")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel("chance, and price")
    figure.axes[1].annotate(
        "price: lambda x marginal cost", (3.2, 0.62), color="#c2410c", fontsize=9
    )
    figure.axes[2].annotate("chance to be accepted", (3.4, 0.9), color="#0f766e", fontsize=9)
    figure.savefig(OUT, dpi=150)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
