"""The paper's policy, as properties on synthetic costs and acceptance."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.policies.cascade import Cascade, CascadeSettings, next_trial
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.policies import create
from tests.simulate import BASE, curve, play

HOPELESS = curve([1, 1.35, 1.68, 1.95, 2.2, 2.4, 2.55, 2.7, 2.8])
NOTHING_ACCEPTED = lambda _step, _k: 1
ALL_ACCEPTED = lambda _step, k: k + 1

costs_that_never_pay = st.lists(st.floats(0.02, 1.0), min_size=8, max_size=8).map(
    lambda rises: list(itertools.accumulate(rises, initial=1.0))
)


def cascade(**options: float) -> Cascade:
    policy = create("cascade", 8, options)
    assert isinstance(policy, Cascade)
    return policy


@given(costs_that_never_pay)
def test_settles_at_k_0_when_no_k_pays_and_backs_off(costs: list[float]) -> None:
    played = play(cascade(), 600, curve(costs), NOTHING_ACCEPTED)
    sets = [run for run in played.phases() if run[0] == "set"]
    assert all(k == 0 for _, k, _ in sets)
    assert [steps for _, _, steps in sets[:5]] == [16, 32, 64, 128, 256]


@given(
    best=st.integers(1, 6),
    rises=st.lists(st.floats(0.2, 1.0), min_size=6, max_size=6),
    falls=st.lists(st.floats(1.02, 1.5), min_size=8, max_size=8),
    peak=st.floats(1.05, 3.0),
)
def test_finds_the_best_k_of_a_unimodal_utility_in_one_test(
    best: int, rises: list[float], falls: list[float], peak: float
) -> None:
    # From 1 at K = 0 the utility rises to its peak at the best K, then falls.
    way = list(itertools.accumulate(rises[:best]))
    utility = {k: peak ** (way[k - 1] / way[-1]) for k in range(1, best + 1)}
    for k in range(best + 1, 9):
        utility[k] = utility[k - 1] / falls[k - 1]
    cost = lambda _step, k: 1.0 if k == 0 else (k + 1) / utility[k]
    played = play(cascade(tolerance=0.0), 60, cost, ALL_ACCEPTED)
    phases = played.phases()
    end = next(i for i, run in enumerate(phases) if run[0] == "set")
    tests = phases[1:end]
    assert phases[end][1] == best
    assert sum(steps for _, _, steps in tests) <= 16
    assert all(why == "test" and steps == 4 for why, _, steps in tests)


@pytest.mark.parametrize("best", range(1, 7))
def test_converges_to_within_the_tolerance_with_the_paper_s_settings(best: int) -> None:
    utility = {k: 2.0 * 0.8 ** abs(k - best) for k in range(1, 9)}
    cost = lambda _step, k: 1.0 if k == 0 else (k + 1) / utility[k]
    played = play(cascade(), 100, cost, ALL_ACCEPTED)
    first_set = next(run for run in played.phases() if run[0] == "set")
    assert first_set[1] == best


@given(change=st.integers(20, 300))
def test_takes_up_speculation_within_one_set_phase_after_a_change(change: int) -> None:
    emitted = lambda step, k: 1 + k if step >= change else 1
    played = play(cascade(), 1200, HOPELESS, emitted)
    # A change during a test may be too late for it; the set phase that follows is the one to wait.
    ends = list(itertools.accumulate(steps for _, _, steps in played.phases()))
    in_set = [why == "set" for why, _, _ in played.phases()]
    waited = next(end for end, is_set in zip(ends, in_set, strict=True) if is_set and end > change)
    assert all(played.ks[waited : waited + 8])
    # from then on it stays on, but for refreshing the baseline
    later = zip(played.ks[waited:], played.why[waited:], strict=True)
    assert all(k for k, why in later if why != "refresh")


def test_a_hopeless_request_loses_at_most_6_percent_and_more_without_backoff() -> None:
    with_backoff = play(cascade(), 250, HOPELESS, NOTHING_ACCEPTED)
    without = play(cascade(backoff=1.0), 250, HOPELESS, NOTHING_ACCEPTED)
    assert with_backoff.slowdown <= 0.06
    assert without.slowdown >= 1.5 * with_backoff.slowdown


def test_backoff_returns_to_16_once_speculation_pays_again() -> None:
    emitted = lambda step, k: 1 + k if 100 <= step < 300 else 1
    played = play(cascade(), 700, HOPELESS, emitted)
    sets = [(k, steps) for why, k, steps in played.phases() if why == "set"]
    first_on = next(i for i, (k, _) in enumerate(sets) if k)
    off_again = next(i for i, (k, _) in enumerate(sets) if i > first_on and k == 0)
    assert sets[first_on - 1][1] > 16
    assert [steps for _, steps in sets[off_again : off_again + 2]] == [16, 32]


def test_starts_with_a_baseline_and_the_configured_first_k() -> None:
    played = play(cascade(), 40, HOPELESS, NOTHING_ACCEPTED)
    assert played.phases()[:2] == [("baseline", 0, 4), ("test", 3, 4)]
    played = play(cascade(first_k=2, baseline_steps=6), 40, HOPELESS, NOTHING_ACCEPTED)
    assert played.phases()[:2] == [("baseline", 0, 6), ("test", 2, 4)]


def test_refreshes_the_baseline_about_every_100_steps_while_speculating() -> None:
    played = play(cascade(), 1000, curve([1.0] * 9), ALL_ACCEPTED)
    refreshes = [run for run in played.phases() if run[0] == "refresh"]
    assert 8 <= len(refreshes) <= 10
    assert all(steps == 4 for _, _, steps in refreshes)


def test_a_drifting_baseline_is_followed() -> None:
    # Drafts cost 30% and earn 20%. Half way everything becomes three times as slow; taken against
    # the old baseline, no speculation would then look like a loss and the refresh must mend that.
    cost = lambda step, k: (1.3 if k else 1.0) * (3 if step >= 500 else 1)
    emitted = lambda _step, k: 1.2 if k else 1
    played = play(cascade(), 1500, cost, emitted)
    assert played.ks[700:].count(0) > 0.9 * len(played.ks[700:])


def test_pauses_and_prefill_do_not_count() -> None:
    policy = cascade()
    clean = play(cascade(), 200, HOPELESS, ALL_ACCEPTED)
    policy.add("r", 8)
    ks = []
    for i in range(200):
        (decision,) = policy.decide([Proposal("r")])
        ks.append(decision.k)
        part = (RequestStep("r", decision.k, decision.k + 1),)
        policy.observe(Step(HOPELESS(i, decision.k) * BASE, True, part))
        policy.observe(Step(7.0, False, part))
        policy.observe(Step(None, True, part))
        if ks[-1]:
            policy.observe(Step(100 * BASE, True, part))  # a pause of the machine
    assert ks[:50] == clean.ks[:50]  # until the pauses, too, have aged the baseline to a refresh


@given(
    st.lists(st.floats(0.1, 4.0), min_size=8, max_size=8),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.1]),
    st.integers(1, 9),
)
def test_a_search_stays_in_range_never_repeats_and_ends(
    utility: list[float], first_k: int, max_k: int, tolerance: float, most: int
) -> None:
    settings = CascadeSettings(tolerance=tolerance, max_trials=most)
    trials: list[tuple[int, float]] = []
    k: int | None = min(first_k, max_k)
    while k is not None:
        assert 1 <= k <= max_k
        assert k not in dict(trials)
        trials.append((k, utility[k - 1]))
        assert len(trials) <= most
        k = next_trial(trials, max_k, settings)


@given(cap=st.integers(0, 8), accepted=st.booleans())
def test_a_request_s_cap_holds(cap: int, accepted: bool) -> None:
    emitted = ALL_ACCEPTED if accepted else NOTHING_ACCEPTED
    policy = cascade()
    played = play(policy, 300, HOPELESS, emitted, max_k=cap)
    assert max(played.ks) <= cap


def test_lookahead_is_never_below_the_next_decision() -> None:
    for emitted in (ALL_ACCEPTED, NOTHING_ACCEPTED, lambda i, k: 1 + min(k, i // 50 % 4)):
        policy = cascade()
        policy.add("r", 8)
        for i in range(500):
            (decision,) = policy.decide([Proposal("r")])
            promised = policy.lookahead(["r"])
            part = RequestStep("r", decision.k, emitted(i, decision.k))
            policy.observe(Step(HOPELESS(i, decision.k) * BASE, True, (part,)))
            assert policy.decide([Proposal("r")])[0].k <= promised


def test_in_a_batch_each_request_finds_its_own_k() -> None:
    # Four requests; drafts of two are always accepted, of two never. Each draft token costs the
    # step 5% of the baseline.
    policy = cascade()
    good, bad = ["g1", "g2"], ["b1", "b2"]
    for request_id in good + bad:
        policy.add(request_id, 8)
    tail = []
    for i in range(400):
        decisions = policy.decide([Proposal(r) for r in good + bad])
        drafted = sum(d.k for d in decisions)
        parts = tuple(
            RequestStep(d.request_id, d.k, d.k + 1 if d.request_id in good else 1)
            for d in decisions
        )
        policy.observe(Step(BASE * (1 + 0.05 * drafted), True, parts))
        if i >= 300:
            tail += decisions
    k_of = lambda ids: [d.k for d in tail if d.request_id in ids]
    assert sum(k_of(bad)) / len(k_of(bad)) < 0.2
    assert sum(k_of(good)) / len(k_of(good)) > 3


def test_learns_a_baseline_though_others_in_the_batch_always_draft() -> None:
    policy = cascade()
    policy.add("ours", 8)
    ks = []
    for _ in range(100):
        (decision,) = policy.decide([Proposal("ours")])
        ks.append(decision.k)
        parts = (RequestStep("ours", decision.k, 1), RequestStep("theirs", 3, 2))
        policy.observe(Step(BASE * (1 + 0.1 * (3 + decision.k)), True, parts))
    assert any(ks)
    assert ks[-10:] == [0] * 10


def test_nothing_is_left_of_dropped_requests() -> None:
    policy = cascade()
    for i in range(10):
        policy.add(f"r{i}", 8)
        policy.drop(f"r{i}")
        policy.drop(f"r{i}")
    assert policy._requests == {}
