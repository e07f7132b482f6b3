"""Every drafter on both of vLLM's model runners, scheduled both ways: the text is the target's.

What `docs/compatibility.md` says of a drafter is held by this: *run* is a case here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moecascade.vllm import compat
from tests import matrix
from tests.matrix_runs import Runs

NAMES = [
    f"{runner} {mode} {method}"
    for runner, modes in matrix.CASES.items()
    for mode, methods in modes.items()
    for method in methods
]
SEARCHES = {"ngram", "ngram_gpu", "custom"}  # which are told, and make nothing, at K = 0
PASSES = {  # which are told how far to draft
    "first": {"draft_model", "eagle", "eagle3", "mtp"},
    "second": {"eagle", "eagle3", "mtp"} if compat.second_runner_is_told() else set(),
}


@pytest.fixture(scope="module")
def seen(matrix_runs: Runs) -> dict[str, Any]:
    """What the engines did."""
    return matrix_runs.wait()


def case_of(seen: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a case saw, and what the plain engine answers."""
    method = name.rsplit(maxsplit=1)[-1]
    if name not in seen:
        pytest.fail("\n".join(text for key, text in seen.items() if key.endswith(" log")))
    if "error" in seen[name]:
        pytest.fail(seen[name]["error"])
    return seen[name], seen["mtp" if method == "mtp" else "target"]["answers"]


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_plain_engine(seen: dict[str, Any], name: str) -> None:
    """With requests preempted, split, left out of steps, aborted; with grammar and penalties."""
    case, plain = case_of(seen, name)
    length = matrix.LENGTH if name.startswith("first") else matrix.BEGINNING
    for spec, answers in case["answers"].items():
        for kind, answer in answers.items():
            if kind == "logprobs":
                for here, there in zip(answer, plain[kind], strict=True):
                    assert np.allclose(here, there, atol=1e-3), spec
            elif kind == "text":
                assert answer == [text[:length] for text in plain[kind]], (spec, kind)
            else:
                assert answer == plain[kind], (spec, kind)
    assert case["aborted"] == [plain["text"][i][:length] for i in (0, 2, 4)]
    assert case["preempted"] > 3
    assert min(map(len, plain["ending"])) >= 11  # `min_tokens`
    assert sum(len(answer) < 40 for answer in plain["ending"]) > 1


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_verified_as_decided_and_counted_once(seen: dict[str, Any], name: str) -> None:
    runner, mode, method = name.split()
    case, _ = case_of(seen, name)
    expected_runner = "cpu_model_runner" if runner == "first" else "cpu.model_runner"
    assert case["runner"].endswith(expected_runner)
    assert ("AsyncScheduler" in case["scheduler"]) == (mode == "async")
    counts = case["counts"]
    for spec, answers in case["answers"].items():
        lengths = [
            len(tokens) for kind, made in answers.items() if kind != "logprobs" for tokens in made
        ]
        assert counts[spec]["emitted"] == sum(lengths)
        assert counts[spec]["too many"] == 0
    assert counts["off"]["drafted"] == 0
    full = counts[f"static:{matrix.MAX_K}"]
    assert full["drafted"] > counts["random"]["drafted"] / 2 > 5
    if not (method in SEARCHES and mode == "async"):
        assert full["accepted"] > 0.2 * full["drafted"]
    assert full["steps"] < counts["off"]["steps"]
    assert len(full["sizes"]) > 1  # requests sat out steps
    if method in PASSES[runner]:
        assert counts["off"]["passes"] == 0
        assert 0 < counts["random"]["passes"] < matrix.MAX_K * counts["random"]["steps"]
    elif (runner, method) == ("first", "ngram"):
        assert counts["off"]["passes"] == 0  # nor does it search
    else:
        assert counts["off"]["passes"] >= matrix.MAX_K * counts["off"]["steps"]


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(seen: dict[str, Any], name: str) -> None:
    case, _ = case_of(seen, name)
    left = case["left"]
    assert left.pop("faults") == {}
    assert set(left.values()) == {0}


@pytest.mark.engine
@pytest.mark.parametrize("name", [name for name in NAMES if " async " in name])
def test_a_policy_that_looks_at_drafts_is_not_to_be_had_unseen(
    seen: dict[str, Any], name: str
) -> None:
    """The requests run under the server's policy, and each is counted."""
    case, plain = case_of(seen, name)
    length = len(case["unseen"][0])
    assert length >= matrix.BEGINNING
    assert case["unseen"] == [text[:length] for text in plain["text"]]
    assert case["unseen faults"]["policies"] >= len(matrix.PROMPTS)


@pytest.mark.engine
@pytest.mark.skipif(matrix.VLLM < (0, 32), reason="CPU builds sample drafts otherwise: see docs")
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(" eagle")])
def test_sampled_text_has_the_targets_distribution(seen: dict[str, Any], name: str) -> None:
    """At a temperature of 0.8, by place in the answer, with K at random."""
    case, plain = case_of(seen, name)
    drawn, wanted = (
        kinds(answers, seen["circles"]) for answers in (case["sampled"], plain["sampled"])
    )
    assert drawn.size >= 2000
    expected = (wanted == 0).mean()
    assert 0.2 < expected < 0.8  # of the tokens that drafters think of
    assert min(agreement(*of) for of in zip(drawn.T, wanted.T, strict=True)) > 0.0005
    # It would be noticed if one right draft in ten were refused, or one wrong one in ten taken.
    rng = np.random.default_rng(0)
    for kind in (0, 1):
        changed = np.where((drawn != kind) & (rng.random(drawn.shape) < 0.1), kind, drawn)
        assert min(agreement(*of) for of in zip(changed.T, wanted.T, strict=True)) < 0.0005


def kinds(answers: list[list[int]], circles: list[list[int]]) -> Any:
    """Return for each token 0 where it follows its last one in the circle, else one of 1 to 5."""
    after = {
        a: b for circle in circles for a, b in zip(circle, circle[1:] + circle[:1], strict=True)
    }
    return np.array(
        [
            [
                0 if after[last] == token else 1 + token % 5
                for last, token in zip([matrix.PROMPTS[3][-1], *answer], answer, strict=False)
            ]
            for answer in answers
        ]
    )


def agreement(some: Any, others: Any) -> float:
    """Return the chance that two samples of one distribution differ more than these.

    By their chi-squared statistic, beside that of samples whose members are dealt out anew.
    """
    pool = np.concatenate([some, others])
    share = np.bincount(pool, minlength=6) / pool.size
    share = np.where(share > 0, share, 1.0)
    rng = np.random.default_rng(0)

    def statistic(sample: Any) -> float:
        counts = np.bincount(sample, minlength=6)
        return float((((counts - some.size * share) ** 2) / share).sum())

    found = statistic(some)
    dealt = [statistic(rng.permutation(pool)[: some.size]) for _ in range(4000)]
    return float(np.mean(np.array(dealt) >= found))
