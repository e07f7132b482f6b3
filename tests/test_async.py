"""Where steps are scheduled before the one before them is known: what policies are told, and do.

Engines that work like that: `test_matrix`, `test_scripted`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moecascade import policies
from moecascade.core.controller import Controller
from moecascade.core.options import ServerOptions, server_options
from moecascade.core.step import Proposal
from moecascade.errors import ConfigError

MAX_K = 8
SPECS = ("off", "static:3", f"static:{MAX_K}", "cascade", "marginal")


def test_where_drafts_are_not_shown_policies_that_need_them_are_refused() -> None:
    assert server_options({}, 8).policy == "marginal"
    assert server_options({}, 8, shows_drafts=False).policy == "marginal"
    with pytest.raises(ConfigError, match="--no-async-scheduling"):
        server_options({"cascade": {"policy": "survival-budget"}}, 8, shows_drafts=False)
    faults: list[Any] = []
    for spec in ("survival-budget",):
        with pytest.raises(ConfigError) as refused:
            Controller(ServerOptions(policy=spec), 8, lambda *f: faults.append(f), None, False)
        for words in (repr(spec), "asynchronous", "'marginal'", "--no-async-scheduling"):
            assert words in str(refused.value)


@pytest.mark.parametrize("spec", SPECS)
def test_steps_decided_before_a_phase_began_say_nothing_about_it(spec: str) -> None:
    """Decisions one step late, as an asynchronous engine makes them: the same K in the end."""
    from moecascade.core.step import RequestStep, Step

    def settled(late: int) -> Counter[int]:
        made = policies.create(spec, MAX_K)
        made.add("r", MAX_K)
        sent: list[int] = []
        ks: Counter[int] = Counter()
        for _ in range(600):
            (decision,) = made.decide([Proposal("r", unseen=MAX_K)])
            sent.append(decision.k)
            if len(sent) > late:
                k = sent.pop(0)
                ks[k] += 1
                emitted = min(k, 2) + 1  # two drafts are right, always: K = 2 is the best
                part = RequestStep("r", k, emitted, [1] * emitted, k)
                made.observe(Step(0.02 * (1 + 0.4 * k), True, (part,)))
        return ks

    late, known = settled(1), settled(0)
    assert late.most_common(1)[0][0] == known.most_common(1)[0][0]
    if spec == "cascade":
        assert known[2] - late[2] < 30 < known[2]
