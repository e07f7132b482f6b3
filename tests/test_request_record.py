"""A request's record: the step log joined with it, JSON there and back, results of before."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from moecascade.evaluation.request_record import AtK, from_json, summed, tally
from tests.rows import ENGINE, ROW

NAME = "chatcmpl-mc-0a0b0c0d-00001-9f"
OURS = "mc-0a0b0c0d-00001"


def line(
    seconds: float | None, k: int, drafted: int, emitted: int, name: str = NAME, **part: Any
) -> dict[str, Any]:
    """A line of the step log with one request in it."""
    of = {"id": name, "policy": "x", "k": k, "drafted": drafted, "emitted": emitted, **part}
    times = {"controller": 0.001, "handover": 0.002}
    return {"decode": True, "seconds": seconds, "requests": [of], **times}


def test_rows_come_back_from_json_as_they_were():
    drawn = replace(ENGINE, series=((3, 2, 0.03, None), (0, 1, None, 1.1)), seconds=None)
    for row in (replace(ROW, engine=drawn), replace(ROW, engine=None, gaps=None)):
        assert from_json(json.loads(json.dumps(asdict(row)))) == row


def test_rows_of_the_first_schema_are_read_and_their_zeros_are_not_taken_for_measured():
    """They were flat, with the run in the request's name and 0 for what nobody had measured."""
    old = {**asdict(ROW), "reference": 1.5, "accepted_at": [], "drafted_at": []}
    del old["run"], old["engine"]
    engine = {"step_seconds": 2.0, **asdict(ENGINE)}
    del engine["seconds"]
    assert from_json({**old, **engine}) == ROW
    assert from_json({**old, **engine, "steps": 0}) == replace(ROW, engine=None)
    untimed = from_json({**old, **engine, "step_seconds": 0.0}).engine
    assert untimed is not None
    assert untimed.seconds is None


def test_what_is_no_row_is_refused():
    for values in ({"request": "only"}, {**asdict(ROW), "unheard": 1}):
        with pytest.raises((KeyError, TypeError)):
            from_json(values)


def test_the_step_log_is_joined_by_the_name_within_vllms_name():
    found = tally(
        [
            {**line(0.5, 3, 0, 1), "decode": False},  # with prefill: says nothing of decoding
            line(0.1, 3, 2, 3),
            line(0.2, 0, 0, 1),
            line(0.3, 1, 0, 1, name="chatcmpl-mc-0a0b0c0d-00002-11"),
            line(9.0, 0, 0, 1, name="chatcmpl-warm-up-off-11"),
        ]
    )
    assert set(found) == {OURS, "mc-0a0b0c0d-00002"}
    first = summed(found[OURS], keep_series=True)
    assert first is not None
    assert (first.steps, first.emitted, first.drafted) == (2, 4, 2)
    assert (first.k_total, first.steps_at_0) == (3, 1)
    assert first.seconds == pytest.approx(0.3)
    assert first.by_k == (AtK(0, 1, 1, 0.2, 0, 0), AtK(2, 1, 3, 0.1, 1, 3))
    assert first.series == ((3, 3, 0.1, None), (0, 1, 0.2, None))
    second = summed(found["mc-0a0b0c0d-00002"])
    assert second is not None
    assert second.series == ()


def test_what_was_not_measured_is_not_zero():
    assert summed([]) is None  # a request that the log does not know
    found = summed(tally([line(0.1, 3, 2, 3), line(None, 0, 0, 1)])[OURS])
    assert found is not None
    assert found.seconds is None  # not 0.1: a step is missing in it
    assert [at.seconds for at in found.by_k] == [None, 0.1]


def test_what_a_policy_expected_stands_beside_what_came():
    log = [
        line(s, 2, 2, n, utility=10 * s, expected_tokens=2.0, expected_seconds=0.1)
        for s, n in ((0.1, 3), (0.08, 1), (0.2, 2))
    ]
    found = summed(tally(log)[OURS])
    assert found is not None
    (at,) = found.by_k
    # The answer's end cuts the last step short, so it says nothing of what was right in it.
    assert (at.steps, at.emitted, at.judged, at.judged_emitted) == (3, 6, 2, 4)
    assert at.expected_tokens == 4.0
    assert at.seconds_error == pytest.approx(0.25)  # of 0, 0.25 and 0.5
    assert found.utility == pytest.approx((0.1 + 0.064 + 0.4) / 0.38)  # by time
    assert found.controller_seconds == pytest.approx(0.003)
    assert found.handover_seconds == pytest.approx(0.006)


def test_requests_of_one_step_share_its_overhead():
    both = line(0.1, 0, 0, 1)
    both["requests"] = [
        *both["requests"],
        {**both["requests"][0], "id": NAME.replace("1-9f", "2-9f")},
    ]
    found = [summed(steps) for steps in tally([both]).values()]
    assert [engine.controller_seconds for engine in found if engine] == [0.0005] * 2
