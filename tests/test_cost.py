"""The cost model: level, shape and passes, learnt through noise."""

from __future__ import annotations

import random

import pytest

from moecascade.core.cost import EXACT, CostModel, expert_union


def test_the_expert_union() -> None:
    assert expert_union(1, 8, 2) == pytest.approx(2)
    assert expert_union(2, 8, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert expert_union(1000, 8, 2) == pytest.approx(8)


def test_the_cost_model_learns_a_curve_through_noise_and_pauses() -> None:
    rng = random.Random(0)
    curve = [1, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8]
    model = CostModel()
    for i in range(600):
        k = rng.randrange(9)
        seconds = 0.02 * curve[k] * rng.lognormvariate(0, 0.05)
        model.observe(1 + k, seconds * (50 if i % 50 == 7 else 1))
    for k, cost in enumerate(curve):
        assert model.cost(1, k) == pytest.approx(cost, rel=0.06)


def test_the_cost_model_reaches_large_batches_with_bounded_memory() -> None:
    """Every number of positions is served; beyond `EXACT` near ones share what they learn."""
    model = CostModel()
    for positions in random.Random(0).sample(range(1, 2305), 2304):
        model.observe(positions, 0.01 + 0.00001 * positions)
    assert len(model._shape._ratio) < EXACT + 16 * 7
    costs = model.costs(256, 2048)
    assert len(costs) >= 2049
    assert costs[0] == 1
    for drafts in (1, 10, 100, 1000, 2048):
        truth = (0.01 + 0.00001 * (256 + drafts)) / (0.01 + 0.00001 * 256)
        assert costs[drafts] == pytest.approx(truth, rel=0.07)  # one sample each, none twice
    assert model.cost(256, 100) == costs[100]


def test_a_machine_whose_speed_drifts_does_not_bend_the_curve() -> None:
    """Slow for sixty steps, fast for sixty; K changes with the same rhythm."""
    rng = random.Random(2)
    curve = [1, 1.35, 1.68, 1.95, 2.2]
    model = CostModel()
    for i in range(1200):
        k = rng.choice((0, 0, 4)) if (i // 60) % 2 else rng.choice((0, 2, 4))
        slower = 1.5 if (i // 60) % 2 else 1.0
        model.observe(1 + k, 0.02 * slower * curve[k] * rng.lognormvariate(0, 0.03))
    for k in (2, 4):
        assert model.cost(1, k) == pytest.approx(curve[k], rel=0.1)
    assert model.seconds(1) == pytest.approx(0.03, rel=0.1)  # the last sixty were slow ones


def test_the_seconds_of_a_step_are_known_once_there_was_one() -> None:
    model = CostModel()
    assert model.seconds(1) is None
    for _ in range(20):
        model.observe(1, 0.02)
    assert model.seconds(1) == pytest.approx(0.02, rel=0.01)


def test_the_cost_model_follows_a_change_and_a_slower_machine() -> None:
    rng = random.Random(1)
    model = CostModel()
    for factor, slower in ((0.2, 1.0), (0.4, 1.0), (0.4, 5.0)):
        for _ in range(300):
            k = rng.randrange(5)
            model.observe(1 + k, 0.02 * slower * (1 + factor * k) * rng.lognormvariate(0, 0.05))
        for k in range(5):
            assert model.cost(1, k) == pytest.approx(1 + factor * k, rel=0.1)


@pytest.mark.parametrize("slower", [4.0, 30.0])
def test_a_slow_first_step_does_not_make_drafts_look_free(slower: float) -> None:
    """The first step compiles, touches memory, or had been waited for."""
    curve = [1, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8]
    model = CostModel()
    model.observe(1, 0.02 * slower)
    for k in (8, 3, 0, 2):
        model.observe(1 + k, 0.02 * curve[k])
        assert model.cost(1, 8) > 1.8
        assert model.cost(1, 3) > 1.3
    assert model.seconds(1) == pytest.approx(0.02, rel=0.2)


def test_a_burst_of_slow_steps_does_not_make_drafts_look_dear() -> None:
    """Another program has the cores for some steps, more than the few that count as a pause."""
    curve = [1, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8]
    model = CostModel()
    for i in range(300):
        model.observe(1 + i % 9, 0.02 * curve[i % 9])
    for _ in range(6):
        model.observe(1, 0.2)
    for _ in range(20):
        model.observe(1, 0.02)
    for k in (1, 3, 8):
        assert model.cost(1, k) == pytest.approx(curve[k], rel=0.05)
    assert model.seconds(1) == pytest.approx(0.02, rel=0.05)


def test_costs_of_drafting_and_of_verifying_are_told_apart() -> None:
    """Here a drafter made 0 to 3 passes, and others than the drafts it then verified."""
    rng = random.Random(1)
    model = CostModel()
    for _ in range(400):
        k, passes = rng.randrange(4), rng.randrange(4)
        seconds = 0.04 * (1 + 0.25 * k + 0.3 * passes)
        model.observe(1 + k, seconds * rng.lognormvariate(0, 0.05), passes)
    assert model.pass_cost(1) == pytest.approx(0.3, rel=0.1)
    for k in range(4):
        assert model.cost(1, k) == pytest.approx(1 + 0.25 * k, rel=0.1)
        assert model.seconds(1 + k, 2) == pytest.approx(0.04 * (1.6 + 0.25 * k), rel=0.1)


@pytest.mark.parametrize("scale", [0.001, 1000.0])
def test_costs_do_not_depend_on_the_unit_of_time(scale: float) -> None:
    rng = random.Random(3)
    known, scaled = CostModel(), CostModel()
    for _ in range(200):
        k = rng.randrange(9)
        seconds = 0.02 * (1 + 0.2 * k) * rng.lognormvariate(0, 0.2)
        known.observe(1 + k, seconds)
        scaled.observe(1 + k, seconds * scale)
    assert scaled.costs(1, 8) == pytest.approx(known.costs(1, 8))


def test_a_step_teaches_near_numbers_of_positions_and_not_far_ones() -> None:
    known, taught = CostModel(), CostModel()
    for model in (known, taught):
        for _ in range(30):
            model.observe(1, 0.02)
    for _ in range(30):
        taught.observe(20, 0.12)  # dearer than the prior has it
    assert taught.cost(1, 19) > 1.2 * known.cost(1, 19)
    assert taught.cost(1, 20) > 1.1 * known.cost(1, 20)
    assert taught.cost(1, 4) == pytest.approx(known.cost(1, 4), rel=0.02)


def test_a_large_step_moves_the_level_no_further_than_it_may() -> None:
    """A step 2.9 times as long is no pause, and is believed to be off by a factor of 1.5."""
    moved = []
    for longer in (1.5, 2.9):
        model = CostModel()
        for _ in range(100):
            model.observe(1, 0.02)
        before = model._level.unit
        model.observe(1, 0.02 * longer)
        assert before is not None
        assert model._level.unit is not None
        moved.append(model._level.unit / before)
    assert moved[0] == pytest.approx(moved[1])
    assert 1.05 < moved[1] < 1.5


def test_a_machine_that_was_slow_before_the_first_steps_is_started_on_anew() -> None:
    """Of what was measured while something else ran nothing is kept, passes included."""
    model, fresh = CostModel(), CostModel()
    for i in range(20):
        model.observe(1 + i % 9, 1.0 + 0.5 * (i % 9), passes=i % 3)
    for some in (model, fresh):
        some.observe(1, 0.02)
    assert model.costs(1, 8) == pytest.approx(fresh.costs(1, 8))
    assert model.pass_cost(1) == pytest.approx(fresh.pass_cost(1))


def test_after_many_steps_a_fast_one_does_not_throw_away_the_curve() -> None:
    model = CostModel()
    for i in range(200):
        model.observe(1 + i % 9, 0.1 * (1 + 0.05 * (i % 9)))
    before = model.cost(1, 8)
    for _ in range(8):
        model.observe(1, 0.02)
    assert model.cost(1, 8) == pytest.approx(before, rel=0.1)


def test_the_prior_is_that_of_the_model_served() -> None:
    few, many, dense = CostModel(8, 2), CostModel(128, 8), CostModel(1, 1)
    assert dense.cost(1, 8) < 1.1 < few.cost(1, 8) < many.cost(1, 8)


def test_a_first_guess_that_is_given_holds_until_steps_say_otherwise() -> None:
    """Exact at 1, 2, 4, ... positions, between them in between, beyond them on as at the end."""
    expected = [3.0, 4.5, 6.0, 6.6, 13.2]
    model = CostModel(64, 8, expected=expected)
    for octave, time in enumerate(expected):
        assert model.cost(1, 2**octave - 1) == pytest.approx(time / 3.0)
    assert 1.5 < model.cost(1, 2) < 2.0
    assert model.cost(16, 16) == pytest.approx(2.0)
    for _ in range(100):
        model.observe(1, 1.0)
        model.observe(2, 1.1)
    assert model.cost(1, 1) == pytest.approx(1.1, rel=0.02)
    assert model.cost(1, 15) == pytest.approx(4.4, rel=0.05)  # not measured: as it was


def test_costs_never_fall_below_those_of_a_step_without_drafts() -> None:
    """Also where noise has it that drafts make a step shorter."""
    model = CostModel()
    for _ in range(30):
        model.observe(1, 0.03)
        model.observe(3, 0.02)
    assert model.costs(1, 8).min() == 1.0
