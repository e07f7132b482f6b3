"""One small example for each rule of the paper, and of ours, that `cascade` follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.policies.cascade import (
    LONGEST_SET,
    Cascade,
    CascadeSettings,
    best_trial,
    next_trial,
)
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.policies import create
from tests.simulate import BASE, play

PAPER = CascadeSettings()


def cascade(max_k: int = 8, /, **options: float) -> Cascade:
    policy = create("cascade", max_k, options)
    assert isinstance(policy, Cascade)
    return policy


def run(
    policy: Cascade, utility: Callable[[int, int], float], steps: int, max_k: int = 8
) -> list[tuple[str, int, int]]:
    """Return the phases of a request whose drafts are all right, at a utility by step and K."""
    cost = lambda step, k: (k + 1) / utility(step, k) if k else 1.0
    return play(policy, steps, cost, lambda _step, k: k + 1, max_k).phases()


def table(*utilities: float) -> Callable[[int, int], float]:
    """Return the utility by K, from K = 1 on; beyond the table it falls to nothing."""
    return lambda _step, k: (1.0, *utilities)[k] if k <= len(utilities) else 0.1


LOSING = table(0.8, 0.7, 0.6)


# ---- hill climbing: which K comes next -----------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "max_k", "then"),
    [
        # The first trial says where to look: above it where it pays, below where it does not.
        ([(3, 1.5)], 8, 4),
        ([(3, 1.0)], 8, 4),
        ([(3, 0.9)], 8, 2),
        ([(3, 1.5)], 4, 4),
        ([(3, 1.5)], 3, 2),  # nothing is above the cap
        ([(1, 1.5)], 1, None),
        # Rising: keep the direction.
        ([(3, 1.2), (4, 1.5)], 8, 5),
        ([(3, 0.5), (2, 0.8)], 8, 1),
        ([(3, 1.2), (4, 1.5)], 5, 5),
        ([(3, 1.2), (4, 1.5)], 4, None),
        # Falling after a first trial that pays: turn round, to the other side of the first.
        ([(3, 1.5), (4, 1.2)], 8, 2),
        ([(3, 1.5), (2, 1.2)], 8, 4),
        ([(3, 1.5), (2, 1.2)], 3, None),
        ([(1, 1.5), (2, 1.2)], 8, None),  # on the other side of 1 is 0
        # Falling after a first trial that loses: no climb, the curve has fallen from 1 since K = 0.
        ([(3, 0.8), (2, 0.5)], 8, None),
        ([(3, 1.0), (2, 0.5)], 8, 4),
        # Fell on both sides, or fell after rising: the maximum has been passed.
        ([(3, 1.5), (4, 1.2), (2, 0.9)], 8, None),
        ([(3, 1.2), (4, 1.5), (5, 1.2)], 8, None),
        # Turned, and rises there: go on.
        ([(4, 1.2), (5, 1.0), (3, 1.4)], 8, 2),
    ],
)
def test_the_search_climbs(trials: list[tuple[int, float]], max_k: int, then: int | None) -> None:
    assert next_trial(trials, max_k, PAPER) == then


def test_two_trials_closer_than_the_tolerance_end_the_test() -> None:
    # 10% of the utility before, on either side of it.
    assert next_trial([(3, 2.0), (4, 2.19)], 8, PAPER) is None
    assert next_trial([(3, 2.0), (4, 2.21)], 8, PAPER) == 5
    assert next_trial([(3, 2.0), (4, 1.81)], 8, PAPER) is None
    assert next_trial([(3, 2.0), (4, 1.79)], 8, PAPER) == 2
    # Without tolerance a plateau is no rise.
    assert next_trial([(3, 2.0), (4, 2.0)], 8, CascadeSettings(tolerance=0)) == 2
    # Closer than the tolerance, not as close: half of 2 is 1 exactly.
    assert next_trial([(3, 2.0), (4, 3.0)], 8, CascadeSettings(tolerance=0.5)) == 5


def test_a_loss_at_k_1_ends_the_test_and_a_gain_there_does_not() -> None:
    # From K = 2 to 1 utility rose, but what comes next is K = 0, whose utility is known.
    assert next_trial([(1, 0.9)], 8, PAPER) is None
    assert next_trial([(1, 1.0)], 8, PAPER) == 2
    # A loss below the first trial that paid: without the rule the search would turn upwards.
    assert next_trial([(2, 1.5), (1, 0.9)], 8, PAPER) is None
    assert next_trial([(2, 1.5), (1, 1.0)], 8, PAPER) == 3


def test_a_test_has_at_most_m_trials() -> None:
    rising = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert next_trial(rising[:3], 8, PAPER) == 4
    assert next_trial(rising, 8, PAPER) is None
    assert next_trial(rising[:2], 8, CascadeSettings(max_trials=2)) is None


def test_the_best_trial_is_that_of_highest_utility_and_0_where_none_reaches_1() -> None:
    assert best_trial([(3, 1.2), (4, 1.5), (5, 1.3)]) == 4
    assert best_trial([(3, 0.8), (2, 0.99)]) == 0
    assert best_trial([(3, 0.8), (2, 1.0)]) == 2


@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 4.0)), min_size=1, max_size=4),
)
def test_the_best_trial_was_tried_and_none_was_better(trials: list[tuple[int, float]]) -> None:
    best = best_trial(trials)
    highest = max(u for _, u in trials)
    assert (best == 0) == (highest < 1)
    assert best == 0 or (best, highest) in trials


# ---- phases --------------------------------------------------------------------------------------


def test_a_test_takes_t_steps_a_trial_and_a_set_s_steps() -> None:
    # Best at K = 4: 3, 4, 5, then 4. Afterwards a test begins with the best K so far.
    phases = run(cascade(), table(1.1, 1.3, 1.6, 2.0, 1.5), 60)
    assert phases[:5] == [("baseline", 0, 4), *(("test", k, 4) for k in (3, 4, 5)), ("set", 4, 16)]
    assert phases[5:7] == [("test", 4, 4), ("test", 5, 4)]


def test_lengths_of_phases_are_settings() -> None:
    policy = cascade(
        trial_steps=2, set_steps=5, baseline_steps=3, first_k=2, max_trials=2, refresh_steps=1000
    )
    phases = run(policy, table(1.2, 1.5, 1.9, 2.4, 3.0), 12)
    assert phases == [("baseline", 0, 3), ("test", 2, 2), ("test", 3, 2), ("set", 3, 5)]


def test_a_test_begins_with_the_best_k_of_the_history_though_it_is_not_the_last() -> None:
    # All of 3, 4, 5 pay, 4 most. Then drafts stop paying, and the set at K = 4 shows that of 4.
    early, late = table(1.1, 1.3, 1.6, 2.0, 1.5), table(0.95, 0.8, 0.7, 0.6)
    utility = lambda step, k: early(step, k) if step < 16 else late(step, k)
    phases = run(cascade(), utility, 60)
    assert phases[4] == ("set", 4, 16)
    # So 3 is the best of what is known; it loses, and the search goes down from there.
    assert [(why, k) for why, k, _ in phases[5:9]] == [
        *(("test", k) for k in (3, 2, 1)),
        ("set", 0),
    ]


def test_a_set_phase_s_utility_is_remembered() -> None:
    # K = 4 is the best in the test and worth less than 3 in the set: the next test begins with 3.
    utility = lambda step, k: 1.2 if k == 4 and step >= 16 else table(1, 1, 1.6, 2, 1.5)(step, k)
    phases = run(cascade(), utility, 40)
    assert phases[4] == ("set", 4, 16)
    assert phases[5] == ("test", 3, 4)


def test_a_set_at_k_0_leaves_the_history_as_it_is() -> None:
    # Falls with K: the test goes 3, 2, 1 and ends; 1 was best, so the next begins with 1.
    phases = run(cascade(), table(0.9, 0.7, 0.5), 60)
    kinds = [(why, k) for why, k, _ in phases]
    assert kinds[1:6] == [("test", 3), ("test", 2), ("test", 1), ("set", 0), ("test", 1)]


def test_back_off_doubles_and_a_set_that_drafts_resets_it() -> None:
    sets = [steps for why, _, steps in run(cascade(), LOSING, 400) if why == "set"]
    assert sets[:4] == [16, 32, 64, 128]
    # Baseline 4, test 12, set 16, test of K = 1 4, set 32: at step 68 drafts begin to pay.
    pays = lambda step, k: 2.0 / k if 68 <= step < 90 else LOSING(step, k)
    found = [(k, steps) for why, k, steps in run(cascade(), pays, 300) if why == "set"]
    assert found[:5] == [(0, 16), (0, 32), (1, 16), (0, 16), (0, 32)]


def test_back_off_is_a_factor_with_an_end() -> None:
    def sets(**options: float) -> list[int]:
        phases = run(cascade(**options), LOSING, 400)
        return [steps for why, _, steps in phases if why == "set"]

    assert sets(backoff=1)[:3] == [16, 16, 16]
    assert sets(backoff=3)[:3] == [16, 48, 144]
    policy = cascade(backoff=1e15)
    policy.add("r", 8)
    for _ in range(60):
        (decision,) = policy.decide([Proposal("r")])
        policy.observe(Step((1 + decision.k) * BASE, True, (RequestStep("r", decision.k, 1),)))
    assert policy.explain("r").parts["next_set_steps"] == LONGEST_SET == 2**20


def test_a_request_that_may_not_speculate_stays_in_the_baseline() -> None:
    assert run(cascade(), table(2.0), 30, max_k=0) == [("baseline", 0, 30)]
    assert run(cascade(), table(2.0), 5, max_k=1)[1] == ("test", 1, 1)


def test_the_first_k_is_capped_by_request_and_engine() -> None:
    assert run(cascade(), table(1, 1, 1), 8, max_k=2)[1] == ("test", 2, 4)
    assert run(cascade(2), table(1, 1, 1), 8, max_k=8)[1] == ("test", 2, 4)


# ---- the baseline --------------------------------------------------------------------------------


def test_after_100_steps_with_drafts_the_baseline_is_measured_for_4() -> None:
    phases = run(cascade(), table(1.1, 1.3, 1.6, 2.0, 1.5), 260)
    drafted = 0
    for why, k, steps in phases:
        if why == "refresh":
            assert (drafted, k, steps) == (100, 0, 4)
            drafted = 0
        drafted += steps if k else 0
    assert [why for why, _, _ in phases].count("refresh") == 2


def test_steps_held_for_the_baseline_count_in_no_trial_and_no_set() -> None:
    # Due after 6 drafts: in the middle of the second trial, which still drafts four times.
    phases = run(cascade(refresh_steps=6), table(1.1, 1.3, 1.6, 2.0, 1.5), 30)
    assert phases[1:5] == [("test", 3, 4), ("test", 4, 2), ("refresh", 0, 4), ("test", 4, 2)]
    # Their tokens and costs do not enter the trial's utility either: 2.0 at K = 4, not less.
    policy = cascade(refresh_steps=6)
    utilities = {}
    policy.add("r", 8)
    cost = {0: 1.0, 3: 4 / 1.6, 4: 5 / 2.0, 5: 6 / 1.5}
    for _ in range(22):
        (d,) = policy.decide([Proposal("r")])
        policy.observe(Step(cost[d.k] * BASE, True, (RequestStep("r", d.k, d.k + 1),)))
        utilities = policy.explain("r").parts["utilities"]
    assert utilities == {3: pytest.approx(1.6), 4: pytest.approx(2.0), 5: pytest.approx(1.5)}


def test_a_batch_is_held_for_a_refresh_though_only_one_request_drafts() -> None:
    policy = cascade()
    policy.add("drafts", 8)
    policy.add("may not", 0)
    why = []
    for _ in range(110):
        a, b = policy.decide([Proposal("drafts"), Proposal("may not")])
        why.append((a.why, b.why))
        parts = (RequestStep("drafts", a.k, a.k + 1), RequestStep("may not", 0, 1))
        policy.observe(Step(BASE * (1 + 0.01 * a.k), True, parts))
    assert why.index(("refresh", "refresh")) == 104  # 4 for the baseline, 100 with drafts


def test_nothing_is_held_for_a_baseline_that_no_draft_needs() -> None:
    # At K = 0 every step is a sample, however old the value was.
    phases = run(cascade(refresh_steps=1), lambda _step, _k: 0.5, 60)
    sets = [run_ for run_ in phases if run_[0] == "set"]
    assert sets[0] == ("set", 0, 16)


def test_a_step_as_long_as_ten_baselines_counts_and_a_longer_one_is_a_pause() -> None:
    for seconds, counts in ((10.0, True), (10.1, False)):
        policy = cascade()
        policy.add("r", 8)
        for _ in range(4):
            policy.decide([Proposal("r")])
            policy.observe(Step(1.0, True, (RequestStep("r", 0, 1),)))
        policy.decide([Proposal("r")])
        policy.observe(Step(seconds, True, (RequestStep("r", 3, 4),)))
        assert policy.explain("r").utility == pytest.approx(0.4 if counts else 1.0)


def test_in_a_batch_cost_is_by_share_and_others_drafts_are_part_of_the_baseline() -> None:
    policy = cascade()
    policy.add("a", 8)
    policy.add("b", 8)

    def step(seconds: float, a: int, b: int) -> None:
        policy.decide([Proposal("a"), Proposal("b")])
        parts = (RequestStep("a", a, a + 1), RequestStep("b", b, 1), RequestStep("other", 2, 1))
        policy.observe(Step(seconds, True, parts))

    for _ in range(4):
        step(1.0, 0, 0)
    assert policy.explain("a").parts["baseline"] == 1.0
    step(1.6, 3, 1)
    # Three requests; 0.6 more, three quarters by a: 1 + 3 * 0.75 * 0.6 and 1 + 3 * 0.25 * 0.6.
    assert policy.explain("a").utility == pytest.approx(4 / 2.35)
    assert policy.explain("b").utility == pytest.approx(1 / 1.45)
    # The other's drafts are positions: with five in place of two the baseline is another one.
    parts = (RequestStep("a", 0, 1), RequestStep("b", 0, 1), RequestStep("other", 5, 1))
    policy.observe(Step(9.0, True, parts))
    assert policy.explain("a").parts["baseline"] is None


def test_prefill_steps_without_time_and_steps_of_others_change_nothing() -> None:
    policy = cascade()
    policy.add("r", 8)
    before = policy.explain("r")
    part = RequestStep("r", 0, 1)
    for step in (
        Step(None, True, (part,)),
        Step(1.0, False, (part,)),
        Step(1.0, True, (RequestStep("other", 0, 1),)),
    ):
        for _ in range(4):
            policy.observe(step)
        assert policy.explain("r") == before
        assert policy.decide([Proposal("r")])[0].why == "baseline"


# ---- how far a model drafter has to draft --------------------------------------------------------


def ahead(policy: Cascade, utility: Callable[[int, int], float], steps: int) -> list[int]:
    """Return what the policy promises in each step, for one request."""
    promised = []
    policy.add("r", 8)
    for i in range(steps):
        (d,) = policy.decide([Proposal("r")])
        promised.append(policy.lookahead(["r"]))
        cost = (d.k + 1) / utility(i, d.k) if d.k else 1.0
        policy.observe(Step(cost * BASE, True, (RequestStep("r", d.k, d.k + 1),)))
    return promised


def test_within_a_phase_no_more_is_drafted_ahead_than_its_k() -> None:
    promised = ahead(cascade(), table(1.1, 1.3, 1.6, 2.0, 1.5), 36)
    assert promised == [
        *(0, 0, 0, 3),  # the baseline ends with the first test's K
        *(3, 3, 3, 4),  # a trial ends with one more, at most,
        *(4, 4, 4, 5),
        *(5, 5, 5, 6),
        *[4] * 15,
        5,  # a set may show that another K of the history is the best
        *(4, 4, 4, 5),
    ]


def test_a_set_at_k_0_drafts_ahead_in_its_last_step_only() -> None:
    promised = ahead(cascade(), table(0.9, 0.7, 0.5), 33)
    assert promised[16:33] == [*[0] * 15, 1, 1]


def test_the_longest_of_several_requests_counts_and_no_request_wants_nothing() -> None:
    policy = cascade()
    policy.add("old", 8)
    for _ in range(5):
        policy.decide([Proposal("old")])
        policy.observe(Step(BASE, True, (RequestStep("old", 0, 1),)))
    policy.add("new", 8)
    assert policy.lookahead(["new"]) == 0
    assert policy.lookahead(["new", "old"]) == policy.lookahead(["old", "new"]) == 3
    assert policy.lookahead([]) == 0


# ---- settings ------------------------------------------------------------------------------------


def test_the_defaults_are_the_paper_s() -> None:
    assert (
        CascadeSettings(
            trial_steps=4,
            max_trials=4,
            set_steps=16,
            first_k=3,
            tolerance=0.10,
            backoff=2.0,
            baseline_steps=4,
            refresh_steps=100,
            pause=10.0,
        )
        == PAPER
    )


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *((name, 1) for name in ("trial_steps", "max_trials", "set_steps", "first_k", "backoff")),
        *(("baseline_steps", 1), ("refresh_steps", 1), ("tolerance", 0), ("pause", 3)),
    ],
)
def test_a_setting_below_its_least_value_is_refused_and_the_least_is_not(
    name: str, least: int
) -> None:
    assert getattr(cascade(**{name: least}).settings, name) == least
    with pytest.raises(ConfigError, match=f"{name} must be at least {least}"):
        cascade(**{name: least - 1})


# ---- what must not matter ------------------------------------------------------------------------


def played(names: Sequence[str], scale: float) -> list[dict[str, int]]:
    """Return each step's K by request, for three requests that accept 0, 2 and all of a draft."""
    policy = cascade()
    most = {"a": 0, "b": 2, "c": 8}
    for name in names:
        policy.add(name, 8)
    found = []
    for _ in range(150):
        ks = {d.request_id: d.k for d in policy.decide([Proposal(name) for name in names])}
        parts = tuple(RequestStep(n, ks[n], 1 + min(ks[n], most[n])) for n in names)
        policy.observe(Step(scale * (1 + 0.07 * sum(ks.values())), True, parts))
        found.append(ks)
    return found


def test_neither_the_unit_of_time_nor_the_order_of_requests_matters() -> None:
    as_is = played("abc", 1.0)
    assert played("abc", 1024.0) == as_is  # a power of two, so that rounding is the same
    assert played("cab", 1.0) == as_is
    assert any(ks["c"] > 3 for ks in as_is)
