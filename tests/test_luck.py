"""The luck of the text: found by replay, taken out of times, and nothing else with it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moecascade.evaluation import luck
from moecascade.evaluation.report import diagnostics
from moecascade.evaluation.request_record import Row
from moecascade.replay.player import MIXTRAL_LIKE, Conditions, play
from moecascade.serving import command
from moecascade.telemetry.traces import Trace
from tests.test_bench import ROW

SPEED = {"off": 0.0, "static:3": 1.0, "cascade": 0.9, "marginal": 0.9}  # by how much luck counts
TRUTH = {"off": 1.0, "static:3": 0.9, "cascade": 0.85, "marginal": 0.80}  # time a token


def world(seed: int, prompts: int = 24, known: bool = True) -> list[Row]:
    """Answers of each policy to some prompts; each is lucky or not, whoever wrote it."""
    rng = random.Random(seed)
    rows = []
    for i in range(prompts):
        typical = rng.uniform(-0.1, 0.1)
        for policy, part in SPEED.items():
            text = rng.gauss(0.0, 0.2)
            time = TRUTH[policy] + typical * part + text * part + rng.gauss(0.0, 0.02)
            rows.append(
                replace(
                    ROW,
                    policy=policy,
                    temperature=0.8,
                    prompt=f"code-{i}",
                    decode_seconds=2.0 * max(time, 0.2),
                    reference=1.0 + typical + text if known else None,
                )
            )
    return rows


def found(rows: list[Row]) -> diagnostics.Ratio:
    ratio = diagnostics.ratio(rows, "marginal", "cascade")
    assert ratio is not None
    return ratio


def test_evened_ratios_are_close_to_the_truth_and_as_measured_on_average():
    truth = TRUTH["cascade"] / TRUTH["marginal"]
    raw = np.array([found(world(seed)).value for seed in range(60)])
    even = np.array([found(luck.evened(world(seed))).value for seed in range(60)])
    assert even.std() < raw.std() / 3
    assert even.mean() == pytest.approx(truth, abs=0.01)
    assert even.mean() == pytest.approx(raw.mean(), abs=3 * raw.std() / 60**0.5)


def test_intervals_of_evened_times_hold_the_truth_about_as_often_as_they_say():
    truth, inside = TRUTH["cascade"] / TRUTH["marginal"], 0
    for seed in range(100):
        ratio = found(luck.evened(world(seed)))
        assert ratio.low is not None
        assert ratio.high is not None
        inside += ratio.low <= truth <= ratio.high
    assert 85 <= inside <= 100


def test_times_that_no_text_explains_stay_as_they_are():
    rng = random.Random(1)
    rows = [replace(row, reference=rng.uniform(0.5, 1.5)) for row in world(0, prompts=200)]
    raw, even = found(rows), found(luck.evened(rows))
    assert even.value == pytest.approx(raw.value, rel=0.03)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"concurrency": 4}, {"reference": None}, {"decoded": 0}]
)
def test_only_sampled_answers_of_known_text_one_at_a_time_are_changed(fields: dict[str, Any]):
    rows = world(0)
    changed = [row.policy for row, now in zip(rows, luck.evened(rows), strict=True) if row != now]
    assert set(changed) == set(SPEED) - {"off"}
    rows = [replace(row, **fields) for row in rows]
    assert luck.evened(rows) == rows


def test_a_few_answers_are_left_alone():
    rows = world(0, prompts=luck.FEWEST - 1)
    assert luck.evened(rows) == rows


def test_no_time_becomes_nothing_however_unlucky_the_text():
    rows = world(0)
    rows[-1] = replace(rows[-1], reference=100.0)
    assert all(row.decode_seconds > 0 for row in luck.evened(rows))


def test_the_reference_is_what_replay_says_of_the_text():
    prompt = list(range(40))
    lines: Iterator[dict[str, Any]] = iter(
        [
            _line("chatcmpl-mc-0a0b0c0d-00001-ff", prompt, prompt),  # a copy
            _line("chatcmpl-mc-0a0b0c0d-00002-ff", prompt, list(range(100, 140))),  # nothing of it
            _line("chatcmpl-mc-0a0b0c0d-00003-ff", prompt, [1]),  # no step
            _line("somebody else's", prompt, prompt),
        ]
    )
    played = luck.conditions(command.DRAFTER)
    assert played is not None
    times = luck.times(lines, played)
    assert set(times) == {"mc-0a0b0c0d-00001", "mc-0a0b0c0d-00002"}
    assert times["mc-0a0b0c0d-00002"] == 1.0
    trace = Trace("", "", tuple(prompt), tuple(prompt))
    (outcome,) = play([trace], luck.REFERENCE, Conditions(MIXTRAL_LIKE))
    assert times["mc-0a0b0c0d-00001"] == pytest.approx(outcome.time / outcome.tokens)
    assert times["mc-0a0b0c0d-00001"] < 0.7


def _line(name: str, prompt: list[int], output: list[int]) -> dict[str, Any]:
    return {"id": name, "prompt_token_ids": prompt, "output_token_ids": output}


@pytest.mark.parametrize(
    ("drafter", "lengths"),
    [
        ({"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4}, (1, 4)),
        ({"method": "ngram", "prompt_lookup_max": 3}, (3, 3)),
        ({"method": "ngram"}, (5, 5)),  # vLLM's own
        ({"method": "draft_model"}, None),
        ({}, None),
    ],
)
def test_only_drafts_that_follow_from_the_text_can_be_replayed(
    drafter: dict[str, Any], lengths: tuple[int, int] | None
):
    played = luck.conditions(drafter)
    assert (played and (played.ngram_min, played.ngram_max)) == lengths
