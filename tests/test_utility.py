"""ETR, cost, utility, and the baseline they are measured against."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.baseline import Baseline
from moecascade.core.utility import Tally, cost_share

times = st.floats(0.01, 10.0)
drafts = st.lists(st.integers(0, 8), min_size=1, max_size=32).filter(any)


def test_utility_is_the_speed_up() -> None:
    tally = Tally()
    for emitted, cost in [(3, 1.5), (1, 1.5), (4, 1.4), (2, 1.6)]:
        tally.add(emitted, cost)
    # 10 tokens in the time of 6 baseline steps, which without drafts would have given 6
    assert tally.utility == pytest.approx(10 / 6)
    assert tally.utility == pytest.approx(tally.etr / tally.cost)


def test_etr_is_tokens_a_step_and_cost_is_time_a_step_in_baselines() -> None:
    tally = Tally()
    tally.add(3, 1.5)
    tally.add(1, 2.5)
    assert (tally.etr, tally.cost, tally.utility) == (2.0, 2.0, 1.0)


def test_without_drafts_a_request_costs_one_step_however_slow_the_step_was() -> None:
    assert cost_share(5.0, 1.0, 3, 0, 4) == 1.0


def test_a_request_is_charged_at_least_its_part_of_the_step() -> None:
    # Half the baseline's time: 1 + 4 * (1 - 0.5) * -1 would be below zero.
    assert cost_share(0.5, 1.0, 4, 2, 2) == 0.5 / 4
    # Where the step was not quicker than the baseline the share is 1 / n, and never the larger.
    assert cost_share(1.0, 1.0, 4, 2, 2) == 1.0
    assert cost_share(0.75, 1.0, 4, 2, 2) == 0.75 / 4
    assert cost_share(0.875, 1.0, 4, 2, 2) == 1 - 4 * 0.125


def test_an_empty_window_is_no_speculation() -> None:
    assert (Tally().etr, Tally().cost, Tally().utility) == (1.0, 1.0, 1.0)


def test_a_baseline_may_need_more_samples_than_are_kept_for_free() -> None:
    baseline = Baseline(Baseline.window + 4, 100)
    for i in range(Baseline.window + 4):
        assert baseline.due(1), i
        baseline.observe(1, 0.1)
    assert baseline.at(1) == 0.1
    assert not baseline.due(1)


@given(times, times)
def test_for_one_request_cost_is_the_paper_s(seconds: float, baseline: float) -> None:
    assert cost_share(seconds, baseline, 1, 3, 3) == pytest.approx(seconds / baseline)


@given(drafts, st.floats(0.0, 5.0))
def test_costs_of_a_batch_average_to_the_step_s_cost(ks: list[int], extra: float) -> None:
    costs = [cost_share(1 + extra, 1.0, len(ks), k, sum(ks)) for k in ks]
    assert sum(costs) / len(ks) == pytest.approx(1 + extra)
    assert all(cost == 1 for cost, k in zip(costs, ks, strict=True) if k == 0)


@given(st.integers(1, 64), st.floats(1.0, 3.0))
def test_equal_drafts_cost_everyone_the_step_s_cost(n: int, slower: float) -> None:
    assert cost_share(slower, 1.0, n, 2, 2 * n) == pytest.approx(slower)


@given(drafts, st.floats(0.0, 5.0), st.integers(0, 8))
def test_a_utility_above_1_means_more_throughput_for_the_batch(
    ks: list[int], extra: float, accepted: int
) -> None:
    """The definition's point: r's drafts pay exactly if the batch is faster with than without."""
    r = max(range(len(ks)), key=ks.__getitem__)
    accepted = min(accepted, ks[r])
    n = len(ks)
    share = extra * ks[r] / sum(ks)  # r's part of the extra time, in baselines
    utility = (1 + accepted) / cost_share(1 + extra, 1.0, n, ks[r], sum(ks))
    gain = (n + accepted) / (1 + share) - n  # tokens per baseline, r's drafts alone
    if abs(gain) > 1e-9:
        assert (utility > 1) == (gain > 0)


@given(st.integers(2, 256), st.integers(1, 8), st.floats(0.01, 5.0))
def test_noise_never_makes_a_cost_zero_or_negative(n: int, k: int, seconds: float) -> None:
    assert cost_share(seconds, 1.0, n, k, k) > 0


def test_baseline_needs_its_samples_and_survives_an_outlier() -> None:
    baseline = Baseline(steps=4, refresh=100)
    for seconds in (1.0, 1.1, 60.0):
        assert baseline.due(1)
        baseline.observe(1, seconds)
        assert baseline.at(1) is None
    baseline.observe(1, 0.9)
    assert not baseline.due(1)
    assert baseline.at(1) == pytest.approx(1.05)


def test_baseline_is_due_after_its_age_and_keeps_the_old_value_meanwhile() -> None:
    baseline = Baseline(steps=4, refresh=10)
    for _ in range(4):
        baseline.observe(1, 1.0)
    for age in range(10):
        assert not baseline.due(1), age
        baseline.tick(1)
    for _ in range(4):
        assert baseline.due(1)
        assert baseline.at(1) == 1.0
        baseline.observe(1, 2.0)
    assert not baseline.due(1)
    assert baseline.at(1) == 2.0


def test_baseline_is_read_between_near_batch_sizes_only() -> None:
    baseline = Baseline(steps=1, refresh=100)
    for n, seconds in ((4, 1.0), (6, 1.5), (16, 3.0)):
        baseline.observe(n, seconds)
    assert baseline.at(5) == pytest.approx(1.25)
    assert baseline.at(10) is None  # 6 and 16 are too far apart
    assert baseline.at(3) is None
    assert baseline.at(17) is None
    assert baseline.due(10)
    assert not baseline.due(5)


def test_the_median_of_the_16_latest_samples_counts() -> None:
    baseline = Baseline(steps=4, refresh=100)
    for seconds in [9.0] * 9 + [1.0] * 8:
        baseline.observe(1, seconds)
    assert baseline.at(1) == 5.0  # of the 16 latest, half each


def test_samples_of_a_first_value_must_be_no_older_than_a_value_may_be() -> None:
    for ticks, value in ((1, 5.0), (2, None)):
        baseline = Baseline(steps=2, refresh=2)
        baseline.observe(1, 9.0)
        for _ in range(ticks):
            baseline.tick(1)
        baseline.observe(1, 1.0)
        assert baseline.at(1) == value


def test_samples_taken_while_the_value_is_young_join_the_old_ones() -> None:
    baseline = Baseline(steps=1, refresh=10)
    baseline.observe(1, 1.0)
    baseline.tick(1)
    baseline.observe(1, 3.0)
    assert baseline.at(1) == 2.0


def test_an_old_value_is_renewed_from_new_samples_alone_even_if_drafts_come_between() -> None:
    baseline = Baseline(steps=3, refresh=2)
    for _ in range(3):
        baseline.observe(1, 1.0)
    for _ in range(2):
        baseline.tick(1)
    baseline.observe(1, 5.0)
    baseline.tick(1)  # a step with drafts: the samples so far stay
    baseline.observe(1, 6.0)
    assert baseline.at(1) == 1.0
    baseline.observe(1, 7.0)
    assert baseline.at(1) == 6.0


def test_a_renewed_value_is_young_and_can_be_renewed_again() -> None:
    baseline = Baseline(steps=1, refresh=2)
    for seconds in (1.0, 2.0, 4.0):
        baseline.observe(1, seconds)
        assert baseline.at(1) == seconds
        assert not baseline.due(1)
        baseline.tick(1)
        assert not baseline.due(1)
        baseline.tick(1)
        assert baseline.due(1)


def test_a_size_that_has_only_grown_older_is_read_between_its_neighbours() -> None:
    baseline = Baseline(steps=1, refresh=100)
    baseline.tick(5)  # seen with drafts, never without
    for n, seconds in ((4, 1.0), (6, 3.0)):
        baseline.observe(n, seconds)
    assert baseline.at(5) == 2.0
    assert not baseline.due(5)


def test_between_sizes_the_baseline_is_a_straight_line_to_half_as_much_again() -> None:
    baseline = Baseline(steps=1, refresh=100)
    baseline.observe(10, 1.0)
    baseline.observe(15, 2.0)
    assert [baseline.at(n) for n in (11, 12, 14)] == pytest.approx([1.2, 1.4, 1.8])
    baseline.observe(23, 9.0)  # beyond 15 times 1.5
    assert baseline.at(20) is None
