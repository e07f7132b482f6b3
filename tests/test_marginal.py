"""The rule of `marginal`: what is admitted, what is paid, and how far a model drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.cost import Array
from moecascade.core.marginal.acceptance import NEWEST
from moecascade.core.marginal.allocation import admitted, allot
from moecascade.core.marginal.rule import Marginal
from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.policies import create

FALLING = st.lists(st.floats(0.0, 1.0), max_size=3).map(lambda s: sorted(s, reverse=True))


def made(max_k: int = 8, **settings: object) -> Marginal:
    """Return a policy."""
    policy = create("marginal", max_k, settings)
    assert isinstance(policy, Marginal)
    return policy


def given_chances(policy: Marginal, chances: dict[str, list[float]]) -> None:
    """Let both judges say these for drafts of these requests."""

    def propose(names: Sequence[str], _drafts: object) -> np.ndarray:
        rows = np.zeros((len(names), policy.max_k))
        for row, name in zip(rows, names, strict=True):
            row[: len(chances[name])] = chances[name]
        return rows

    policy._text.propose = policy._recent.propose = propose  # type: ignore[assignment,method-assign]


def decided(policy: Marginal, lengths: dict[str, int]) -> dict[str, int]:
    """Return the K of each request, given the lengths of their drafts."""
    decisions = policy.decide([Proposal(name, [0] * n) for name, n in lengths.items()])
    return {d.request_id: d.k for d in decisions}


def stepped(policy: Marginal, emitted: dict[str, int], ks: dict[str, int], cost: float) -> None:
    """Show a step that took `cost` times what it takes without drafts."""
    parts = tuple(RequestStep(name, ks.get(name, 0), n, [7] * n) for name, n in emitted.items())
    policy.observe(Step(0.02 * cost, True, parts))


@pytest.mark.parametrize("crowd", [0, 8])
@given(st.lists(FALLING, min_size=1, max_size=3))
def test_slots_are_admitted_as_by_trying_every_allocation(
    crowd: int, chances: list[list[float]]
) -> None:
    """Whichever judge it is."""
    policy = made(crowd=crowd)
    named = {f"r{i}": row for i, row in enumerate(chances)}
    for name in named:
        policy.add(name, 8)
    given_chances(policy, named)
    found = decided(policy, {name: len(row) for name, row in named.items()})
    n, price = len(named), 1.2

    def surplus(ks: tuple[int, ...]) -> float:
        worth = sum(sum(row[:k]) for row, k in zip(chances, ks, strict=True)) / price
        return worth - n * (policy._costs.cost(n, sum(ks)) - 1.0)

    best = max(surplus(ks) for ks in product(*(range(len(row) + 1) for row in chances)))
    assert all(k <= len(named[name]) for name, k in found.items())
    assert surplus(tuple(found.values())) == pytest.approx(best)


@given(
    st.lists(
        st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).map(
            lambda s: sorted(s, reverse=True)
        ),
        min_size=1,
        max_size=12,
    ),
    st.data(),
    st.floats(0.0, 0.4),
    st.integers(0, 3),
)
def test_a_large_batch_is_allotted_as_the_plain_rule_says(
    rows: list[list[float]], data: st.DataObject, slope: float, others: int
) -> None:
    lengths = [data.draw(st.integers(0, 4)) for _ in rows]
    n = len(rows) + others
    costs = np.array([1.0 + slope * d for d in range(49)])
    ks = allot(np.array(rows), [1.0] * len(rows), lengths, n, costs)
    slots = sorted((w for row, k in zip(rows, lengths, strict=True) for w in row[:k]), reverse=True)
    assert sum(ks) == admitted(slots, n, costs.tolist())
    assert all(0 <= k <= length for k, length in zip(ks, lengths, strict=True))
    taken = sorted((w for row, k in zip(rows, ks, strict=True) for w in row[:k]), reverse=True)
    assert taken == slots[: sum(ks)]


def test_a_draft_that_is_worth_just_what_it_costs_is_not_verified() -> None:
    assert admitted([0.5, 0.5], 1, [1.0, 1.5, 2.0]) == 0
    rows = np.array([[0.5], [0.5]])
    assert allot(rows, [1.0, 1.0], [1, 1], 2, np.array([1.0, 1.25, 1.5])) == [0, 0]


@pytest.mark.parametrize("crowd", [0, 8])
def test_requests_of_other_policies_are_delayed_too(crowd: int) -> None:
    """The same draft, in a batch with seven that are not ours: from the step after."""
    policy = made(crowd=crowd)
    policy.add("r", 8)
    given_chances(policy, {"r": [0.9, 0.5, 0.1]})

    # A step's time grows with every position, here as one for which nothing is shared.
    def costs(n: int, _most: int) -> Array:
        return np.array([(1.0 + 0.1 * (n + drafts)) / (1.0 + 0.1 * n) for drafts in range(9)])

    policy._costs.costs = costs  # type: ignore[assignment,method-assign]
    alone = decided(policy, {"r": 3})["r"]
    policy.observe(
        Step(None, True, tuple(RequestStep(name, 0, 1, [7]) for name in ["r", *"abcdefg"]))
    )
    assert decided(policy, {"r": 3})["r"] < alone


def test_experts_and_top_k_reach_the_costs() -> None:
    """Before anything is measured a dense model drafts more than one of many experts."""
    ks = []
    for experts, top_k in ((1, 1), (8, 2), (128, 8)):
        policy = made(experts=experts, top_k=top_k)
        policy.add("r", 8)
        chances = [0.9, 0.7, 0.45, 0.1, 0.1, 0.1, 0.1, 0.1]
        given_chances(policy, {"r": chances})
        ks.append(decided(policy, {"r": 8})["r"])
    assert ks[0] > ks[1] > ks[2]


@pytest.mark.parametrize("crowd", [0, 8])
def test_a_request_with_a_high_rate_pays_more(crowd: int) -> None:
    """Lambda is learnt: with the rate the worth of a token falls, and K with it."""
    policy = made(crowd=crowd)
    policy.add("r", 8)
    given_chances(policy, {"r": [0.6, 0.5, 0.4, 0.3]})
    before = decided(policy, {"r": 4})["r"]
    for _ in range(200):
        stepped(policy, {"r": 4}, {}, 1.0)
    said = policy.explain("r")
    assert said is not None
    assert said.parts["lambda"] == pytest.approx(1.2)
    assert decided(policy, {"r": 4})["r"] < before
    said = policy.explain("r")
    assert said is not None
    assert said.parts["lambda"] > 3.5


@pytest.mark.parametrize("crowd", [0, 8])
def test_a_new_request_is_expected_to_get_tokens_at_the_rate_of_all(crowd: int) -> None:
    policy = made(crowd=crowd)
    policy.add("old", 8)
    policy.decide([Proposal("old", [0])])
    for _ in range(3000):
        stepped(policy, {"old": 4}, {}, 1.0)
    policy.settings = type(policy.settings)(crowd=8)
    policy.add("new", 8)
    policy.decide([Proposal("new", [0])])
    said = policy.explain("new")
    assert said is not None
    assert said.parts["lambda"] > 3.5


@pytest.mark.parametrize("requests", [1, 8])
def test_a_draft_is_shortened_to_what_the_request_could_bear_to_lose(requests: int) -> None:
    """Three baseline steps at first; in a batch it answers to all requests for their delay.

    Here a draft of K delays each of n requests by 2 K / n steps, 2 K in all: one is bearable.
    """
    policy = made(most_lost=0.03)
    policy.add("r", 8)
    costs: Array = 1.0 + 2.0 / requests * np.arange(9.0, dtype=np.float64)
    assert policy._own.limits(["r"], [8], requests, costs) == [1]
    assert policy._own.limits(["r"], [0], requests, costs) == [0]


def test_an_unlucky_request_is_not_left_out_where_the_batch_gains() -> None:
    """Alone it would stop; beside one that gains it goes on, beside one as unlucky it does not."""
    policy = made(most_lost=0.03)
    costs: Array = 1.0 + 0.2 * np.arange(9.0, dtype=np.float64)

    def fared(name: str, lost: float) -> None:
        policy.add(name, 8)
        policy._own._accounts[name].lost = lost

    fared("unlucky", 4.0)
    fared("lucky", -20.0)
    fared("as unlucky", 4.0)
    assert policy._own.limits(["unlucky"], [8], 1, costs) == [0]
    assert policy._own.limits(["unlucky", "lucky"], [8, 8], 2, costs) == [8, 8]
    assert policy._own.limits(["unlucky", "as unlucky"], [8, 8], 2, costs) == [0, 0]


def test_passes_are_charged_to_requests_that_had_no_draft_verified() -> None:
    policy = made()
    for name in "ab":
        policy.add(name, 8)
    policy.decide([Proposal(name) for name in "ab"])
    parts = tuple(RequestStep(name, 0, 1, [7]) for name in "ab")
    for _ in range(50):
        policy.observe(Step(0.02, True, parts))
    assert policy._own.lost("a") == pytest.approx(0.0)
    for _ in range(50):
        policy.observe(Step(0.03, True, parts, passes=2))
    assert policy._own.lost("a") > 5.0


def test_in_large_batches_no_request_answers_for_itself() -> None:
    policy = made(crowd=0)
    policy.add("r", 8)
    given_chances(policy, {"r": [0.9] * 3})
    policy._own._accounts["r"].lost = 50.0
    assert decided(policy, {"r": 3})["r"] > 0


def test_of_a_long_prompt_the_newest_part_is_kept() -> None:
    """Also by the policy, whose requests it would slow down in their first step."""
    prompt = [i % 1000 for i in range(NEWEST + 5000)]
    policy = create("marginal", 8)
    assert isinstance(policy, Marginal)
    policy.add("a", 8, prompt)
    assert policy._text._records["a"].tokens == prompt[5000:]


def test_a_crowd_that_thins_out_is_judged_by_its_text_again() -> None:
    """What was generated in the crowd is in the text that is read then."""
    policy = create("marginal", 4, {"crowd": 1})
    assert isinstance(policy, Marginal)
    policy.add("a", 4, [1, 2, 3])
    policy.add("b", 4, [7, 8, 9])
    for token in range(20, 40):
        proposals = [Proposal("a", [token, 0]), Proposal("b", [5, 5])]
        ks = {d.request_id: d.k for d in policy.decide(proposals)}
        parts = (RequestStep("a", ks["a"], 1, [token]), RequestStep("b", ks["b"], 1, [token]))
        policy.observe(Step(0.02, True, parts))
    policy.drop("b")
    policy.decide([Proposal("a", [40])])
    assert policy._text._records["a"].tokens == [1, 2, 3, *range(20, 40)]


def test_a_request_that_has_lost_what_it_may_drafts_no_more() -> None:
    policy = create("marginal", 8)
    assert isinstance(policy, Marginal)
    policy.add("r", 8)
    given_chances(policy, {"r": [0.75, 0.7, 0.6]})
    assert decided(policy, {"r": 3})["r"] > 0
    policy._own._accounts["r"].lost = 20.0
    assert policy.decide([Proposal("r", [0, 0, 0])])[0].k == 0


@pytest.mark.parametrize("crowd", [1, 4])
def test_whatever_it_expects_a_request_never_loses_more_than_it_may(crowd: int) -> None:
    """Every draft is thought to be right and is wrong: the worst that can happen."""
    policy = create("marginal", 8)
    assert isinstance(policy, Marginal)
    names = [str(i) for i in range(crowd)]
    given_chances(policy, {name: [0.99] * 8 for name in names})
    for name in names:
        policy.add(name, 8, [1, 2, 3])
    drafted_at = []
    for at in range(400):
        ks = {d.request_id: d.k for d in policy.decide([Proposal(n, [7] * 8) for n in names])}
        positions = crowd + sum(ks.values())
        parts = tuple(RequestStep(name, k, 1, [at]) for name, k in ks.items())
        policy.observe(Step(0.01 * (0.7 + 0.3 * positions), True, parts))
        drafted_at += [at for k in ks.values() if k]
        for name in names:
            r = policy._own._accounts[name]
            assert r.lost <= 0.03 * max(100, r.tokens) + 0.5  # costs are still being learnt
    assert drafted_at[0] == 0  # it was fooled,
    assert drafted_at[-1] > 200  # and it did not give up: what may be lost grows with the text


def test_caps_hold_and_nothing_is_left_of_dropped_requests() -> None:
    policy = create("marginal", 8)
    assert isinstance(policy, Marginal)
    text = list(range(20)) * 10
    policy.add("r", 2, text)
    policy.add("none", 0, text)
    for i in range(40):
        tokens = text[i % 20 : i % 20 + 8]
        decisions = policy.decide([Proposal("r", tokens), Proposal("none", tokens)])
        assert decisions[0].k <= 2
        assert decisions[1].k == 0
        parts = tuple(RequestStep(d.request_id, d.k, 1, tokens[:1]) for d in decisions)
        policy.observe(Step(0.02, True, parts))
    policy.drop("r")
    policy.drop("none")
    kept = (policy._requests, policy._text._records, policy._recent._states)
    assert not any((*kept, policy._own._accounts))


def served(
    spec: str, chances: Sequence[float], pass_cost: float, seed: int = 0, requests: int = 40
) -> tuple[float, float]:
    """Serve requests with a model drafter: the speed-up, and the tokens drafted a step.

    The requests in turn have `chances` that a drafted token is right; their text has no pattern.
    """
    rng = random.Random(seed)
    policy = create(spec, 5)
    tokens, time, ahead, steps = 0, 0.0, 0, 0
    for i in range(requests):
        name, chance = str(i), chances[i % len(chances)]
        output = [rng.randrange(5000) for _ in range(100)]
        policy.add(name, 5, [rng.randrange(50) for _ in range(50)])
        drafted = policy.lookahead([name])
        policy.observe(Step(None, False, (RequestStep(name, 0, 1, output[:1]),)))
        at = 1
        while at < len(output):
            draft = [
                token if rng.random() < chance else 5000 + token
                for token in output[at : at + drafted]
            ]
            k = min(policy.decide([Proposal(name, draft)])[0].k, len(draft))
            right = 0
            while right < k and draft[right] == output[at + right]:
                right += 1
            emitted = output[at : at + right + 1]
            drafted = policy.lookahead([name])
            passes = max(0, drafted - 1)
            cost = (1.0, 1.28, 1.55, 1.75, 1.95, 2.1)[k] + pass_cost * passes
            cost *= rng.lognormvariate(0, 0.03)
            part = RequestStep(name, k, len(emitted), emitted)
            policy.observe(Step(0.04 * cost, True, (part,), passes))
            tokens, time, at = tokens + len(emitted), time + cost, at + len(emitted)
            ahead, steps = ahead + drafted, steps + 1
        policy.drop(name)
    return tokens / time, ahead / steps


BOUNDS = {
    # chances, pass cost: mean and lowest share of the best static K's speed that is reached
    ((0.1,), 0.05): (0.985, 0.975),
    ((0.1,), 0.3): (0.98, 0.97),
    ((0.45,), 0.05): (0.985, 0.955),
    ((0.45,), 0.3): (0.99, 0.97),
    ((0.85,), 0.05): (0.92, 0.85),
    ((0.85,), 0.3): (0.985, 0.97),
    ((0.2, 0.8), 0.05): (1.03, 1.0),
    ((0.2, 0.8), 0.3): (1.01, 0.99),
}


@pytest.mark.parametrize(("chances", "pass_cost"), BOUNDS, ids=str)
def test_a_model_drafter_is_used_about_as_well_as_by_the_best_static_k(
    chances: tuple[float, ...], pass_cost: float
) -> None:
    """Over ten seeds, one as good as another.

    Where passes are cheap and tokens are mostly right (0.85, 0.05) it reaches 93% of the best
    static K, 86% at the lowest, when it has served twelve requests; 95% and 91% when it has served
    forty. That is a known loss, to be mended: such drafters are the common ones.
    """
    shares = []
    for seed in range(10):
        best = max(served(f"static:{k}", chances, pass_cost, seed, 12)[0] for k in range(1, 6))
        shares.append(served("marginal", chances, pass_cost, seed, 12)[0] / max(1.0, best))
    mean, lowest = BOUNDS[chances, pass_cost]
    assert np.mean(shares) >= mean
    assert min(shares) >= lowest


def test_a_model_drafts_further_where_its_passes_pay() -> None:
    _, seldom_right = served("marginal", (0.1,), 0.05)
    _, dear = served("marginal", (0.85,), 0.3)
    _, cheap = served("marginal", (0.85,), 0.02)
    assert seldom_right < 1.2
    assert dear < 1.5
    assert cheap > 3.0


@pytest.mark.parametrize("crowd", [0, 8])
def test_a_batch_is_drafted_for_if_it_pays_for_all_together(crowd: int) -> None:
    """A pass delays all; one request whose drafts are right cannot pay for seven."""
    lengths = {}
    for good, waiting in ((1, 0), (8, 0), (1, 500)):
        policy = create("marginal", 4, {"crowd": crowd})
        for i in range(waiting):  # in the engine's queue: these have no say
            policy.add(f"waiting-{i}", 4, [1, 2, 3])
        names = [f"r{i}" for i in range(8)]
        for name in names:
            policy.add(name, 4, [1, 2, 3])
        drafted = 0
        for i in range(300):
            text = [10 * i + j for j in range(5)]
            drafts = [text[:drafted] if j < good else [-1] * drafted for j in range(len(names))]
            ks = [d.k for d in policy.decide(list(map(Proposal, names, drafts)))]
            drafted = policy.lookahead(names)
            passes = max(0, drafted - 1)
            emitted = [1 + k * (j < good) for j, k in enumerate(ks)]
            parts = tuple(
                RequestStep(name, k, n, text[:n])
                for name, k, n in zip(names, ks, emitted, strict=True)
            )
            policy.observe(Step(0.02 * (1 + 0.01 * sum(ks) + 0.2 * passes), True, parts, passes))
        lengths[good, waiting] = drafted
    assert lengths == {(1, 0): 1, (8, 0): 4, (1, 500): 1}


def test_what_was_expected_is_of_the_decision_just_made() -> None:
    policy = made()
    for name in "ab":
        policy.add(name, 8)
    given_chances(policy, {"a": [0.9, 0.8, 0.2], "b": [0.9, 0.1]})
    ks = decided(policy, {"a": 3, "b": 2})
    for name, chances in {"a": [0.9, 0.8, 0.2], "b": [0.9, 0.1]}.items():
        said = policy.explain(name)
        assert said is not None
        assert said.utility is not None
        assert said.tokens == pytest.approx(1 + sum(chances[: ks[name]]))
        assert 0 < said.utility < 9
        assert said.parts["survival"] == pytest.approx(chances)
    decided(policy, {"b": 0})
    assert policy.explain("a") is None
