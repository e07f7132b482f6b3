"""The server under clients: our own, the openai package, vLLM's serving benchmark."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from moecascade import localmodel
from moecascade.errors import SetupError
from moecascade.evaluation import runner
from moecascade.evaluation.checkpoint import Journal
from moecascade.evaluation.client import chat
from moecascade.evaluation.report.speedups import cells
from moecascade.evaluation.schedule import Plan, Settings
from moecascade.evaluation.workloads import ALL, TASKS, Prompt, mix, own
from moecascade.serving import command, server
from moecascade.serving.server import Server
from moecascade.telemetry import step_log

pytestmark = pytest.mark.engine

REPEAT = "Repeat this list three times: red, green, blue, yellow, black, white, brown, grey."


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A real server with the local model."""
    scratch = tmp_path_factory.mktemp("server")
    log = scratch / "steps.jsonl"
    saved = {name: os.environ.pop(name, None) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING",)}
    planned = command.plan(
        str(localmodel.ensure("local")),
        ["--host", "127.0.0.1", "--port", str(server.free_port()), "--max-num-seqs", "4"],
        step_log=log,
        local_name="local",
    )
    try:
        with Server(planned, scratch / "server.log") as running:
            running.wait_ready(600)
            yield running, log
            family = psutil.Process(running.process_id).children(recursive=True)
    finally:
        os.environ.update({name: value for name, value in saved.items() if value is not None})
    assert len(family) >= 3  # HTTP server, engine core, worker
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    server.check_port("127.0.0.1", planned.port)


def test_the_client_counts_what_the_engine_emitted(vllm: tuple[Server, Path], tmp_path: Path):
    running, log = vllm
    settings = Settings(("off", "static:3", "cascade"), max_tokens=32)
    plan = Plan(mix([p for task in TASKS for p in own(task)], 1), settings)
    journal = Journal(tmp_path / "rows.jsonl", {})
    url, name = running.launch.url, running.launch.model
    runner.measure({"off": url}, name, plan, journal, log=step_log.Reader(log))
    rows = journal.rows
    assert len(rows) == 9
    near = 0
    for row in rows:
        engine = row.engine
        assert engine is not None
        # The first token comes from the prompt's own pass, which is no decode step.
        assert row.tokens == engine.emitted + 1
        assert 0 < row.decoded < row.tokens  # a first message may hold more than one
        if row.policy == "off":
            assert engine.k_total == engine.drafted == 0
            assert engine.steps_at_0 == engine.steps == engine.emitted
        if row.policy == "static:3":
            assert engine.k_total == 3 * engine.steps
        assert sum(at.steps for at in engine.by_k) == engine.steps == len(engine.series)
        near += row.decoded == row.tokens - 1 and row.decode_seconds == pytest.approx(
            engine.seconds, rel=0.25, abs=0.1
        )
    assert sum(row.engine.drafted for row in rows if row.engine) > 0
    # What a user waits for is what the engine measured, but for the last hop.
    # A client that is kept waiting by the machine misses it in a row, not in most of them.
    assert near > len(rows) // 2
    # What has been measured is not measured again.
    runner.measure({"off": url}, name, plan, journal)
    assert len(journal.rows) == 9


def test_requests_in_flight_make_one_block(vllm: tuple[Server, Path], tmp_path: Path):
    running, log = vllm
    settings = Settings(("off", "marginal"), concurrencies=(2,), max_tokens=16)
    asked = mix([p for task in TASKS for p in own(task)], 2)[:4]
    plan = Plan(asked, settings, warm=own("math")[-3:])
    journal = Journal(tmp_path / "rows.jsonl", {})
    reader = step_log.Reader(log)
    list(reader())  # what other tests left
    url, name = running.launch.url, running.launch.model
    told: list[str] = []
    runner.measure(
        {"off": url},
        name,
        plan,
        journal,
        log=reader,
        tell=lambda what, _sent: told.append(what),
    )
    # Nothing is learnt without drafts, and nothing of it is measured.
    assert [what for what in told if "warming" in what] == ["warming up marginal"]
    assert len(journal.rows) == 8
    assert len({row.block for row in journal.rows}) == 2
    assert {cell.workload for cell in cells(journal.rows)} == {ALL}
    # Steps in which the other request begins are no decode steps.
    assert all(row.engine and 0 < row.engine.emitted < row.tokens for row in journal.rows)


def test_prompts_beyond_the_context_are_left_out(vllm: tuple[Server, Path], tmp_path: Path):
    running, _ = vllm
    asked = [Prompt("long", "x", "word " * 5000), Prompt("short", "x", "Say hello.")]
    plan = Plan(asked, Settings(("off", "static:2"), max_tokens=4))
    journal = Journal(tmp_path / "rows.jsonl", {})
    url, name = running.launch.url, running.launch.model
    assert runner.measure({"off": url}, name, plan, journal) == ["long"]
    assert [(row.prompt, row.policy) for row in journal.rows] == [
        ("short", "static:2"),
        ("short", "off"),
    ]
    # With several in flight, all of the block have been answered by then.
    more = [*asked, *(Prompt(f"short {i}", "x", "Say hello.") for i in range(2))]
    crowd = Plan(more, Settings(("off", "static:2"), concurrencies=(2,), max_tokens=4))
    journal = Journal(tmp_path / "crowd" / "rows.jsonl", {})
    assert runner.measure({"off": url}, name, crowd, journal) == ["long"]
    assert journal.rows == []
    assert in_flight(running) == 0


def test_a_bad_request_option_is_the_servers_400_with_our_words(vllm: tuple[Server, Path]):
    running, _ = vllm

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=running.launch.url, timeout=60) as http:
            await chat(
                http,
                running.launch.model,
                "Hello",
                request_id="bad",
                max_tokens=4,
                xargs={"cascade_policy": "statik:3"},
            )

    with pytest.raises(SetupError, match=r"400 .*did you mean 'static'"):
        asyncio.run(ask())


