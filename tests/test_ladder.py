"""Where an engine has whole CUDA graphs for some draft lengths only: a ladder of K."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.cost import CostModel
from moecascade.core.marginal.allocation import allot, on_ladder
from moecascade.core.marginal.draft_length import Unseen
from moecascade.core.registry import create
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.vllm import drafters

LADDER = (0, 1, 2, 3, 5, 8)
COSTS = [1.0 + 0.1 * d for d in range(65)]
np = pytest.importorskip("numpy")


def price(loose: float, ladder: Sequence[int] = LADDER) -> Callable[[Sequence[int]], float]:
    return lambda ks: 1.0 if len(set(ks)) == 1 and ks[0] in ladder else loose


def on(rows: Any, lengths: Sequence[int], n: int, loose: float) -> list[int]:
    rates = [1.0] * len(lengths)
    return on_ladder(np.array(rows), rates, lengths, n, np.array(COSTS), LADDER, price(loose))


def test_one_length_for_all_where_mixing_costs_more_than_it_gains() -> None:
    rows = [[0.9, 0.8, 0.7, 0.3, 0.1], [0.9, 0.8, 0.25, 0.1, 0.1]]
    assert on(rows, [5, 5], 2, loose=1.0) == [4, 3]
    assert on(rows, [5, 5], 2, loose=1.3) == [3, 3]


def test_no_draft_at_all_where_all_of_it_costs_more() -> None:
    assert on([[0.3, 0.05], [0.3, 0.05]], [2, 2], 2, loose=2.0) == [1, 1]
    assert on([[0.15, 0.05], [0.01, 0.0]], [2, 2], 2, loose=2.0) == [0, 0]


def test_one_length_needs_all_requests_to_have_as_long_a_draft() -> None:
    rows = [[0.9, 0.8, 0.7], [0.0, 0.0, 0.0]]
    assert on(rows, [3, 0], 2, loose=1.01)[1] == 0
    # A third request of another policy verifies what that says.
    assert len(on([[0.9, 0.8], [0.9, 0.8]], [2, 2], 3, loose=1.2)) == 2


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=4),
    st.floats(1.0, 2.0),
    st.data(),
)
def test_what_is_done_is_never_worse_than_mixed_one_length_or_none(
    rows: list[list[float]], loose: float, data: Any
) -> None:
    falling = np.array([sorted(row, reverse=True) for row in rows])
    n = len(rows)
    lengths = [data.draw(st.integers(0, 5)) for _ in rows]
    costs, factor = np.array(COSTS), price(loose)

    def surplus(ks: Sequence[int]) -> float:
        gain = sum(float(row[:k].sum()) for row, k in zip(falling, ks, strict=True))
        return float(gain - n * (costs[sum(ks)] * factor(ks) - 1.0))

    rates = [1.0] * n
    ks = on_ladder(falling, rates, lengths, n, costs, LADDER, factor)
    assert all(k <= length for k, length in zip(ks, lengths, strict=True))
    others = [[0] * n, allot(falling, rates, lengths, n, costs * loose)]
    others += [[k] * n for k in LADDER if k <= min(lengths)]
    assert surplus(ks) >= max(map(surplus, others)) - 1e-9


def test_what_a_missing_graph_costs_is_learnt_beside_the_shape() -> None:
    rng = random.Random(0)
    model = CostModel(ladder=LADDER)
    for _ in range(1500):
        ks = [rng.randrange(4)] * 4 if rng.random() < 0.5 else rng.choices(range(4), k=4)
        tight = len(set(ks)) == 1
        seconds = 0.02 * (1.0 + 0.05 * sum(ks)) * (1.0 if tight else 1.25)
        model.observe(4 + sum(ks), seconds * rng.lognormvariate(0, 0.05), 0, ks)
    assert model.factor((1, 2, 0, 3)) == pytest.approx(1.25, rel=0.06)
    assert model.factor((2, 2, 2, 2)) == 1.0
    assert model.cost(4, 8, 0, (2, 2, 2, 2)) == pytest.approx(1.4, rel=0.08)


def test_without_a_ladder_or_a_difference_nothing_is_learnt() -> None:
    rng = random.Random(1)
    for ladder, bound in ((), 1.0), (LADDER, 1.06):
        model = CostModel(ladder=ladder)
        for _ in range(800):
            ks = rng.choices(range(4), k=2)
            model.observe(
                2 + sum(ks), 0.02 * (1 + 0.1 * sum(ks)) * rng.lognormvariate(0, 0.05), 0, ks
            )
        assert 1.0 <= model.factor((1, 2)) <= bound


def test_off_the_ladder_without_a_graph_for_none_being_off_costs_as_much() -> None:
    model = CostModel(ladder=(4,))
    model._loose.factor = 1.5
    assert model.factor((1,)) == model.factor((0,)) == 1.0
    assert model.factor((4,)) == pytest.approx(1 / 1.5)


def test_marginal_comes_to_one_length_for_all() -> None:
    """Four requests, drafts mostly right, mixing a third dearer: after some steps nobody mixes."""
    rng = random.Random(3)
    policy = create("marginal", 8, {"ladder": LADDER})
    names = [f"r{i}" for i in range(4)]
    for name in names:
        policy.add(name, 8)
    mixed = []
    for _ in range(600):
        decisions = policy.decide([Proposal(name, unseen=8) for name in names])
        ks = [decision.k for decision in decisions]
        policy.lookahead(names)
        emitted = []
        for k in ks:
            right = 0
            while right < k and rng.random() < 0.85:
                right += 1
            emitted.append(right + 1)
        loose = len(set(ks)) > 1 or ks[0] not in LADDER
        seconds = 0.02 * (1 + 0.03 * sum(ks)) * (1.35 if loose else 1.0)
        parts = [
            RequestStep(name, k, n, range(n), k)
            for name, k, n in zip(names, ks, emitted, strict=True)
        ]
        policy.observe(Step(seconds, True, tuple(parts)))
        mixed.append(loose)
    assert sum(mixed[-200:]) < 20
    assert max(ks) > 0


def test_a_draft_whose_length_is_chosen_unseen_has_one_of_the_ladder() -> None:
    unseen = Unseen(8)
    worth = np.full((1, 8), 0.9)
    delay = np.array([0.1 * d for d in range(9)])
    lengths = {unseen.length(worth, delay, 0.05, (0, 1, 2, 3, 5)) for _ in range(63)}
    assert lengths <= {1, 5, 6}  # nothing to see; what is best; one further


def test_a_ladder_holds_draft_lengths() -> None:
    for wrong in ([0, -1], ["1"], "12", [True]):
        with pytest.raises(ConfigError, match="ladder must hold draft lengths"):
            create("marginal", 8, {"ladder": wrong})


@pytest.mark.parametrize(
    ("second", "full", "table", "ladder"),
    [
        (True, True, None, {"ladder": (8,)}),
        (True, True, [(1, 1, 9), (2, 2, 3), (3, 8, 0)], {"ladder": (0, 3, 8)}),
        (True, False, [(1, 1, 8)], {}),
        (False, True, [(1, 1, 8)], {}),
    ],
)
def test_the_ladder_is_what_vllm_captures(
    second: bool, full: bool, table: Any, ladder: dict[str, Any]
) -> None:
    config = SimpleNamespace(
        use_v2_model_runner=second,
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: full)
        ),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=8, num_speculative_tokens_per_batch_size=table
        ),
    )
    assert drafters.ladder(config) == ladder


def test_a_request_whose_time_is_dear_drafts_less() -> None:
    rows, costs = np.array([[0.3, 0.05], [0.3, 0.05]]), np.array(COSTS)
    for rate, ks in ((1.0, [1, 1]), (2.0, [0, 0])):
        assert on_ladder(rows, [rate] * 2, [2, 2], 2, costs, LADDER, price(2.0)) == ks
