"""The demo: its plan, how measurements become numbers, and how results are kept."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moecascade import demo, plots, prompts, results
from moecascade.client import Reply
from moecascade.demo import Settings
from moecascade.errors import ConfigError
from moecascade.summary import ALL, Row, cell_of, interval, summarise

ROW = Row(
    request="mc-00000000-0000",
    prompt="code-01",
    task="code",
    policy="off",
    place=0,
    seed=0,
    prompt_tokens=50,
    tokens=101,
    decoded=100,
    first_seconds=0.1,
    decode_seconds=2.0,
    finish_reason="length",
    steps=100,
    emitted=100,
    drafted=0,
    k_total=0,
    steps_at_0=100,
    step_seconds=2.0,
    text="...",
)


def row(prompt: str, policy: str, tokens: int, seconds: float, **fields: Any) -> Row:
    task = prompt.partition("-")[0]
    fields = {"decoded": tokens, "decode_seconds": seconds, **fields}
    return replace(ROW, prompt=prompt, task=task, policy=policy, **fields)


def test_prompts_are_distinct_and_name_their_task():
    loaded = [prompt for task in prompts.TASKS for prompt in prompts.load(task)]
    assert len({p.id for p in loaded}) == len({p.prompt for p in loaded}) == len(loaded) == 48
    assert all(p.id.startswith(f"{p.task}-") for p in loaded)


def test_the_mix_alternates_between_the_tasks():
    assert [p.task for p in prompts.mix(2)] == [*prompts.TASKS] * 2


@pytest.mark.parametrize("number", [0, -1, 17])
def test_a_number_of_prompts_that_there_are_not_is_refused(number: int):
    with pytest.raises(ConfigError, match="from 1 to 16"):
        Settings(prompts_per_task=number)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("policies", ("off", "statik:3"), "did you mean 'static'"),
        ("policies", ("off", "off"), "only once"),
        ("max_tokens", 1, "at least 2"),
        ("temperature", -0.5, "or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: object, words: str):
    with pytest.raises(ConfigError, match=words):
        Settings(**{field: value})  # type: ignore[arg-type]


def test_the_baseline_is_always_measured():
    assert Settings(policies=("static:2", "cascade")).measured == ("off", "static:2", "cascade")


def test_the_drafter_drafts_as_far_as_the_longest_fixed_length():
    assert Settings(policies=("off", "static:12")).max_k == 12
    assert Settings(policies=("off", "static:2")).max_k == 8


def test_every_prompt_runs_under_every_policy_once():
    settings = Settings(prompts_per_task=4)
    plan = demo.plan(prompts.mix(4), settings)
    pairs = Counter((request.prompt.id, request.policy) for request in plan)
    assert len(pairs) == 12 * 5
    assert set(pairs.values()) == {1}
    assert len({request.id for request in plan}) == len(plan)


def test_all_policies_on_a_prompt_share_its_seed():
    plan = demo.plan(prompts.mix(2), Settings(prompts_per_task=2, seed=100))
    seeds: dict[str, set[int]] = {request.prompt.id: set() for request in plan}
    for request in plan:
        seeds[request.prompt.id].add(request.seed)
    assert sorted(seeds.values(), key=min) == [{100 + i} for i in range(6)]


def test_within_a_task_every_policy_takes_every_place_equally_often():
    plan = demo.plan(prompts.mix(10), Settings(prompts_per_task=10))
    for task in prompts.TASKS:
        places = Counter((r.policy, r.place) for r in plan if r.prompt.task == task)
        assert set(places.values()) == {2}  # 10 prompts, 5 places
        assert len(places) == 25


def part(name: str, k: int, drafted: int, emitted: int) -> dict[str, object]:
    return {"id": name, "policy": "x", "k": k, "drafted": drafted, "emitted": emitted}


def test_the_step_log_is_joined_by_the_name_within_vllms_name():
    log: list[dict[str, Any]] = [
        {
            "decode": False,
            "seconds": 0.5,
            "requests": [part("chatcmpl-mc-0a0b0c0d-0001-9f", 3, 0, 1)],
        },
        {
            "decode": True,
            "seconds": 0.1,
            "requests": [part("chatcmpl-mc-0a0b0c0d-0001-9f", 3, 2, 3)],
        },
        {
            "decode": True,
            "seconds": 0.2,
            "requests": [part("chatcmpl-mc-0a0b0c0d-0001-9f", 0, 0, 1)],
        },
        {
            "decode": True,
            "seconds": None,
            "requests": [part("chatcmpl-mc-0a0b0c0d-0002-11", 1, 0, 1)],
        },
        {"decode": True, "seconds": 9.0, "requests": [part("chatcmpl-warm-up-off-11", 0, 0, 1)]},
    ]
    found = demo.tally(log)
    assert set(found) == {"mc-0a0b0c0d-0001", "mc-0a0b0c0d-0002"}
    first = found["mc-0a0b0c0d-0001"]
    assert (first.steps, first.emitted, first.drafted, first.k_total, first.steps_at_0) == (
        2,
        4,
        2,
        3,
        1,
    )
    assert first.step_seconds == pytest.approx(0.3)
    assert found["mc-0a0b0c0d-0002"].step_seconds == 0


def test_tokens_of_the_first_message_are_not_counted_as_decoded():
    (request,) = demo.plan(prompts.mix(1)[:1], Settings(policies=("off",), prompts_per_task=1))
    reply = Reply(
        "a b c",
        9,
        tokens=10,
        first_tokens=3,
        first_seconds=1,
        decode_seconds=0.7,
        finish_reason="stop",
    )
    (made,) = demo.rows([(request, reply)], {})
    assert made.decoded == 7
    assert made.seconds_per_token == pytest.approx(0.1)


def test_speed_up_compares_the_time_for_equally_many_tokens():
    # 0.02 s a token without, 0.01 s with speculation; that the second answer is short is no gain.
    cells = summarise([row("code-1", "off", 100, 2.0), row("code-1", "cascade", 10, 0.1)])
    assert cell_of(cells, "code", "cascade").speedup == pytest.approx(2.0)
    assert cell_of(cells, "code", "off").speedup == pytest.approx(1.0)


def test_long_answers_weigh_more_than_short_ones():
    rows = [
        row("code-1", "off", 100, 10.0),
        row("code-2", "off", 10, 1.0),
        row("code-1", "cascade", 100, 5.0),  # twice as fast for 10 s
        row("code-2", "cascade", 10, 2.0),  # half as fast for 1 s
    ]
    cell = cell_of(summarise(rows), "code", "cascade")
    assert cell.speedup == pytest.approx((10 + 1) / (5 + 2))
    assert cell.worst == pytest.approx(0.5)
    assert cell.each == pytest.approx((2.0, 0.5))
    assert cell.tokens_per_second == pytest.approx(110 / 7)


def test_the_mix_is_all_requests_together():
    rows = [
        row("code-1", "off", 10, 1.0),
        row("math-1", "off", 10, 1.0),
        row("code-1", "cascade", 10, 0.5),
        row("math-1", "cascade", 10, 1.5),
    ]
    cells = summarise(rows)
    assert [c.task for c in cells] == ["code", "code", "math", "math", ALL, ALL]
    assert cell_of(cells, ALL, "cascade").speedup == pytest.approx(1.0)


def test_the_baseline_comes_first_whichever_was_measured_first():
    rows = [row("code-1", "cascade", 10, 0.5), row("code-1", "off", 10, 1.0)]
    assert [cell.policy for cell in summarise(rows)] == ["off", "cascade"]


def test_step_numbers_are_means_over_steps_not_over_requests():
    rows = [
        row("code-1", "off", 10, 1.0),
        row(
            "code-1", "cascade", 10, 1.0, steps=8, emitted=20, drafted=16, k_total=24, steps_at_0=0
        ),
        row("code-2", "cascade", 10, 1.0, steps=2, emitted=2, drafted=0, k_total=0, steps_at_0=2),
    ]
    cell = cell_of(summarise(rows), "code", "cascade")
    assert (cell.etr, cell.mean_k, cell.mean_drafted, cell.off_share) == (2.2, 2.4, 1.6, 0.2)


def test_an_answer_of_one_token_has_no_speed():
    rows = [row("code-1", "off", 0, 0.0), row("code-1", "cascade", 0, 0.0)]
    cell = cell_of(summarise(rows), "code", "cascade")
    assert cell.speedup is cell.low is cell.worst is cell.tokens_per_second is None


def test_without_the_baseline_there_is_no_speed_up():
    with pytest.raises(ConfigError, match="'off'"):
        summarise([row("code-1", "cascade", 10, 1.0)])


def test_the_interval_of_a_constant_ratio_is_a_point():
    before = np.array([1.0, 5.0, 0.3])
    assert interval(before, before / 1.25, seed=0) == pytest.approx((1.25, 1.25))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(7)
    covered = 0
    for i in range(200):
        before = random.uniform(1, 2, size=40)
        after = before / 1.3 * random.lognormal(-0.02, 0.2, size=40)  # mean factor 1
        low, high = interval(before, after, seed=i)
        covered += low <= 1.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def kept(**fields: object) -> results.Results:
    parts = {"arguments": {}, "model": {}, "server": {}, "rows": [], "summary": [], **fields}
    return results.collect("demo", **parts)  # type: ignore[arg-type]


def test_results_are_read_back_as_they_were_written(tmp_path):
    made = kept(arguments={"seed": 3}, rows=[results.plain(ROW)])
    results.write(tmp_path / "new" / "demo.json", made)
    assert results.read(tmp_path / "new" / "demo.json") == made


def test_results_say_where_they_come_from():
    made = kept()
    assert made.schema == "moecascade.results/1"
    assert made.machine["cores"] >= 1
    assert {"python", "numpy"} <= set(made.versions)
    assert made.created.endswith("+00:00")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "demo.json"
    results.write(path, kept(arguments={"seed": 1}))
    with pytest.raises(ValueError, match="JSON"):
        results.write(path, kept(arguments={"seed": float("nan")}))
    assert results.read(path).arguments == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not JSON"),
        (json.dumps({"schema": "moecascade.results/0"}), "moecascade.results/0"),
        (json.dumps([1]), "schema is None"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text: str, words: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        results.read(path)


def test_a_missing_results_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.json: no such file"):
        results.read(tmp_path / "gone.json")


def test_the_plot_is_drawn_with_missing_values_left_out(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = [row("code-1", "off", 10, 1.0), row("math-1", "off", 0, 0.0)]
    rows += [row("code-1", "static:3", 10, 0.5), row("math-1", "static:3", 0, 0.0)]
    path = tmp_path / "plots" / "demo.png"
    plots.speedups(summarise(rows), path, "Title", "Caption")
    pixels = image.imread(path)
    assert pixels.shape[1] > pixels.shape[0] > 500
    assert pixels.std() > 0.05  # something is on it
