"""From rows to speed-ups: workloads, conditions, blocks, what is best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from moecascade.errors import ConfigError
from moecascade.evaluation.report.speedups import (
    Cell,
    best_static,
    cells,
    fastest,
    units,
    with_hindsight,
)
from moecascade.evaluation.report.statistics import Speedup
from moecascade.evaluation.request_record import Row
from moecascade.evaluation.workloads import ALL, REPEATED
from tests.rows import ENGINE, row


def cell_of(found: Iterable[Cell], workload: str, policy: str) -> Cell:
    return next(c for c in found if (c.workload, c.policy) == (workload, policy))


def speedup_of(found: Iterable[Cell], workload: str, policy: str) -> Speedup:
    of = cell_of(found, workload, policy).speedup
    assert of is not None
    return of


def test_speed_up_compares_the_time_for_equally_many_tokens():
    found = cells([row("code-1", "off", 100, 2.0), row("code-1", "cascade", 10, 0.1)])
    assert speedup_of(found, "code", "cascade").value == pytest.approx(2.0)
    assert speedup_of(found, "code", "off").value == pytest.approx(1.0)
    assert cell_of(found, "code", "cascade").tokens_per_second == pytest.approx(100)


def test_the_mix_is_all_requests_together():
    found = cells(
        [
            row("code-1", "off", 10, 1.0),
            row("math-1", "off", 10, 1.0),
            row("code-1", "cascade", 10, 0.5),
            row("math-1", "cascade", 10, 1.5),
        ]
    )
    assert [c.workload for c in found] == ["code", "code", "math", "math", ALL, ALL]
    assert speedup_of(found, ALL, "cascade").value == pytest.approx(1.0)


def test_the_baseline_comes_first_whichever_was_measured_first():
    rows = [row("code-1", "cascade", 10, 0.5), row("code-1", "off", 10, 1.0)]
    assert [cell.policy for cell in cells(rows)] == ["off", "cascade"]


def test_step_numbers_are_means_over_steps_not_over_requests():
    many = replace(ENGINE, steps=8, emitted=20, drafted=16, k_total=24, steps_at_0=0)
    few = replace(ENGINE, steps=2, emitted=2, drafted=0, k_total=0, steps_at_0=2)
    rows = [
        row("code-1", "off", 10, 1.0),
        row("code-1", "cascade", 10, 1.0, engine=many),
        row("code-2", "cascade", 10, 1.0, engine=few),
        row("code-3", "cascade", 10, 1.0, engine=None),
    ]
    cell = cell_of(cells(rows), "code", "cascade")
    assert (cell.etr, cell.mean_k, cell.off_share) == (2.2, 2.4, 0.2)
    unlogged = cell_of(cells([replace(r, engine=None) for r in rows]), "code", "cascade")
    assert unlogged.etr is unlogged.mean_k is unlogged.off_share is None
    assert unlogged.speedup == cell.speedup


def test_an_answer_of_one_token_has_no_speed():
    rows = [row("code-1", "off", 0, 0.0), row("code-1", "cascade", 0, 0.0)]
    cell = cell_of(cells(rows), "code", "cascade")
    assert cell.speedup is None
    assert cell.tokens_per_second is None


def test_without_the_baseline_there_is_no_speed_up():
    with pytest.raises(ConfigError, match="'off'"):
        cells([row("code-1", "cascade", 10, 1.0)])


def test_a_prompt_with_another_seed_is_the_same_prompt():
    rows = [row("code-1", "off", 100, 2.0), row(f"code-1{REPEATED}2", "cascade", 100, 1.0)]
    assert {unit.asked for unit in units(rows)} == {"code-1"}


def test_blocks_are_compared_by_their_own_time_and_all_their_tokens():
    def two(policy: str, seconds: float) -> list[Row]:
        rows = [row("code-1", policy, 30, 1.0), row("math-1", policy, 10, 1.0)]
        return [
            replace(r, tokens=r.decoded, concurrency=2, block=policy, block_seconds=seconds)
            for r in rows
        ]

    found = cells([*two("off", 4.0), *two("cascade", 2.0)])
    assert [c.workload for c in found] == [ALL, ALL]
    cell = cell_of(found, ALL, "cascade")
    assert speedup_of(found, ALL, "cascade").value == pytest.approx(2.0)
    assert cell.tokens_per_second == pytest.approx(20.0)
    assert cell.requests == 2


def test_conditions_are_kept_apart():
    rows = [row("code-1", "off", 10, 1.0), row("code-1", "cascade", 10, 0.5)]
    rows += [replace(r, temperature=0.8, decode_seconds=1.0) for r in rows]
    found = {(c.condition.temperature, c.policy): c.speedup for c in cells(rows)}
    assert [of.value for of in found.values() if of] == pytest.approx([1, 2, 1, 1])


def test_what_is_fastest_is_said_only_where_its_interval_is_above_the_others():
    rows = [row(f"code-{i}", "off", 10, 1.0) for i in range(8)]
    rows += [row(f"code-{i}", "a", 10, 0.5 if i % 2 else 1.0) for i in range(8)]
    rows += [row(f"code-{i}", "b", 10, 0.8) for i in range(8)]
    assert fastest(cells(rows)) is None  # a is, but its interval holds what b has
    assert fastest(c for c in cells(rows) if c.policy != "a") == "b"
    assert fastest(c for c in cells(rows) if c.policy == "off") is None
    assert fastest([]) is None
    # What was asked more is not compared with what was asked less.
    rows += [row(f"code-{i}", "c", 10, 0.9) for i in range(8)]
    assert fastest(c for c in cells(rows) if c.policy in ("b", "c")) == "b"
    rows += [
        row(f"math-{i}", p, 10, 1.0 - 0.2 * (p == "b")) for i in range(8) for p in ("off", "b")
    ]
    assert fastest(c for c in cells(rows) if c.policy in ("b", "c")) is None


def test_any_policy_can_be_the_one_to_compare_with():
    rows = [row("code-1", "static:3", 10, 1.0), row("code-1", "cascade", 10, 0.8)]
    assert speedup_of(cells(rows, "static:3"), "code", "cascade").value == pytest.approx(1.25)


@pytest.mark.parametrize(("seconds", "best"), [(0.5, "static:3"), (2.0, "off")])
def test_the_best_fixed_k_is_known_in_hindsight(seconds: float, best: str):
    rows = [row("code-1", "off", 10, 1.0), row("code-1", "cascade", 10, 0.1)]
    rows += [row("code-1", f"static:{k}", 10, abs(k - 3) + seconds) for k in (1, 3, 8)]
    (chosen,) = with_hindsight(rows)
    (of,) = [r for r in rows if r.policy == best]
    assert replace(chosen, policy=best) == of
    assert with_hindsight(rows[:2]) == []  # without a fixed K there was no choice


def test_fixed_ks_are_compared_on_what_all_of_them_were_asked():
    rows = [row(f"code-{i}", "off", 10, 1.0) for i in range(3)]
    rows += [row(f"code-{i}", f"static:{k}", 10, 1 / k) for i in range(3) for k in (1, 2)]
    # A further run, in which one of them met easier prompts: a thousand times faster.
    further = [
        replace(
            r, run="ffffffff", decode_seconds=r.decode_seconds / 1000 ** (r.policy == "static:1")
        )
        for r in rows
        if r.policy in ("off", "static:1")
    ]
    (best,) = best_static([*rows, *further]).values()
    assert best == pytest.approx({1: 1.0, 2: 2.0, 0: 1.0})
    (alone,) = best_static(further).values()
    assert alone[1] == pytest.approx(1000)  # alone it is what there is
    chosen = with_hindsight([*rows, *further])
    assert {r.run for r in chosen} == {"00000000"}  # where it ran
