"""Files as people have them: marked, packed, as an array, cut, broken; and which are refused."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moecascade.errors import ConfigError
from moecascade.evaluation import results, runner, workloads
from moecascade.evaluation.request_record import BASELINE
from moecascade.evaluation.schedule import Plan, Settings
from moecascade.serving.flags import Flags
from moecascade.telemetry import files, step_log, traces
from moecascade.telemetry.traces import TOKEN_LIMIT, Trace

TRACES = [
    {"id": f"t{i}", "task": "x", "prompt_token_ids": [1, i], "output_token_ids": [2, 3]}
    for i in range(3)
]
PROMPTS = [{"id": f"p{i}", "task": "x", "prompt": f"Say {i}, \u00e9."} for i in range(3)]
STEPS = [{"schema": step_log.SCHEMA, "step": i} for i in range(3)]
MARK = b"\xef\xbb\xbf"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


READERS: dict[str, tuple[list[dict[str, Any]], Callable[[Path], list[Any]]]] = {
    "traces": (TRACES, lambda path: list(traces.read([path]))),
    "prompts": (PROMPTS, lambda path: workloads.read([str(path)])),
    "steps": (STEPS, lambda path: list(step_log.read(path))),
}
each_reader = pytest.mark.parametrize(("rows", "read"), READERS.values(), ids=READERS)


@each_reader
def test_a_file_is_read_however_it_is_wrapped(
    tmp_path: Path, rows: list[dict[str, Any]], read: Callable[[Path], list[Any]]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(rows))
    plain = read(path)
    assert len(plain) == 3
    windows = lines(rows).replace(b"\n", b"\r\n")
    for data in (lines(rows), array(rows), b"\n" + windows, b"\n" + array(rows)):
        for marked in (data, MARK + data):
            for packed in (marked, gzip.compress(marked)):  # whatever the file is called
                path.write_bytes(packed)
                assert read(path) == plain
    path.write_bytes(lines(rows).rstrip())  # its last line is whole, though it does not end
    assert read(path) == plain


@each_reader
def test_what_comes_before_a_line_that_was_cut_is_used(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    read: Callable[[Path], list[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "x.jsonl"
    whole = lines(rows)
    last = len(lines(rows[:2]))
    for cut in range(last + 1, len(whole) - 1):  # at every byte, amidst a character too
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert len(read(path)) == 2
        (warning,) = caplog.records
        assert warning.levelno == logging.WARNING
        assert f"{path}, line 3" in warning.getMessage()
    path.write_bytes(whole[:last])
    caplog.clear()
    assert len(read(path)) == 2
    assert not caplog.records


@each_reader
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b'{"id": "t', "line 2: not JSON"),
        (b'{"id": "\xe9"}', r"line 2: not UTF-8 \(byte 0xe9\)"),
        (b'{"id": ' + b"[" * 100_000, "line 2: not JSON"),
        (b"[1]", "line 2"),
    ],
)
def test_a_broken_line_amidst_others_is_named(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    read: Callable[[Path], list[Any]],
    broken: bytes,
    words: str,
) -> None:
    path = tmp_path / "x.jsonl"
    first, rest = lines(rows[:1]), lines(rows[1:])
    for text in (first + broken + b"\n" + rest, first + broken + b"\n"):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=rf"x\.jsonl, {words}"):
            read(path)


@each_reader
def test_files_that_hold_nothing_of_use_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], read: Callable[[Path], list[Any]]
) -> None:
    path = tmp_path / "x.jsonl"
    for data in (b'{"id', lines(rows).decode().encode("utf-16"), gzip.compress(lines(rows))[:-9]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"x\.jsonl"):
            read(path)
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        read(tmp_path / "gone.jsonl")


def test_a_growing_file_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path, text = tmp_path / "x.jsonl", MARK + lines(STEPS)
    reader, found = step_log.Reader(path), []
    assert list(reader()) == []
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(text), 7):
            file.write(text[at : at + 7])
            found += list(reader())
            assert found == STEPS[: text[: at + 7].count(b"\n")]
        file.write(b'{"step": 3\n')
        with pytest.raises(ConfigError, match=r"x\.jsonl, line 4: not JSON"):
            list(reader())


def test_a_log_goes_on_after_its_writer_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new" / "t.jsonl"
    for cut in (b"", lines(TRACES)[:40]):  # nothing was begun; a first line was cut
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cut)
        log = traces.TraceLog(path, tokens=True)
        log.begin("a", "x", (1,))
        log.end("a")
        log.close()
        assert [row["id"] for _, row in files.records(path)] == ["a"]
    assert "its last line was cut" in caplog.text
    path.write_bytes(lines(TRACES) + b'{"id": "cut')
    log = traces.TraceLog(path, tokens=True)
    log.begin("b", "x", (1,))
    log.end("b")
    log.close()
    assert [row["id"] for _, row in files.records(path)] == ["t0", "t1", "t2", "b"]


@pytest.mark.parametrize("key", ["prompt_token_ids", "output_token_ids"])
@pytest.mark.parametrize("token", [-1, TOKEN_LIMIT, 1.5, "7", True, None])
def test_what_cannot_be_a_token_id_is_refused(tmp_path: Path, key: str, token: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines([TRACES[0], {**TRACES[1], key: [5, token]}]))
    with pytest.raises(ConfigError) as error:
        list(traces.read([path]))
    for word in (f"{path}, line 2", key, repr(token), str(TOKEN_LIMIT - 1)):
        assert word in str(error.value)


def test_the_greatest_token_id_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines([{**TRACES[0], "output_token_ids": [0, TOKEN_LIMIT - 1]}]))
    assert list(traces.read([path])) == [Trace("t0", "x", (1, 0), (0, TOKEN_LIMIT - 1))]


@pytest.mark.parametrize("key", traces.KEYS)
def test_what_a_trace_lacks_is_named_in_words(tmp_path: Path, key: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines([{name: value for name, value in TRACES[0].items() if name != key}]))
    with pytest.raises(ConfigError, match=rf"line 1: not a trace, it has no {key};") as error:
        list(traces.read([path]))
    assert "KeyError" not in str(error.value)
    path.write_bytes(lines([{**TRACES[0], "prompt_token_ids": 7}]))
    with pytest.raises(ConfigError, match="must be a list"):
        list(traces.read([path]))


def test_results_and_flags_may_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    empty: list[dict[str, Any]] = []
    made = results.collect(
        "x", arguments={}, models=empty, servers=empty, rows=empty, summary=empty
    )
    results.write(path, made)
    path.write_bytes(MARK + path.read_bytes())
    assert results.read(path) == made
    config = tmp_path / "c.yaml"
    config.write_bytes(MARK + b"port: 8123\n")
    assert Flags(["--config", str(config)]).value("port") == "8123"
    config.write_bytes("port: 8123\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        Flags(["--config", str(config)])


SYSTEM, USER, ANSWER = (
    {"role": role, "content": text}
    for role, text in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))
)
AGAIN = {"role": "user", "content": "And again?"}


def read_one(tmp_path: Path, row: dict[str, Any]) -> workloads.Prompt:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines([row]))
    (prompt,) = workloads.read([str(path)])
    return prompt


@pytest.mark.parametrize(
    ("turns", "sent"),
    [
        ([USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER, ANSWER], [SYSTEM, USER]),
        ([SYSTEM, USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN]),
        ([USER, ANSWER, AGAIN, ANSWER], [USER, ANSWER, AGAIN]),
        ([{**SYSTEM, "role": "developer"}, USER], [SYSTEM, USER]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [USER]),
    ],
)
def test_chats_are_sent_up_to_the_users_last_turn(
    tmp_path: Path, turns: list[dict[str, Any]], sent: list[dict[str, str]]
) -> None:
    chat = read_one(tmp_path, {"messages": turns})
    assert chat.messages == sent
    assert (chat.id, chat.task, chat.prompt) == ("chats-0", "chats", sent[-1]["content"])
    named = read_one(tmp_path, {"id": 7, "task": "t", "messages": turns})
    assert (named.id, named.task, named.messages) == ("7", "t", sent)
    batch = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    line = read_one(tmp_path, {**batch, "body": {"model": "m", "messages": turns}})
    assert (line.id, line.task, line.messages) == ("c", "chats", sent)
    listed = read_one(tmp_path, {"prompt": turns})
    assert listed.messages == sent


def test_the_whole_conversation_is_sent(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []

    async def answer(request: Request) -> Response:
        received.append(await request.json())
        usage = {"prompt_tokens": 1, "completion_tokens": 2}
        message = {"choices": [{"delta": {"content": "ok"}}], "usage": usage}
        return Response(f"data: {json.dumps(message)}\n\ndata: [DONE]\n\n")

    turns = [SYSTEM, USER, ANSWER, AGAIN]
    prompt = read_one(tmp_path, {"messages": turns})
    block = Plan([prompt], Settings(policies=(BASELINE,))).rounds("m")[0][0]
    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])

    async def send() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await runner.send({BASELINE: client}, "m", block, 9)

    asyncio.run(send())
    assert [body["messages"] for body in received] == [turns]


def test_a_published_conversation_keeps_the_systems_text(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "gpt", "value": "Welcome."},
        {"from": "human", "value": "Hi"},
        {"from": "bing", "value": "Hello."},
        {"from": "human", "value": "And again?"},
    ]
    assert read_one(tmp_path, {"id": 1, "conversations": turns}).messages == [SYSTEM, USER]


def test_a_chat_in_which_no_human_speaks_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    mute: list[list[dict[str, Any]]] = [[], [SYSTEM], [SYSTEM, ANSWER], [{**USER, "content": " "}]]
    path.write_bytes(lines([{"messages": turns} for turns in [*mute, [USER]]]))
    assert [prompt.messages for prompt in workloads.read([str(path)])] == [[USER]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": 1, "input": "x"}, ["its keys are id, input", "messages", "prompt", "body"]),
        ({}, ["its keys are none", "messages"]),
        ({"custom_id": "c", "body": {"input": "x"}}, ["its keys are id, input", "messages"]),
        ({"messages": "Hi"}, ["'Hi'", '"role": "user"']),
        ({"messages": [USER, {"role": "tool", "content": "3"}, AGAIN]}, ["'tool'", "allowed"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["only text"]),
        ({"turns": []}, ["empty or no text"]),
        ({"prompt": 3}, ["empty or no text"]),
        ({"entry_point": "f"}, ["empty or no text"]),
    ],
)
def test_prompts_of_no_known_form_are_told_the_known_ones(
    tmp_path: Path, row: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read_one(tmp_path, row)
    for word in (f"{tmp_path / 'chats.jsonl'}, line 1", *words):
        assert word in str(error.value)


def test_names_that_repeat_are_numbered_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    names = ["a", "a-2", "a", "b", "a"]
    one.write_bytes(lines([{"id": name, "prompt": str(i)} for i, name in enumerate(names)]))
    two.write_bytes(lines([{"id": "b", "prompt": "of another file"}]))
    found = workloads.read([str(one), str(two)])
    assert [prompt.id for prompt in found] == ["a", "a-2", "a-3", "b", "a-4", "b-2"]
    assert [prompt.prompt for prompt in found] == ["0", "1", "2", "3", "4", "of another file"]
    first, second = (record.getMessage() for record in caplog.records)
    assert str(one) in first
    assert "'a-3'" in first
    assert str(two) in second
    assert "'b-2'" in second


@pytest.mark.parametrize("before", [b'{"id": 1}', b'{"id": 0}\n{"id": 1}', b"notes of mine", b"["])
def test_appending_destroys_nothing_but_a_record_that_was_cut(tmp_path: Path, before: bytes):
    path = tmp_path / "log.jsonl"
    path.write_bytes(before)
    with files.open_to_append(path) as file:
        file.write(files.json_line({"id": 2}))
    assert path.read_bytes() == before + b'\n{"id":2}\n'
