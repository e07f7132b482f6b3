"""What others use: small cases with numbers by hand, where `test_baselines` asks for outcomes."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import numpy as np
import pytest

from moecascade.core.peers.bandit import Bandit
from moecascade.core.peers.goodput import Goodput, expected_tokens
from moecascade.core.peers.huggingface import HuggingFace
from moecascade.core.peers.sglang_adaptive import TIERS, SglangSettings, Tier
from moecascade.core.peers.survival_budget import SurvivalBudget, _Counts, _survived
from moecascade.core.step import Expectation, Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.policies import PEERS, create

DRAFT = list(range(8))
NAMES = [policy.name for policy in PEERS]


def k_of(policy: Any, *request_ids: str) -> list[int]:
    return [d.k for d in policy.decide([Proposal(r, DRAFT) for r in request_ids])]


def seen(policy: Any, seconds: float | None, *parts: tuple[str, int, int]) -> None:
    policy.observe(Step(seconds, True, tuple(RequestStep(*part) for part in parts)))


# ---- the published constants ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("sglang-adaptive", {"ema_alpha": 0.2, "update_interval": 5, "warmup": 10, "first_k": 3}),
        ("hf-heuristic", {"first_k": 20, "transient": False}),
        ("goodput", {"memory": 100.0, "first_rate": 0.7}),
        ("bandit", {"first_arm": 1, "last_arm": 4, "rounds": 2, "exploration": 6.0}),
        ("dynamic-table", {"table": ((1, 4, 5), (5, 16, 3), (17, 64, 1), (65, 65_536, 0))}),
        (
            "survival-budget",
            {"experts": 8, "top_k": 2, "memory": 20.0, "belief": 2.0, "first_rate": 0.6},
        ),
    ],
)
def test_defaults_are_those_that_the_module_names(name: str, constants: dict[str, Any]) -> None:
    settings = create(name, 8).settings
    assert {key: getattr(settings, key) for key in constants} == constants


def test_sglang_has_these_candidates() -> None:
    assert TIERS == {
        1: ((1, 3, 5, 7), -0.25),
        8: ((0, 1, 3), 0.0),
        32: ((0, 1), 0.0),
        64: ((0,), 0.0),
    }


@pytest.mark.parametrize(
    ("spec", "bad"),
    [
        ("sglang-adaptive[ema_alpha=1]", "sglang-adaptive[ema_alpha=1.1]"),
        ("sglang-adaptive[ema_alpha=0.000001]", "sglang-adaptive[ema_alpha=0.0000005]"),
        ("sglang-adaptive[update_interval=1]", "sglang-adaptive[update_interval=0]"),
        ("sglang-adaptive[warmup=0]", "sglang-adaptive[warmup=-1]"),
        ("sglang-adaptive[first_k=0]", "sglang-adaptive[first_k=-1]"),
        ("hf-heuristic[first_k=1]", "hf-heuristic[first_k=0]"),
        ("goodput[memory=1]", "goodput[memory=0.9]"),
        ("goodput[first_rate=0]", "goodput[first_rate=-0.1]"),
        ("goodput[first_rate=1]", "goodput[first_rate=1.1]"),
        ("bandit[first_arm=0]", "bandit[first_arm=-1]"),
        ("bandit[first_arm=4]", "bandit[first_arm=5]"),
        ("bandit[rounds=1]", "bandit[rounds=0]"),
        ("bandit[exploration=0]", "bandit[exploration=-1]"),
        ("dynamic-table[table=[[1,1,0]]]", "dynamic-table[table=[[1,1,-1]]]"),
        ("dynamic-table[table=[[1,1,0],[2,2,1]]]", "dynamic-table[table=[[1,2,0],[2,2,1]]]"),
        ("survival-budget[top_k=8]", "survival-budget[top_k=9]"),
        ("survival-budget[top_k=1]", "survival-budget[top_k=0]"),
        ("survival-budget[memory=1]", "survival-budget[memory=0.9]"),
        ("survival-budget[belief=0.001]", "survival-budget[belief=0.0005]"),
        ("survival-budget[first_rate=0.001]", "survival-budget[first_rate=0.0005]"),
        ("survival-budget[first_rate=0.999]", "survival-budget[first_rate=0.9995]"),
    ],
)
def test_the_ends_of_a_range_are_allowed_and_what_is_beyond_is_not(spec: str, bad: str) -> None:
    create(spec, 8)
    with pytest.raises(ConfigError):
        create(bad, 8)


@pytest.mark.parametrize("name", NAMES)
def test_whether_a_request_teaches_the_next_ones(name: str) -> None:
    stateless = {"dynamic-table", "hf-heuristic"}
    assert create(name, 8).learns is (name not in stateless)


# ---- SGLang --------------------------------------------------------------------------------------


def test_sglang_begins_one_below_its_k_and_averages_by_alpha() -> None:
    tier = Tier((1, 3, 5, 7), -0.25, SglangSettings())
    assert (tier.k, tier.average) == (3, 2.0)
    tier.update(7.0)
    assert tier.average == pytest.approx(2.0 + 0.2 * 5.0)
    assert Tier((1, 5), 0.0, SglangSettings()).k == 5  # the middle where 3 is no candidate
    assert Tier((0, 1, 5), 0.0, SglangSettings()).k == 1


def test_sglang_at_zero_keeps_the_average_unless_it_was_below() -> None:
    settings = SglangSettings(ema_alpha=1.0, update_interval=1, warmup=0, first_k=0)
    tier = Tier((0, 1, 3), 0.0, settings)
    assert tier.average == -1.0
    tier.update(9.0)  # nothing was drafted: no sample
    assert (tier.k, tier.average) == (1, 0.0)
    tier.update(0.5)  # not above half a draft: down to 0
    assert tier.k == 0
    tier.update(9.0)
    assert (tier.k, tier.average) == (1, 0.5)
    tier.update(0.51)  # above, so it stays, and above 1 - 0.5: up
    assert tier.k == 3


def test_sglang_with_one_candidate_has_no_way_to_go() -> None:
    tier = Tier((0,), 0.0, SglangSettings(update_interval=1, warmup=0))
    for _ in range(3):
        tier.update(1.0)
        assert tier.k == 0


def test_sglang_moves_its_batch_by_the_mean_of_those_that_drafted() -> None:
    policy: Any = create("sglang-adaptive[ema_alpha=1]", 8)
    for name in "abc":
        policy.add(name, 8)
    tier = policy._tiers[1]
    seen(policy, 0.02, ("a", 3, 4), ("b", 3, 2), ("c", 0, 1))
    assert tier.average == 2.0  # of 3 and 1
    seen(policy, 0.02, ("a", 0, 1), ("b", 0, 1))  # nothing drafted: not counted
    assert (tier.average, tier._steps) == (2.0, 1)


# ---- Hugging Face --------------------------------------------------------------------------------


def test_hf_keeps_each_request_within_its_cap_and_its_k() -> None:
    policy: Any = create("hf-heuristic[first_k=3]", 8)
    assert isinstance(policy, HuggingFace)
    policy.add("a", 4)
    policy.add("b", 8)
    seen(policy, 0.02, ("a", 3, 4), ("b", 3, 3), ("other", 3, 4))
    assert k_of(policy, "a", "b") == [4, 2]
    assert policy.lookahead(["a"]) == 6
    assert policy.lookahead(["b"]) == 4
    assert policy.lookahead(["a", "b"]) == 6
    assert policy.lookahead([]) == 2
    policy.drop("unknown")
    policy.drop("b")
    policy.add("c", 8)
    assert k_of(policy, "c") == [2]


# ---- goodput -------------------------------------------------------------------------------------


def test_goodput_s_rate_fades_and_counts_what_was_compared() -> None:
    policy = create("goodput[memory=2,first_rate=0.5]", 4)
    assert isinstance(policy, Goodput)
    policy.add("r", 4)
    assert policy.rate == 0.5
    seen(policy, 0.02, ("r", 4, 3))  # two right, the third wrong
    assert policy.rate == pytest.approx((0.5 * 0.5 + 2) / (0.5 * 1 + 3))
    seen(policy, 0.02, ("r", 2, 3))  # both right
    assert policy.rate == pytest.approx((0.5 * 2.25 + 2) / (0.5 * 3.5 + 2))
    rate = policy.rate
    seen(policy, 0.02, ("r", 0, 1))
    assert policy.rate == rate


def test_goodput_tries_no_drafts_twice_and_the_longest_twice() -> None:
    policy: Any = create("goodput", 4)
    policy.add("r", 4)
    tried = []
    for _ in range(4):
        (k,) = k_of(policy, "r")
        tried.append(k)
        seen(policy, 0.02, ("r", k, 1))
    assert tried == [0, 0, 4, 4]
    fresh: Any = create("goodput", 4)
    fresh.add("r", 4)
    for _ in range(5):  # the drafter has nothing: the two at K = 4 wait
        seen(fresh, 0.02, ("r", 0, 1))
    assert fresh._trying == [4, 4]
    assert k_of(fresh, "r") == [4]


def test_goodput_s_line_is_that_of_least_squares_and_its_k_the_best_on_it() -> None:
    policy: Any = create("goodput[memory=1000000000000]", 6)
    for name in "ab":
        policy.add(name, 6)
    samples = [(0, 0, 0.020), (0, 0, 0.022), (6, 6, 0.050), (6, 6, 0.048), (3, 0, 0.031)]
    for a, b, seconds in samples:
        seen(policy, seconds, ("a", a, 1 + a * 2 // 3), ("b", b, 1 + b * 2 // 3))
    seen(policy, None, ("a", 6, 5), ("b", 6, 5))  # no time: no sample for the line
    policy._trying = []
    tokens = np.array([2 + a + b for a, b, _ in samples])
    slope, start = np.polyfit(tokens, [seconds for *_, seconds in samples], 1)
    for n in (1, 2, 8):
        rates = [expected_tokens(policy.rate, k) / (start + slope * n * (k + 1)) for k in range(7)]
        assert policy.chosen(n) == int(np.argmax(rates))
    # The batch's size matters: what a draft costs grows with it, what a step costs does not.
    assert policy.chosen(1) > policy.chosen(8)


def test_goodput_without_a_line_or_with_a_falling_one_takes_drafts_as_free() -> None:
    policy: Any = create("goodput", 4)
    policy.add("r", 4)
    policy._trying = []
    assert policy.chosen(1) == 4
    seen(policy, 0.04, ("r", 0, 1))
    seen(policy, 0.02, ("r", 4, 5))
    assert policy.chosen(1) == 4


# ---- bandit --------------------------------------------------------------------------------------


def test_the_bandit_s_bound_is_the_published_one() -> None:
    policy = create("bandit[last_arm=2]", 8)
    assert isinstance(policy, Bandit)
    policy.add("r", 8)
    # Tokens per request and seconds by pull. K = 1: 2 in 0.02, 3 times; K = 2: 3 in 0.04, twice.
    for k, tokens, seconds in [(1, 2, 0.02)] * 3 + [(2, 3, 0.04)] * 2:
        policy._k = k
        seen(policy, seconds, ("r", k, tokens))
    one, two = policy._arms
    assert (one.pulls, one.tokens, two.pulls, two.tokens) == (3, 6, 2, 6)
    assert (one.seconds, two.seconds) == pytest.approx((0.06, 0.08))
    # The mean decides at a factor of 6, exploration at 12.
    for factor, best in ((6, 1), (12, 2)):
        bounds = {1: 2.0 + sqrt(factor * log(5) / 3), 2: 1.5 + sqrt(factor * log(5) / 2)}
        assert max(bounds, key=bounds.__getitem__) == best
        other = create(f"bandit[last_arm=2,exploration={factor}]", 8)
        assert isinstance(other, Bandit)
        other._arms = policy._arms
        assert other.chosen(1) == best


def test_the_bandit_counts_tokens_per_request_and_no_step_without_time_or_draft() -> None:
    policy = create("bandit[first_arm=0]", 8)
    assert isinstance(policy, Bandit)
    for name in "ab":
        policy.add(name, 8)
    policy._k = 1
    seen(policy, None, ("a", 1, 2), ("b", 1, 1))
    seen(policy, 0.02, ("a", 0, 1), ("b", 0, 1))
    assert policy._arms[1].pulls == 0
    seen(policy, 0.02, ("a", 1, 2), ("b", 0, 1))
    assert (policy._arms[1].pulls, policy._arms[1].tokens) == (1, 1.5)
    policy._k = 0  # K = 0 is an arm, where it is one, without any draft
    seen(policy, 0.02, ("a", 0, 1), ("b", 0, 1))
    assert (policy._arms[0].pulls, policy._arms[0].tokens) == (1, 1.0)


def test_the_bandit_has_arms_up_to_the_engine_s_longest_draft() -> None:
    arms = lambda spec, max_k: [arm.k for arm in create(spec, max_k)._arms]  # type: ignore[attr-defined]
    assert arms("bandit", 8) == [1, 2, 3, 4]
    assert arms("bandit", 2) == [1, 2]
    assert arms("bandit[first_arm=3]", 2) == [2]
    assert arms("bandit[first_arm=0,last_arm=2]", 8) == [0, 1, 2]


# ---- survival budget -----------------------------------------------------------------------------


def test_counts_fade_and_end_with_the_first_wrong_token() -> None:
    counts = _Counts([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0])
    counts.add(right=1, known=4, keep=0.5)
    assert counts.accepted == [1.5, 0.5, 1.0, 1.0]
    assert counts.compared == [2.0, 2.0, 2.0, 2.0]
    counts.add(right=2, known=2, keep=0.5)
    assert counts.accepted == [1.75, 1.25, 1.0, 1.0]


def test_what_is_known_of_a_draft_is_as_long_as_the_tokens_that_came() -> None:
    assert _survived([1, 2, 3], RequestStep("r", 0, 1, [1])) == (1, 1)
    assert _survived([1], RequestStep("r", 1, 2, [1, 2])) == (1, 1)
    assert _survived([1, 2, 3], RequestStep("r", 3, 2, [1, 9])) == (1, 2)
    assert _survived([1, 2, 3], RequestStep("r", 2, 2)) == (1, 2)


def test_survival_is_a_product_of_the_request_s_shares_and_those_of_all() -> None:
    policy: Any = create("survival-budget[memory=2,belief=2,first_rate=0.5]", 2)
    assert isinstance(policy, SurvivalBudget)
    policy.add("r", 2)
    policy.decide([Proposal("r", [1, 2])])
    assert policy.explain("r").parts["survival"] == [0.5, 0.25]
    seen(policy, 0.02, ("r", 2, 2))  # the first right, the second wrong
    policy.decide([Proposal("r", [1, 2])])
    first = (1 + 2 * (0.99 * 0.5 + 1) / 1.99) / (1 + 2)
    second = (0 + 2 * (0.99 * 0.5) / 1.99) / (1 + 2)
    assert policy.explain("r").parts["survival"] == pytest.approx([first, first * second])


def test_the_budget_s_expectation_is_the_survival_of_what_is_verified() -> None:
    policy: Any = create("survival-budget", 4)
    policy.add("r", 4)
    (k,) = k_of(policy, "r")
    expected = policy.explain("r")
    assert isinstance(expected, Expectation)
    assert k > 0
    assert expected.tokens == pytest.approx(1 + sum(expected.parts["survival"][:k]))


def test_the_budget_gives_no_request_more_than_its_draft_or_its_cap() -> None:
    policy: Any = create("survival-budget[first_rate=0.999]", 4)
    policy._costs = type("Free", (), {"costs": lambda _s, _n, most: np.ones(most + 1)})()
    policy.add("capped", 2)
    policy.add("short", 9)
    policy.add("none", 4)
    asked = [Proposal("capped", DRAFT), Proposal("short", [1, 2, 3]), Proposal("none", [])]
    assert [d.k for d in policy.decide(asked)] == [2, 3, 0]
    assert policy.decide([]) == []


def test_the_budget_learns_times_from_all_requests_of_a_decode_step() -> None:
    policy: Any = create("survival-budget", 4)
    policy.add("r", 4)
    told: list[tuple[int, float]] = []
    policy._costs.observe = lambda n, seconds: told.append((n, seconds))
    parts = (RequestStep("r", 3, 1), RequestStep("other", 2, 1))
    policy.observe(Step(0.05, True, parts))
    policy.observe(Step(0.05, False, parts))
    policy.observe(Step(None, True, parts))
    assert told == [(7, 0.05)]
