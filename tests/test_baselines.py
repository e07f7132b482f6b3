"""What others use: each against its published rule on small cases, and what holds for all."""

from __future__ import annotations

from typing import Any

import pytest

from moecascade.core.controller import Controller
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.peers.bandit import Bandit
from moecascade.core.peers.dynamic_table import tuned
from moecascade.core.peers.goodput import Goodput, expected_tokens
from moecascade.core.peers.sglang_adaptive import SglangSettings, Tier
from moecascade.core.peers.survival_budget import SurvivalBudget
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.policies import PEERS, Policy, create

NAMES = [policy.name for policy in PEERS]
DRAFT = list(range(8))


def ks(policy: Policy, *request_ids: str) -> list[int]:
    return [d.k for d in policy.decide([Proposal(r, DRAFT) for r in request_ids])]


def verify(policy: Policy, request_id: str, accepted: int, seconds: float = 0.02) -> int:
    """Run a step of one request that accepts at most `accepted` drafts; return its K."""
    (k,) = ks(policy, request_id)
    part = RequestStep(request_id, k, 1 + min(accepted, k))
    policy.observe(Step(seconds, True, (part,)))
    return k


# ---- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_caps_hold_and_nothing_is_left_of_dropped_requests(name: str) -> None:
    faults: list[str] = []
    controller = Controller(ServerOptions(policy=name), 8, lambda what, _how: faults.append(what))
    policy: Any = controller._groups[name].policy
    caps = {"capped": 2, "none": 0, "free": 8}
    for request_id, cap in caps.items():
        controller.add(request_id, RequestOptions(max_k=cap))
    for i in range(60):
        decisions = controller.decide([Proposal(r, DRAFT) for r in caps]).values()
        assert all(d.k <= caps[d.request_id] for d in decisions)
        assert all(controller.lookahead([r]) <= cap for r, cap in caps.items())
        parts = tuple(RequestStep(d.request_id, d.k, 1 + min(d.k, i % 3)) for d in decisions)
        controller.observe(Step(0.02 + 0.005 * sum(d.k for d in decisions), True, parts))
    assert len(policy._requests) == 3
    for request_id in (*caps, "never added"):
        controller.drop(request_id)
        policy.drop(request_id)
    assert len(policy._requests) == 0
    assert faults == []


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_others_of_prefill_and_without_a_time_do_no_harm(name: str) -> None:
    policy = create(name, 4)
    policy.add("r", 4)
    for step in (
        Step(None, False, (RequestStep("r", 0, 1),)),
        Step(0.5, False, (RequestStep("r", 0, 0), RequestStep("other", 3, 2))),
        Step(None, True, (RequestStep("r", 2, 1),)),
        Step(0.02, True, (RequestStep("other", 3, 2),)),
    ):
        assert 0 <= ks(policy, "r")[0] <= 4
        policy.observe(step)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_the_steps_of_others_teach_nothing(name: str) -> None:
    """But for `survival-budget`, which learns what steps cost from all of them."""
    alone, among = create(name, 8), create(name, 8)
    for policy in (alone, among):
        policy.add("r", 8)
    for i in range(120):
        (k,) = ks(alone, "r")
        assert ks(among, "r") == [k], i
        among.observe(Step(0.5, False, (RequestStep("r", 0, 1), RequestStep("new", 0, 0))))
        if name != "survival-budget":
            among.observe(Step(0.09, True, (RequestStep("other", 3, 1 + i % 4),)))
        part = RequestStep("r", k, 1 + min(k, (0, 8, i % 9)[i // 40]))
        for policy in (alone, among):
            policy.observe(Step(0.02 * (1 + 0.1 * k), True, (part,)))


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("sglang-adaptive[ema_alpha=0]", "ema_alpha"),
        ("sglang-adaptive[update_interval=0]", "update_interval"),
        ("hf-heuristic[first_k=0]", "first_k"),
        ("goodput[memory=0.5]", "memory"),
        ("goodput[first_rate=2]", "first_rate"),
        ("bandit[first_arm=5]", "first_arm"),
        ("bandit[rounds=0]", "rounds"),
        ("survival-budget[top_k=9]", "top_k"),
        ("survival-budget[belief=0]", "belief"),
        ("survival-budget[first_rate=1]", "first_rate"),
    ],
)
def test_settings_out_of_range_are_named(spec: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        create(spec, 8)


@pytest.mark.parametrize("name", NAMES)
def test_lookahead_is_never_below_the_next_decision(name: str) -> None:
    policy = create(name, 8)
    policy.add("r", 8)
    for i in range(400):
        (k,) = ks(policy, "r")
        promised = policy.lookahead(["r"])
        part = RequestStep("r", k, 1 + min(k, (0, 8, i % 9)[i // 40 % 3]))
        policy.observe(Step(0.02 * (1 + 0.1 * k), True, (part,)))
        assert ks(policy, "r")[0] <= promised


# ---- SGLang --------------------------------------------------------------------------------------


def test_sglang_moves_every_five_steps_after_ten_of_warm_up() -> None:
    tier = Tier((1, 3, 5, 7), -0.25, SglangSettings())
    seen = []
    for _ in range(26):
        tier.update(7.0)  # all that is drafted is accepted, and more would be
        seen.append(tier.k)
    # The average starts at 2 and is 2 + 5 (1 - 0.8^15) = 6.82 at the 15th step: beyond 5 - 0.5 and
    # 7 is the last candidate.
    assert seen[:14] == [3] * 14
    assert seen[14:] == [7] * 12


def test_sglang_goes_down_at_the_lower_candidate_less_half_and_hysteresis() -> None:
    settings = SglangSettings(ema_alpha=1.0, update_interval=1, warmup=0)
    tier = Tier((1, 3, 5, 7), -0.25, settings)
    tier.update(0.26)  # above 1 - 0.5 - 0.25
    assert tier.k == 3
    tier.update(0.25)
    assert tier.k == 1
    tier.update(0.51)  # above 1 - 0.5: up by one
    assert tier.k == 3
    tier.update(5.0)  # above 3 - 0.5 and 5 - 0.5: up by two
    assert tier.k == 7
    tier.update(2.0)  # at most 5 - 0.75 and 3 - 0.75: down by two
    assert tier.k == 3


def test_sglang_leaves_zero_at_the_next_update() -> None:
    tier = Tier((0, 1, 3), 0.0, SglangSettings(ema_alpha=1.0, update_interval=1, warmup=0))
    tier.update(0.0)
    assert tier.k == 0
    tier.update(0.0)
    assert tier.k == 1


def test_sglang_takes_the_candidates_of_the_batch_size_that_is_reached() -> None:
    policy = create("sglang-adaptive", 8)
    names = [f"r{i}" for i in range(64)]
    for name in names:
        policy.add(name, 8)
    assert ks(policy, *names[:1]) == [3]
    assert set(ks(policy, *names[:8])) == {3}
    assert set(ks(policy, *names[:31])) == {3}
    assert set(ks(policy, *names[:32])) == {1}  # 3 is no candidate at 32: the middle one
    assert set(ks(policy, *names[:63])) == {1}
    assert set(ks(policy, *names)) == {0}


def test_sglang_averages_over_drafts_and_not_over_steps_without_one() -> None:
    policy = create("sglang-adaptive", 8)
    policy.add("r", 8)
    for i in range(60):
        k = ks(policy, "r")[0] if i % 2 else 0  # the drafter has something every other time
        policy.observe(Step(0.02, True, (RequestStep("r", k, 1 + k),)))
    assert ks(policy, "r") == [7]  # whatever is drafted is accepted


# ---- vLLM's table --------------------------------------------------------------------------------


def test_the_table_gives_one_k_for_the_batch_and_carries_on_in_gaps() -> None:
    policy = create("dynamic-table", 8, {"table": [[1, 2, 7], [4, 6, 2]]})
    names = [f"r{i}" for i in range(9)]
    for name in names:
        policy.add(name, 8)
    found = [ks(policy, *names[:n]) for n in range(1, 10)]
    assert [row[0] for row in found] == [7, 7, 7, 2, 2, 2, 2, 2, 2]
    assert all(len(set(row)) == 1 for row in found)


@pytest.mark.parametrize(
    "table", [[], [[2, 3, 1]], [[1, 4, 3], [4, 5, 1]], [[1, 0, 3]], [[1, 2, -1]], [[1, 2]]]
)
def test_a_table_that_vllm_would_refuse_is_refused(table: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="table"):
        create("dynamic-table", 8, {"table": table})


def test_the_table_tuned_in_hindsight_has_the_best_k_of_each_size() -> None:
    measured = {(1, 0): 40.0, (1, 3): 60.0, (1, 8): 55.0, (4, 0): 100.0, (4, 3): 90.0}
    table = tuned(measured)
    assert table == [(1, 3, 3), (4, 65_536, 0)]
    create("dynamic-table", 8, {"table": table})
    # Sizes with the same K are one range.
    more = {**measured, (2, 3): 70.0, (2, 8): 60.0}
    assert tuned(more) == table


# ---- Hugging Face --------------------------------------------------------------------------------


def test_hf_adds_two_after_a_draft_all_right_and_takes_one_otherwise() -> None:
    policy = create("hf-heuristic[first_k=5]", 8)
    policy.add("r", 8)
    assert verify(policy, "r", accepted=5) == 5
    assert verify(policy, "r", accepted=6) == 7
    assert [verify(policy, "r", accepted=0) for _ in range(8)] == [6, 5, 4, 3, 2, 1, 1, 1]


def test_hf_begins_at_twenty_or_the_engines_longest_draft() -> None:
    for max_k, first in ((8, 8), (32, 20)):
        policy = create("hf-heuristic", max_k)
        policy.add("r", max_k)
        assert ks(policy, "r") == [first]


@pytest.mark.parametrize(("transient", "next_k"), [("true", 5), ("false", 3)])
def test_hf_goes_on_where_the_last_request_ended_unless_transient(
    transient: str, next_k: int
) -> None:
    policy = create(f"hf-heuristic[first_k=5,transient={transient}]", 8)
    policy.add("a", 8)
    verify(policy, "a", accepted=0)
    verify(policy, "a", accepted=0)
    policy.drop("a")
    policy.add("b", 8)
    assert ks(policy, "b") == [next_k]


def test_hf_does_not_go_on_with_what_another_request_was_capped_at() -> None:
    policy = create("hf-heuristic[first_k=5]", 8)
    policy.add("capped", 1)
    verify(policy, "capped", accepted=1)
    policy.drop("capped")
    policy.add("b", 8)
    assert ks(policy, "b") == [5]


def test_hf_does_not_move_where_nothing_was_drafted() -> None:
    policy = create("hf-heuristic[first_k=4]", 8)
    policy.add("r", 8)
    policy.observe(Step(0.02, True, (RequestStep("r", 0, 1),)))
    assert ks(policy, "r") == [4]


# ---- goodput -------------------------------------------------------------------------------------


def test_the_expected_tokens_are_the_published_sum() -> None:
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(0.0, 3) == 1
    assert expected_tokens(1.0, 3) == 4


@pytest.mark.parametrize(
    ("accepted", "slope", "best"),
    [
        (8, 0.001, 8),  # everything is right and cheap
        (0, 0.001, 0),  # nothing is ever right
        (8, 0.0, 8),  # drafts are free
    ],
)
def test_goodput_finds_the_k_that_its_own_formula_says(
    accepted: int, slope: float, best: int
) -> None:
    policy = create("goodput", 8)
    policy.add("r", 8)
    for _ in range(400):
        (k,) = ks(policy, "r")
        part = RequestStep("r", k, 1 + min(accepted, k))
        policy.observe(Step(0.02 + slope * (1 + k), True, (part,)))
    assert ks(policy, "r") == [best]


def test_goodput_knows_rate_and_line() -> None:
    policy = create("goodput", 4)
    assert isinstance(policy, Goodput)
    policy.add("r", 4)
    for i in range(2000):
        (k,) = ks(policy, "r")
        part = RequestStep("r", k, 1 + min(i % 4, k))  # stops after 0, 1, 2, 3 drafts alike
        policy.observe(Step(0.02 + 0.004 * (1 + k), True, (part,)))
    # Right are 0, 1, 2 or 3 of K: at K = 4, six of the ten tokens whose predecessors were right.
    rates = {4: 6 / 10, 3: 6 / 9, 2: 5 / 7, 1: 3 / 4}
    k = ks(policy, "r")[0]
    assert policy.rate == pytest.approx(rates[k], abs=0.05)
    times = {k: 0.024 + 0.004 * k for k in range(5)}
    assert k == max(times, key=lambda k: expected_tokens(policy.rate, k) / times[k])


# ---- bandit --------------------------------------------------------------------------------------


def test_the_bandit_tries_every_arm_twice_first() -> None:
    policy = create("bandit", 8)
    policy.add("r", 8)
    assert [verify(policy, "r", accepted=2) for _ in range(8)] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_the_bandit_pulls_the_arm_with_the_highest_bound() -> None:
    policy = create("bandit[first_arm=1,last_arm=2]", 8)
    assert isinstance(policy, Bandit)
    policy.add("r", 8)
    for _ in range(4):  # two pulls each: 2 tokens in 0.02 s at K = 1, 3 in 0.06 s at K = 2
        k = ks(policy, "r")[0]
        seconds = {1: 0.02, 2: 0.06}[k]
        policy.observe(Step(seconds, True, (RequestStep("r", k, 1 + k),)))
    # Equal pulls, equal bonus: the mean decides, 2 a baseline step against 1.
    assert ks(policy, "r") == [1]
    pulls = []
    for _ in range(300):
        k = ks(policy, "r")[0]
        pulls.append(k)
        seconds = {1: 0.02, 2: 0.06}[k]
        policy.observe(Step(seconds, True, (RequestStep("r", k, 1 + k),)))
    assert 0 < pulls.count(2) < 60  # it goes on exploring, ever more rarely
    assert pulls[-100:].count(2) < pulls[:100].count(2)


def test_steps_for_which_there_was_no_draft_are_no_pull() -> None:
    policy = create("bandit", 8)
    assert isinstance(policy, Bandit)
    policy.add("r", 8)
    for _ in range(20):
        ks(policy, "r")
        policy.observe(Step(0.02, True, (RequestStep("r", 0, 1),)))
    assert {arm.pulls for arm in policy._arms} == {0}


# ---- survival budget -----------------------------------------------------------------------------


def test_the_budget_goes_to_the_request_whose_drafts_survive() -> None:
    policy = create("survival-budget", 4)
    assert isinstance(policy, SurvivalBudget)
    policy.add("copies", 4)
    policy.add("invents", 4)
    for _ in range(60):
        parts = (RequestStep("copies", 4, 5), RequestStep("invents", 4, 1))
        policy.observe(Step(0.05, True, parts))
    for _ in range(30):
        parts = (RequestStep("copies", 0, 1), RequestStep("invents", 0, 1))
        policy.observe(Step(0.03, True, parts))
    assert ks(policy, "copies", "invents") == [4, 0]


@pytest.mark.parametrize("told", [True, False])
def test_the_budget_comes_back_once_drafts_are_right_again(told: bool) -> None:
    """Drafts are scored, verified or not, where tokens are told; so K = 0 is no trap."""
    policy = create("survival-budget", 8)
    policy.add("r", 8)
    for i in range(200):
        (k,) = ks(policy, "r")
        tokens = [99] if i < 30 else [*DRAFT[: k + 1]]
        part = RequestStep("r", k, len(tokens), tokens if told else ())
        policy.observe(Step(0.02 * (1 + 0.2 * k), True, (part,)))
    assert (ks(policy, "r")[0] > 0) is told


def test_the_budget_is_the_one_with_most_tokens_a_second() -> None:
    policy = create("survival-budget", 3)
    assert isinstance(policy, SurvivalBudget)
    policy.add("r", 3)
    survival = [0.9, 0.5, 0.1]
    policy._survival = lambda _r: survival  # type: ignore[assignment,method-assign]
    costs = [policy._costs.cost(1, k) for k in range(4)]
    rates = [(1 + sum(survival[:k])) / costs[k] for k in range(4)]
    assert ks(policy, "r") == [rates.index(max(rates))]
