"""Paired speed-ups and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from moecascade.evaluation.report.statistics import (
    Pairs,
    Speedup,
    Unit,
    interval,
    joined,
    pair,
    speedup,
)

FORTY = tuple(str(i) for i in range(40))


def unit(name: str, tokens: float, seconds: float) -> Unit:
    return Unit(("run", name), "code", name, tokens, seconds)


def test_what_is_compared_is_the_time_for_equally_many_tokens():
    # 0.02 s a token without, 0.01 s with speculation; that the second answer is short is no gain.
    pairs = pair([unit("a", 10, 0.1)], [unit("a", 100, 2.0), unit("b", 1, 1.0)])
    assert pairs.ratio == pytest.approx(2.0)
    assert len(pairs) == 1  # b was asked once


def test_long_answers_weigh_more_than_short_ones():
    after = [unit("a", 100, 5.0), unit("b", 10, 2.0)]  # twice as fast for 10 s, half for 1 s
    found = speedup(pair(after, [unit("a", 100, 10.0), unit("b", 10, 1.0)]))
    assert found is not None
    assert found.value == pytest.approx((10 + 1) / (5 + 2))
    assert found.each == pytest.approx((2.0, 0.5))


def test_the_interval_of_a_constant_ratio_is_a_point():
    before = np.array([1.0, 5.0, 0.3])
    pairs = Pairs(before, before / 1.25, ("a", "a", "a"), ("1", "2", "3"))
    assert interval(pairs) == pytest.approx((1.25, 1.25))
    for few in (1, 2):
        asked = ("1", "2")[:few]
        assert interval(Pairs(before[:few], before[:few], ("a",) * few, asked)) is None


def test_nothing_paired_has_no_speed_up():
    assert speedup(pair([], [])) is None
    assert speedup(joined([])) is None


def test_to_measure_the_same_prompts_again_makes_no_interval_narrower():
    """Another model, temperature or seed is another measurement, but no other prompt."""
    random = np.random.default_rng(3)
    before, after = np.ones(40), random.uniform(0.5, 1.0, size=40)
    once = Pairs(before, after, ("a",) * 40, FORTY)
    assert interval(joined([once, once])) == pytest.approx(interval(once))


@pytest.mark.parametrize(("prompts", "tasks"), [(40, "a"), (4, "a"), (9, "abc"), (6, "abc")])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(prompts: int, tasks: str):
    random = np.random.default_rng(7)
    covered = 0
    for i in range(200):
        before = random.uniform(1, 2, size=prompts)
        after = before / 1.3 * random.lognormal(-0.02, 0.2, size=prompts)  # mean factor 1
        of = tuple(tasks[j % len(tasks)] for j in range(prompts))
        ends = interval(Pairs(before, after, of, FORTY[:prompts]), seed=i)
        assert ends is not None
        covered += ends[0] <= 1.3 <= ends[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_that_tasks_differ_does_not_widen_the_interval_of_their_mix():
    before = np.ones(40)
    after = np.array([0.5, 1.0] * 20)  # two tasks, each constant
    mixed = Pairs(before, after, ("a", "b") * 20, FORTY)
    assert interval(mixed) == pytest.approx((40 / 30, 40 / 30))


def test_a_single_prompt_of_a_task_is_drawn_with_all_others_where_they_are_pooled():
    before, after = np.ones(3), np.array([0.5, 1.0, 0.8])
    short = Pairs(before, after, ("a", "b", "c"), FORTY[:3])
    alone, pooled = speedup(short), speedup(short, pooled=True)
    assert alone is not None
    assert pooled is not None
    assert (alone.low, alone.value) == (None, pooled.value)
    assert pooled.low is not None
    assert pooled.high is not None
    assert pooled.low < pooled.value < pooled.high


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(None, None, ""), (0.9, 1.1, ""), (1.01, 1.2, "faster"), (0.8, 0.99, "slower")],
)
def test_a_verdict_is_given_only_beyond_doubt(low: float | None, high: float | None, verdict: str):
    assert Speedup(1.0, low, high, 2, (1.0,)).verdict == verdict
