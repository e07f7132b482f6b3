"""What holds for every policy that it makes sense for: no unit of time, no order of requests."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecascade.core.controller import Controller
from moecascade.core.marginal.allocation import allot
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.registry import classes
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.policies import create

MAX_K = 4
NAMES = "abc"
LARGE = "marginal[crowd=0]"
SPECS = [name if not known.argument else f"{name}:2" for name, known in classes().items()]


def lived(spec: str, order: str, scale: float = 1.0, steps: int = 120) -> list[dict[str, int]]:
    """Serve three requests whose drafts are right by a rate each; return K by request and step."""
    rng = random.Random(0)
    policy = create(spec, MAX_K)
    for name in order:
        policy.add(name, MAX_K, [1, 2, 3, 4, 5, 1, 2])
    found = []
    for at in range(steps):
        written = {name: [100 * at + i for i in range(MAX_K + 1)] for name in NAMES}
        right = {name: rng.random() < 0.2 + 0.3 * NAMES.index(name) for name in NAMES}
        noise = rng.lognormvariate(0, 0.05)
        drafts = {name: written[name][:MAX_K] if right[name] else [-1] * MAX_K for name in NAMES}
        decisions = policy.decide([Proposal(name, drafts[name]) for name in order])
        ks = {d.request_id: d.k for d in decisions}
        parts = []
        for name in order:
            tokens = written[name][: 1 + ks[name] * right[name]]
            parts.append(RequestStep(name, ks[name], len(tokens), tokens))
        seconds = 0.02 * (1 + 0.1 * sum(ks.values())) * noise
        policy.observe(Step(seconds * scale, True, tuple(parts)))
        found.append(ks)
    return found


@pytest.mark.parametrize("spec", [*SPECS, LARGE])
def test_decisions_do_not_depend_on_the_unit_of_time(spec: str) -> None:
    """A thousand and twenty-four times as slow, so that rounding is the same."""
    assert lived(spec, NAMES, 1024.0) == lived(spec, NAMES)


@pytest.mark.parametrize("spec", [*SPECS, LARGE])
def test_decisions_do_not_depend_on_the_order_of_requests(spec: str) -> None:
    """A request's K is its own; up to slots worth the same, and weights that move in turn."""
    one, other = lived(spec, NAMES), lived(spec, NAMES[::-1])
    for name in NAMES:
        ks = np.array([(a[name], b[name]) for a, b in zip(one, other, strict=True)])
        assert np.abs(ks[:, 0] - ks[:, 1]).mean() <= 0.25


falling = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).map(
    lambda s: sorted(s, reverse=True)
)


@given(
    st.lists(falling, min_size=1, max_size=4),
    st.lists(st.floats(0.0, 0.5), min_size=16, max_size=16),
    st.floats(1.0, 3.0),
)
@settings(max_examples=100)
def test_dearer_steps_never_make_drafts_longer(
    rows: list[list[float]], steps: list[float], factor: float
) -> None:
    lengths = [4] * len(rows)
    costs = 1.0 + np.concatenate([[0.0], np.cumsum(steps)])
    cheap = allot(np.array(rows), [1.0] * len(rows), lengths, len(rows), costs)
    dear = allot(
        np.array(rows), [1.0] * len(rows), lengths, len(rows), 1.0 + factor * (costs - 1.0)
    )
    assert all(a >= b for a, b in zip(cheap, dear, strict=True))


@given(
    falling,
    st.lists(st.floats(0.0, 0.5), min_size=4, max_size=4),
    st.floats(1.0, 2.0),
)
def test_better_chances_never_make_a_draft_shorter(
    row: list[float], steps: list[float], factor: float
) -> None:
    costs = 1.0 + np.concatenate([[0.0], np.cumsum(steps)])
    (before,) = allot(np.array([row]), [1.0], [4], 1, costs)
    (after,) = allot(np.array([row]) * factor, [1.0], [4], 1, costs)
    assert after >= before


def fails(what: str, fault: str) -> None:
    """No policy may raise."""
    pytest.fail(f"{what}: {fault}")


@pytest.mark.parametrize("spec", [*SPECS, LARGE])
@pytest.mark.parametrize("cap", [0, 2, 99])
def test_a_model_never_drafts_what_the_request_may_not_use(spec: str, cap: int) -> None:
    controller = Controller(ServerOptions(policy=spec), MAX_K, fails)
    controller.add("r", RequestOptions(max_k=cap), [1, 2, 3])
    for _ in range(80):
        wanted = controller.lookahead(["r"])
        assert 0 <= wanted <= min(cap, MAX_K)
        k = min(controller.decide([Proposal("r", [7] * wanted)])["r"].k, wanted)
        controller.observe(Step(0.02, True, (RequestStep("r", k, 1 + k, [7] * (1 + k)),)))
