"""Measuring: the plan, how measurements become numbers, and how results are kept."""

import gzip
import json
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import results, runner
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.client import Reply
from moecascade.evaluation.schedule import Block, Plan, Settings, spread
from moecascade.evaluation.workloads import (
    REPEATED,
    TASKS,
    Prompt,
    apart,
    mix,
    own,
    read,
    workloads,
)
from tests.rows import ROW

OURS = [prompt for task in TASKS for prompt in own(task)]
REPLY = Reply(
    "a b c",
    9,
    tokens=10,
    first_tokens=3,
    first_seconds=1,
    decode_seconds=0.7,
    finish_reason="stop",
    gaps=(0.3, 0.4),
)


def test_our_prompts_are_distinct_and_name_their_task():
    assert len({p.id for p in OURS}) == len({p.prompt for p in OURS}) == len(OURS)
    assert Counter(p.task for p in OURS) == dict.fromkeys(TASKS, 48)
    assert all(p.id.startswith(f"{p.task}-") for p in OURS)


def test_the_mix_alternates_between_the_tasks():
    assert [p.task for p in mix(OURS, 2)] == [*TASKS] * 2


def test_shares_are_equal_where_a_task_has_few_prompts():
    few = [Prompt("a", "x", "?"), Prompt("b", "x", "!"), Prompt("c", "y", ".")]
    assert [p.id for p in mix(few, 3)] == ["a", "c", "b", "c #2", "a #2", "c #3"]
    assert [p.id for p in mix(few)] == ["a", "c", "b"]


def test_three_tasks_make_the_seven_workloads_of_the_paper():
    assert list(workloads(TASKS)) == [
        "code",
        "math",
        "extraction",
        "code+math",
        "code+extraction",
        "math+extraction",
        "all",
    ]
    assert list(workloads(("code",))) == ["code"]
    assert list(workloads(tuple("abcd"))) == ["a", "b", "c", "d", "all"]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("own.jsonl", '{"id": "a", "task": "x", "prompt": "Hi"}\n', ("a", "x", "Hi")),
        (
            "question.jsonl",
            '{"question_id": 81, "category": "qa", "turns": ["One?", "Two?"]}\n',
            ("81", "qa", "One?"),
        ),
        ("gsm8k.jsonl", '{"question": "1+1?", "answer": "2"}\n', ("gsm8k-0", "math", "1+1?")),
        (
            "share.json",
            '[{"id": "s", "conversations": [{"from": "human", "value": "Hi"}]}]',
            ("s", "chat", "Hi"),
        ),
        ("notes.jsonl", '{"text": "Write."}\n\n', ("notes-0", "notes", "Write.")),
    ],
)
def test_published_files_are_read_as_they_are(
    tmp_path: Path, name: str, text: str, found: tuple[str, str, str]
):
    (tmp_path / name).write_text(text)
    assert read([str(tmp_path / name)]) == [Prompt(*found)]


def test_files_may_be_packed_and_hold_what_published_ones_do(tmp_path: Path):
    text = '{"id": "a", "task": "x", "prompt": "one\u2028two"}\n'  # no end of a line in JSON Lines
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read([str(tmp_path / "own.jsonl.gz")]) == [Prompt("a", "x", "one\u2028two")]
    mute: list[list[dict[str, str]]] = [
        [{"from": "gpt", "value": "Hello"}],
        [{"from": "human", "value": ""}],
        [],
    ]
    said = [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hi"}]
    share = [{"id": f"s{i}", "conversations": turns} for i, turns in enumerate([*mute, said])]
    (tmp_path / "share.json").write_text(json.dumps(share))
    assert read([str(tmp_path / "share.json")]) == [Prompt("s3", "chat", "Hi")]
    (tmp_path / "share.json").write_text(json.dumps(share[:3]))
    with pytest.raises(ConfigError, match="holds no prompts"):
        read([str(tmp_path / "share.json")])
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"bad\.jsonl\.gz"):
        read([str(tmp_path / "bad.jsonl.gz")])