@pytest.fixture(scope="module")
def client(vllm: tuple[Server, Path]) -> Iterator[openai.OpenAI]:
    """The openai package, as it comes."""
    running, _ = vllm
    with openai.OpenAI(base_url=f"{running.launch.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, policy: str, tokens: int = 48, **more: object) -> str:
    answer = client.chat.completions.create(
        model="local",
        messages=[{"role": "user", "content": REPEAT}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"vllm_xargs": {"cascade_policy": policy}},
        **more,
    )
    return str(answer.choices[0].message.content)


def test_the_openai_package_is_answered_under_every_policy(client: openai.OpenAI):
    answers = {policy: ask(client, policy) for policy in ("off", "static:3", "cascade", "marginal")}
    assert all(len(answer) > 40 for answer in answers.values())
    whole = answers["marginal"]
    word = whole.split()[-2]
    cut = ask(client, "marginal", stop=[word])
    assert word not in cut
    assert len(cut) < len(whole)


def test_the_openai_package_streams_several_tokens_a_message(
    client: openai.OpenAI, vllm: tuple[Server, Path]
):
    _, log = vllm
    reader = step_log.Reader(log)
    list(reader())
    stream = client.chat.completions.create(
        model="local",
        messages=[{"role": "user", "content": REPEAT}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": {"cascade_policy": "static:8"}},
    )
    messages, tokens, name = 0, 0, ""
    for chunk in stream:
        name = chunk.id
        messages += bool(chunk.choices and chunk.choices[0].delta.content)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    assert 0 < messages < tokens <= 64  # accepted drafts come together
    # The engine may still write steps of a request that another test's client has stopped.
    parts = [p for step in reader() for p in step["requests"] if p["id"].startswith(name)]
    assert sum(part["emitted"] for part in parts) == tokens


def in_flight(running: Server) -> float:
    """Return how many requests the server says that it works on."""
    text = httpx.get(f"{running.launch.url}/metrics", timeout=30).text
    (line,) = [row for row in text.splitlines() if row.startswith("vllm:num_requests_running{")]
    return float(line.split()[-1])


def test_a_stream_that_the_openai_package_leaves_is_forgotten(
    client: openai.OpenAI, vllm: tuple[Server, Path]
):
    running, log = vllm
    reader = step_log.Reader(log)
    list(reader())
    stream = client.chat.completions.create(
        model="local",
        messages=[{"role": "user", "content": REPEAT}],
        max_tokens=1500,
        stream=True,
        extra_body={"vllm_xargs": {"cascade_policy": "marginal"}, "ignore_eos": True},
    )
    for _, chunk in zip(range(5), stream, strict=False):
        name = chunk.id
    stream.close()
    deadline = time.monotonic() + 60
    while in_flight(running):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    parts = [p for step in reader() for p in step["requests"] if p["id"].startswith(name)]
    assert 0 < sum(part["emitted"] for part in parts) < 1000  # ended long before 1500 tokens
    assert len(ask(client, "marginal")) > 40  # and the server serves on


def test_the_openai_package_gets_bad_options_as_its_own_error(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="did you mean 'marginal'"):
        ask(client, "marginl")


def moecascade(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moecascade", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_bench_measures_a_server_that_is_running_goes_on_and_reports(
    vllm: tuple[Server, Path], tmp_path: Path
):
    running, _ = vllm
    line = ["bench", "--url", running.launch.url, "--models", "local", "--out", str(tmp_path)]
    line += ["--policies", "off,hf-heuristic", "--prompts-per-task", "2", "--max-tokens", "12"]
    answer = moecascade(*line)
    assert answer.returncode == 0, answer.stderr
    assert "hf-heuristic" in answer.stdout
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 2
    journal = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(journal[:6]))  # interrupted after five requests
    answer = moecascade(*line)
    assert "Going on after 5 requests" in answer.stderr
    again = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["request"] for row in again] == [row["request"] for row in rows]
    assert again[:5] == rows[:5]
    assert moecascade(*line[:-1], "13").returncode == 2  # measures something else
    answer = moecascade("report", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "hf-heuristic" in (tmp_path / "report.html").read_text()


BENCHMARK = """
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
"""``vllm bench serve``, which CPU builds do not start under that name."""


@pytest.mark.parametrize("policy", ["off", "marginal"])
def test_vllms_serving_benchmark_runs_against_it(
    vllm: tuple[Server, Path], tmp_path: Path, policy: str
):
    running, _ = vllm
    answer = subprocess.run(
        [
            *(sys.executable, "-c", BENCHMARK),
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", running.launch.url, "--model", "local"),
            *("--tokenizer", str(localmodel.ensure("local"))),
            *("--dataset-name", "random", "--random-input-len", "32"),
            *("--random-output-len", "24", "--num-prompts", "4", "--max-concurrency", "2"),
            *("--ignore-eos", "--temperature", "0"),
            *("--extra-body", json.dumps({"vllm_xargs": {"cascade_policy": policy}})),
            *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["completed"] == 4
    assert result["total_output_tokens"] == 4 * 24
