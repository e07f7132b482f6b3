r"""Speculation utility: what drafts earn over what they cost (the paper's section on utility).

For one request, over a window of steps:

* ETR, the effective token rate: tokens emitted per step, 1 without speculation.
* cost: mean step time with drafts over the baseline, the step time without.
* utility ``U = ETR / cost``. As ``TPOT = step time / ETR``, U is the speed-up over no speculation.

The paper serves one request at a time. In a batch, drafts of one request delay all, so the time of
a step has to be divided among those who caused it. Let a step of n requests take T seconds and
verify D of our drafts in all, d of them for request r, and let T0 be the baseline of that batch.
Then

    cost_r = 1 + n * (d / D) * (T - T0) / T0

that is: r answers for its share of the extra time, and answers for it to all n requests. For n = 1
this is T / T0, the paper's cost; if all requests verify equally many drafts, every cost is T / T0;
a request without drafts costs 1; and the mean of cost_r over the batch is T / T0.
``ETR_r > cost_r`` says that r's drafts raise the throughput of the whole batch (exactly so where r
alone drafts), so ``U_r >= 1`` keeps its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """Sums over a window of steps of one request, and the utility that follows from them."""

    steps: int = 0
    emitted: int = 0
    total_cost: float = 0.0

    def add(self, emitted: int, cost: float) -> None:
        """Count one step that emitted `emitted` tokens at `cost` (in baseline steps)."""
        self.steps += 1
        self.emitted += emitted
        self.total_cost += cost

    @property
    def etr(self) -> float:
        """Tokens emitted per step; 1 for an empty window."""
        return self.emitted / self.steps if self.steps else 1.0

    @property
    def cost(self) -> float:
        """Mean cost of a step in baseline steps; 1 for an empty window."""
        return self.total_cost / self.steps if self.steps else 1.0

    @property
    def utility(self) -> float:
        """ETR over cost: the speed-up over no speculation."""
        return self.emitted / self.total_cost if self.total_cost else 1.0


def cost_share(seconds: float, baseline: float, requests: int, drafted: int, total: int) -> float:
    """Return a request's cost in a step, in baseline steps (see the module's formula).

    Args:
        seconds: Time of the step.
        baseline: Time of the same batch without our drafts.
        requests: Requests in the batch (n).
        drafted: Drafts that this request verified (d).
        total: Drafts that all our requests verified (D).

    Multiplied by n, noise in a large batch could make the sum zero or negative; a request is
    charged at least its 1/n of the step.
    """
    if drafted == 0:
        return 1.0
    extra = requests * (drafted / total) * (seconds - baseline) / baseline
    return max(1.0 + extra, min(1.0, seconds / baseline) / requests)