def test_humaneval_is_asked_as_a_function_to_complete(tmp_path: Path):
    line = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}
    (tmp_path / "h.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = read([str(tmp_path / "h.jsonl")])
    assert (prompt.id, prompt.task) == ("HumanEval/0", "code")
    assert "def f():" in prompt.prompt


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: not JSON"),
        ('{"id": 1}\n', "no known form"),
        ('{"prompt": " "}\n', "empty"),
        ("3\n", "expected an object"),
        ("", "no prompts"),
    ],
)
def test_bad_prompt_files_are_refused_with_the_place(tmp_path: Path, text: str, words: str):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read([str(tmp_path / "x.jsonl")])


def test_a_missing_prompt_file_is_named():
    with pytest.raises(ConfigError, match="'/nowhere'"):
        read(["/nowhere"])


def test_prompts_to_warm_up_with_are_not_measured_nor_are_their_repetitions():
    given = [*own("code")[:16], *own("math")[:4]]
    warm, left = apart(given, 3)
    assert [p.task for p in warm] == ["code", "math"] * 3
    assert {p.id for p in left} == {p.id for p in (*given[:13], given[16])}
    asked = mix(left, 20)
    assert not {p.id for p in warm} & {p.id.partition(REPEATED)[0] for p in asked}
    assert [p.task for p in asked] == ["code", "math"] * 20  # shares are equal
    assert apart(given, 0) == ([], given)
    with pytest.raises(ConfigError, match="at most 3"):
        apart(given, 4)


@pytest.mark.parametrize("number", [0, -1])
def test_less_than_one_prompt_is_refused(number: int):
    with pytest.raises(ConfigError, match="from 1"):
        mix(OURS, number)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("policies", ("off", "statik:3"), "did you mean 'static'"),
        ("policies", ("off", "off"), "only once"),
        ("policies", (), "at least one"),
        ("max_tokens", 1, "at least 2"),
        ("temperatures", (-0.5,), "or more"),
        ("concurrencies", (0,), "or more"),
        ("seed", -1, "or more"),
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


FIVE = Settings(policies=("off", "static:1", "static:3", "static:8", "cascade"))


def test_a_policy_is_not_asked_at_one_temperature_what_it_has_just_answered_at_another():
    rounds = Plan(mix(OURS), replace(FIVE, temperatures=(0.0, 0.8))).rounds("local")
    first = [block for blocks in rounds[: len(rounds) // 2] for block in blocks]
    asked = {t: {b.requests[0].prompt.id for b in first if b.temperature == t} for t in (0, 0.8)}
    assert len(asked[0]) == len(asked[0.8]) == len(OURS) // 2
    assert not asked[0] & asked[0.8]
    for at in (0, 1):  # tasks take turns at both
        order = [blocks[0].requests[0].prompt.task for blocks in rounds[at::2]]
        assert order == [*TASKS] * (len(OURS) // len(TASKS))


def test_models_are_asked_different_prompts_as_long_as_there_are_some():
    settings = replace(FIVE, temperatures=(0.0, 0.8))
    asked: list[str] = []
    for i in range(2):
        rounds = Plan(mix(OURS), settings).turned(i, 2).rounds("local")
        asked += [blocks[0].requests[0].prompt.id for blocks in rounds[: len(rounds) // 4]]
    assert len(set(asked)) == len(asked) == len(OURS)


def test_with_another_seed_a_short_run_asks_what_it_did_not_ask_before():
    settings = replace(FIVE, temperatures=(0.0, 0.8))
    asked: list[str] = []
    for seed in range(4):
        for i in range(2):
            plan = Plan(mix(OURS), replace(settings, seed=seed)).turned(i, 2)
            rounds = plan.rounds("local")[: len(OURS) // 8]
            asked += [blocks[0].requests[0].prompt.id for blocks in rounds]
            names = [
                r.prompt.id for blocks in plan.rounds("local")[::2] for r in blocks[0].requests
            ]
            assert sorted(names) == sorted(p.id for p in OURS)  # a whole run asks all there are
    assert len(set(asked)) == len(asked) == len(OURS)


def test_seeds_begin_far_from_those_before():
    assert [spread(seed) for seed in range(8)] == [
        0,
        1 / 2,
        1 / 4,
        3 / 4,
        1 / 8,
        5 / 8,
        3 / 8,
        7 / 8,
    ]


def planned(per_task: int, settings: Settings) -> list[Block]:
    rounds = Plan(mix(OURS, per_task), settings).rounds("local")
    return [block for blocks in rounds for block in blocks]


def test_every_prompt_runs_under_every_policy_once():
    blocks = planned(4, FIVE)
    pairs = Counter((r.prompt.id, block.policy) for block in blocks for r in block.requests)
    assert len(pairs) == 12 * 5
    assert set(pairs.values()) == {1}
    assert len({block.id for block in blocks}) == len(blocks)


def test_all_policies_on_a_prompt_share_its_seed():
    seeds: dict[str, set[int]] = {}
    for block in planned(2, replace(FIVE, seed=100)):
        seeds.setdefault(block.requests[0].prompt.id, set()).add(block.requests[0].seed)
    assert sorted(seeds.values(), key=min) == [{100 + i} for i in range(6)]


def test_within_a_task_every_policy_takes_every_place_equally_often():
    blocks = planned(10, FIVE)
    for task in TASKS:
        places = Counter((b.policy, b.place) for b in blocks if b.requests[0].prompt.task == task)
        assert set(places.values()) == {2}  # 10 prompts, 5 places
        assert len(places) == 25


def test_conditions_take_turns_so_that_a_run_that_ends_early_has_some_of_each():
    settings = replace(FIVE, temperatures=(0.0, 0.8), concurrencies=(1, 4))
    rounds = Plan(mix(OURS, 8), settings).rounds("local")
    begun = {(blocks[0].temperature, blocks[0].concurrency) for blocks in rounds[:4]}
    assert len(begun) == 4
    for blocks in rounds:
        assert {b.policy for b in blocks} == set(FIVE.measured)
        assert len({tuple(r.prompt.id for r in b.requests) for b in blocks}) == 1
    assert {len(b.requests) for blocks in rounds for b in blocks} == {1, 8}


def test_too_few_prompts_for_the_requests_in_flight_are_refused():
    with pytest.raises(ConfigError, match="at least 16"):
        Plan(mix(OURS, 2), replace(FIVE, concurrencies=(8,))).rounds("local")


def test_the_same_plan_has_the_same_names_and_another_has_others():
    first = [block.id for block in planned(2, FIVE)]
    assert first == [block.id for block in planned(2, FIVE)]
    assert not set(first) & {block.id for block in planned(2, replace(FIVE, max_tokens=9))}


def test_a_journal_goes_on_where_it_was_interrupted(tmp_path: Path):
    path = tmp_path / "new" / "rows.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.add([ROW, replace(ROW, request="mc-00000000-00001")])
    journal.close()
    with path.open("a") as file:
        file.write('{"request": "cut sho')
    again = Journal(path, {"seed": 1})
    assert again.done == {"mc-00000000-00000", "mc-00000000-00001"}
    again.add([replace(ROW, request="mc-00000000-00002")])
    again.close()
    assert len(Journal(path, {"seed": 1}).rows) == 3


def test_a_journal_of_another_run_is_refused(tmp_path: Path):
    Journal(tmp_path / "rows.jsonl", {"seed": 1}).close()
    with pytest.raises(ConfigError, match="--fresh"):
        Journal(tmp_path / "rows.jsonl", {"seed": 2})


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path):
    first = Journal(tmp_path / "rows.jsonl", {"seed": 1})
    first.add([ROW])
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="in use"):
            Journal(tmp_path / "rows.jsonl", {"seed": 1}, fresh=fresh)
    first.close()
    first.close()
    again = Journal(tmp_path / "rows.jsonl", {"seed": 1})
    assert len(again.rows) == 1
    again.close()
    anew = Journal(tmp_path / "rows.jsonl", {"seed": 2}, fresh=True)
    assert anew.rows == []
    anew.close()


@pytest.mark.parametrize(("deadline", "rounds"), [(-1, 1), (45, 1), (150, 3), (None, 12)])
def test_a_run_ends_after_whole_rounds_and_has_one_at_least(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deadline: float | None, rounds: int
):
    """Rounds of five blocks take 50 seconds each on this clock."""
    now = 0.0

    async def sent(_servers: Any, _model: Any, block: Block, _most: Any) -> Any:
        nonlocal now
        now += 10.0
        return [REPLY] * len(block.requests), 10.0

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(runner, "send", sent)
    monkeypatch.setattr(runner, "warm_up", nothing)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now))
    journal = Journal(tmp_path / "rows.jsonl", {})
    plan = Plan(mix(OURS, 4), FIVE)
    runner.measure({"off": "http://x"}, "m", plan, journal, deadline=deadline)
    asked = Counter(row.prompt for row in journal.rows)
    assert set(asked.values()) == {5}
    assert len(asked) == rounds
    journal.close()


class Anything(BaseHTTPRequestHandler):
    """A server that answers whatever it is asked, as vLLM does without the plugin."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        choice = {"delta": {"content": "a"}, "finish_reason": "stop"}
        message = {"choices": [choice], "usage": usage}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(message)}\n\ndata: [DONE]\n\n".encode())

    def log_message(self, *args: object):
        pass


def test_a_server_without_the_plugin_is_not_measured_as_if_it_had_it():
    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        with pytest.raises(SetupError, match=r"without the plugin.*moecascade serve"):
            runner.check_plugin(f"http://127.0.0.1:{plain.server_port}", "m")
        plain.shutdown()
    with pytest.raises(SetupError, match="connection"):
        runner.check_plugin(f"http://127.0.0.1:{plain.server_port}", "m")


def test_other_prompts_make_another_plan():
    plan = Plan(mix(OURS, 2), FIVE)
    assert plan.digest == Plan(mix(OURS, 2), replace(FIVE, seed=3)).digest
    assert plan.digest != Plan(mix(OURS, 3), FIVE).digest
    assert plan.digest != replace(plan, warm=OURS[-1:]).digest


def test_tokens_of_the_first_message_are_not_counted_as_decoded():
    block = planned(1, Settings(policies=("off",)))[0]
    (made,) = runner.rows_of("local", block, [REPLY], 1.7, {}, keep_text=False)
    assert made.decoded == 7
    assert made.seconds_per_token == pytest.approx(0.1)
    assert made.gaps is not None
    assert made.gaps[0] == pytest.approx(0.35)
    assert made.text == ""


def kept(**fields: object) -> results.Results:
    parts = {"arguments": {}, "models": [], "servers": [], "rows": [], "summary": [], **fields}
    return results.collect("demo", **parts)  # type: ignore[arg-type]


def test_results_are_read_back_as_they_were_written(tmp_path):
    made = kept(arguments={"seed": 3}, rows=[results.plain(ROW)])
    results.write(tmp_path / "new" / "demo.json", made)
    assert results.read(tmp_path / "new" / "demo.json") == made
    before = replace(made, schema="moecascade.results/1")  # from_json knows its rows
    results.write(tmp_path / "old.json", before)
    assert results.read(tmp_path / "old.json") == before


def test_results_say_where_they_come_from():
    made = kept()
    assert made.schema == "moecascade.results/2"
    assert made.machine["cores"] >= 1
    checkout = Path(__file__).resolve().parent.parent / ".git"
    assert (made.code["commit"] is not None) == checkout.exists()
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
