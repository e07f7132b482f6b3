"""What operators see of a real server: metrics, dashboard, alerts, live page, log line, reports."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from moecascade import localmodel
from moecascade.core.controller import MOST_SPECS
from moecascade.core.options import CONFIG_KEY
from moecascade.core.step import Decision, Expectation
from moecascade.serving import command, server
from moecascade.serving.server import Server
from moecascade.telemetry import live
from moecascade.telemetry.metrics import FAMILIES, PREFIX
from moecascade.vllm.reports import Reporting
from tests.browser import dumped, program

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
REPEAT = "Repeat this list five times: red, green, blue, yellow, black, white, brown, grey."
TOKENS = 160


@dataclass
class Operated:
    """A server that has everything on, and what was asked of it."""

    url: str
    log: Path
    answers: list[dict[str, Any]]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def chat(self, policy: str, **more: Any) -> dict[str, Any]:
        body = {
            "model": "local",
            "messages": [{"role": "user", "content": REPEAT}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "vllm_xargs": {"cascade_policy": policy, "cascade_report": True},
            **more,
        }
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def value(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == PREFIX + name
            and all(sample.labels[key] == wanted for key, wanted in labels.items())
        )


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    scratch = tmp_path_factory.mktemp("operated")
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")  # conftest's
    saved = {name: os.environ.pop(name, None) for name in names}
    config = {CONFIG_KEY: {"live_page": True, "log_seconds": 1.0}}
    planned = command.plan(
        str(localmodel.ensure("local")),
        ["--host", "127.0.0.1", "--port", str(server.free_port()), "--max-num-seqs", "4",
         "--additional-config", json.dumps(config)],
        local_name="local",
    )  # fmt: skip
    try:
        with Server(planned, scratch / "server.log") as running:
            running.wait_ready(600)
            made = Operated(running.launch.url, scratch / "server.log", [])
            policies = ("off", "static:3", "cascade", "marginal", "marginal[crowd=3]")
            with ThreadPoolExecutor(4) as pool:
                made.answers = list(pool.map(made.chat, policies))
            yield made
    finally:
        os.environ.update({name: value for name, value in saved.items() if value is not None})


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.engine
def test_metrics_stand_beside_vllm_s_own_and_count_what_clients_got(operated: Operated):
    exposed = operated.get("/metrics")
    assert exposed.headers["content-type"].startswith("text/plain")
    assert int(exposed.headers["content-length"]) == len(exposed.content)
    names = {family.name for family in text_string_to_metric_families(exposed.text)}
    assert {PREFIX + name for name in FAMILIES} <= names
    assert "vllm:generation_tokens" in names
    # The first token comes from the prompt's own pass, where a request verifies nothing.
    assert operated.value("tokens_emitted_total") == len(operated.answers) * TOKENS
    assert operated.value("request_steps_total", policy="off", k="0") == TOKENS
    assert operated.value("draft_tokens_verified_total", policy="off") == 0
    assert operated.value("draft_tokens_verified_total", policy="static:3") > 0
    assert operated.value("requests_total", policy="other", chosen_by="request") == 1
    assert operated.value("requests_running") == 0
    assert operated.value("faults_total") == 0
    vllm = sum(
        sample.value
        for family in text_string_to_metric_families(exposed.text)
        for sample in family.samples
        if sample.name == "vllm:spec_decode_num_accepted_tokens_total"
    )
    assert operated.value("draft_tokens_accepted_total") == vllm


@pytest.mark.engine
def test_an_answer_says_what_speculation_did_for_it(operated: Operated):
    for answer, policy in zip(
        operated.answers, ("off", "static:3", "cascade", "marginal", "other"), strict=True
    ):
        report = answer["cascade"]
        assert report["policy"] == policy
        assert report["steps"] + report["accepted_draft_tokens"] == TOKENS
        assert report["estimated_speedup"] > 0.5
        if policy == "off":
            assert report["steps_without_drafts"] == report["steps"]
            assert report["estimated_speedup"] == pytest.approx(1.0, abs=0.15)


@pytest.mark.engine
def test_a_stream_says_it_in_a_last_message_and_nothing_where_nobody_asks(operated: Operated):
    body: dict[str, Any] = {
        "model": "local",
        "prompt": REPEAT,
        "max_tokens": 20,
        "ignore_eos": True,
    }
    body["stream"] = True
    url = f"{operated.url}/v1/completions"
    plain = httpx.post(url, json=body, timeout=300).text
    assert "cascade" not in plain
    asked = httpx.post(url, json={**body, "vllm_xargs": {"cascade_report": 1}}, timeout=300).text
    lines = [line.removeprefix("data: ") for line in asked.split("\n") if line]
    assert lines[-1] == "[DONE]"
    last = json.loads(lines[-2])
    assert last["choices"] == []
    assert last["id"] == json.loads(lines[0])["id"]
    assert last["cascade"]["steps"] + last["cascade"]["accepted_draft_tokens"] == 20


@pytest.mark.engine
def test_a_line_in_the_log_says_what_requests_did_while_they_ran(operated: Operated):
    lines = [line for line in operated.log.read_text().splitlines() if " times as fast as " in line]
    assert lines
    for line in lines:
        assert re.search(r"moecascade: [1-4] running, drafts in \d+% of steps", line)
    time.sleep(2.5)
    still = [line for line in operated.log.read_text().splitlines() if " times as fast as " in line]
    assert len(still) <= len(lines) + 1  # nothing runs, nothing is said


# ---- Prometheus and Grafana ----------------------------------------------------------------------


def test_the_dashboard_is_the_one_that_the_script_makes(tmp_path: Path):
    made = subprocess.run(
        [sys.executable, "-c", "import json, dashboard; print(json.dumps(dashboard.dashboard()))"],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert json.loads(made) == kept
    for panel in kept["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["description"]


def queries() -> list[str]:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.engine
def test_prometheus_scrapes_it_and_every_panel_has_something_to_show(
    operated: Operated, tmp_path: Path
):
    port = server.free_port()
    config = tmp_path / "prometheus.yml"
    target = operated.url.removeprefix("http://")
    config.write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n"
        f"rule_files: ['{DEPLOY / 'prometheus-rules.yml'}']\n"
        f"scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    subprocess.run([program("promtool"), "check", "config", config], check=True)
    at = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/db",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("w"),
    ) as running:  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    httpx.get(f"{at}/-/ready").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            time.sleep(2.5)  # a rate needs what was there before
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(operated.chat, ("off", "static:3", "marginal")))
            time.sleep(2.5)
            for query in queries():
                asked = query.replace("$model", "local").replace("$__rate_interval", "1m")
                found = httpx.get(f"{at}/api/v1/query", params={"query": asked}).json()
                assert found["status"] == "success", query
                assert found["data"]["result"], query
            rules = httpx.get(f"{at}/api/v1/rules").json()["data"]["groups"][0]["rules"]
            assert len(rules) == 4
            assert {rule["health"] for rule in rules} == {"ok"}
            assert httpx.get(f"{at}/api/v1/alerts").json()["data"]["alerts"] == []
        finally:
            running.terminate()


ALERTS = """
rule_files: [{rules}]
tests:
  - interval: 1m
    input_series:
      - {{series: '{ours}faults_total{{{one}, kind="policy"}}', values: '0x20 1x40'}}
      - {{series: '{ours}faults_total{{{two}, kind="policy"}}', values: '0x60'}}
      - {{series: '{ours}decode_seconds_total{{{one}, policy="static:8"}}', values: '0+50x60'}}
      - {{series: '{ours}baseline_seconds_total{{{one}, policy="static:8"}}', values: '0+40x60'}}
      - {{series: '{ours}decode_seconds_total{{{two}, policy="marginal"}}', values: '0+50x60'}}
      - {{series: '{ours}baseline_seconds_total{{{two}, policy="marginal"}}', values: '0+55x60'}}
      - {{series: '{ours}controller_seconds_total{{{one}}}', values: '0+5x60'}}
      - {{series: '{ours}controller_seconds_total{{{two}}}', values: '0+0.3x60'}}
      - {{series: '{ours}step_seconds_total{{{one}, kind="decode"}}', values: '0+55x60'}}
      - {{series: '{ours}step_seconds_total{{{two}, kind="decode"}}', values: '0+55x60'}}
      - {{series: '{ours}steps_total{{{one}}}', values: '0+900x60'}}
      - {{series: 'vllm:generation_tokens_total{{model_name="a"}}', values: '0+900x60'}}
      - {{series: 'vllm:generation_tokens_total{{model_name="plain"}}', values: '0+900x60'}}
    promql_expr_test:
      - expr: count by (alertname, model_name) (ALERTS{{alertstate="firing"}})
        eval_time: 25m
        exp_samples:
          - {{labels: '{{alertname="MoecascadeFaults", model_name="a"}}', value: 1}}
          - {{labels: '{{alertname="MoecascadeSlower", model_name="a"}}', value: 1}}
          - {{labels: '{{alertname="MoecascadePresence", model_name="a"}}', value: 1}}
          - {{labels: '{{alertname="MoecascadeSilent", model_name="plain"}}', value: 1}}
"""


def test_alerts_fire_where_they_should_and_nowhere_else(tmp_path: Path):
    text = ALERTS.format(
        rules=DEPLOY / "prometheus-rules.yml",
        ours=PREFIX,
        one='model_name="a", engine="0"',
        two='model_name="b", engine="0"',
    )
    (tmp_path / "test.yml").write_text(text)
    done = subprocess.run(
        [program("promtool"), "test", "rules", tmp_path / "test.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the live page -------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_browser_shows_the_live_page_while_requests_run(operated: Operated, tmp_path: Path):
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(operated.chat, p, max_tokens=400) for p in ("marginal", "cascade")]
        time.sleep(4)
        page, console = dumped(f"{operated.url}/cascade", tmp_path / "profile", wait=5)
        state = operated.get("/cascade/state").json()
        assert not any(one.done() for one in asked)
    assert console == []
    assert 'class="card request"' in page
    assert "requests running" in page
    assert re.search(r"K = \d", page)
    (engine,) = state["engines"].values()
    running = [one for one in engine["requests"] if not one["ended"]]
    assert {one["policy"] for one in running} == {"marginal", "cascade"}
    assert all(one["why"].startswith("K = ") for one in running)
    assert engine["curve"][0] == pytest.approx(1.0)
    assert REPEAT[:20] not in page + json.dumps(state)  # nothing that anybody said
    policy = operated.get("/cascade").headers["content-security-policy"]
    assert "default-src 'none'" in policy


MEASURE = """
<script>
window.fetch = async () => ({ ok: true, json: async () => (STATE) });
setTimeout(() => { document.title = "FACTS" + JSON.stringify({
  window: innerWidth, page: document.documentElement.scrollWidth,
  cards: document.querySelectorAll(".request").length,
  marks: document.querySelectorAll("svg rect, svg circle").length,
  paper: getComputedStyle(document.body).backgroundColor,
  least: Math.min(...[...document.querySelectorAll("svg text")].map(
    t => t.getBoundingClientRect().height)),
}); }, 1500);
</script>
"""


def many(requests: int) -> dict[str, Any]:
    rows = [[ago, 20, ago % 60, 20 + ago % 40] for ago in range(live.SECONDS)][::-1]
    each = [
        {
            "id": f"chatcmpl-{'0123456789abcdef' * 4}-{n}",
            "policy": "survival-budget",
            "ended": n % 3 == 0,
            "speedup": 0.9 + n / 20 if n else None,
            "seconds": rows,
            "why": "K = 3: accepted with chance 0.92, 0.81, 0.66; 3.4 tokens expected. " * 2,
        }
        for n in range(requests)
    ]
    engine = {
        "requests": each,
        "span": live.SECONDS,
        "hidden": 100,
        "batch": 256,
        "acceptance": [[100 - n, 90 - 2 * n] for n in range(8)],
        "curve": [1 + n / 100 for n in range(300)],
        "points": [[n, 1 + n / 90, n % 30] for n in range(0, 300, 3)],
        "baseline": 0.0123,
    }
    return {
        "model": "org/" + "a-very-long-name-of-a-model" * 3,
        "engines": {"0": engine, "1": engine},
    }


@pytest.mark.parametrize("width", [400, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_phones_and_screens_by_day_and_night(tmp_path: Path, width: int, dark: bool):
    text = (ROOT / "moecascade" / "vllm" / "live_page.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    script = MEASURE.replace("STATE", json.dumps(many(live.REQUESTS)))
    (tmp_path / "page.html").write_text(text.replace("<script>", script + "<script>", 1))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>f.onload = () => setTimeout(() => document.title = f.contentDocument.title, 2500)"
        "</script>"
    )
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shown, console = dumped(frame.as_uri(), tmp_path / "profile", wait=5, flags=flags)
    assert console == []
    match = re.search(r"FACTS(\{.*?\})", shown)
    assert match, shown[:300]
    facts = json.loads(match.group(1).replace("&quot;", '"'))
    assert facts["window"] == width
    assert facts["page"] <= width
    assert facts["cards"] == 2 * live.REQUESTS
    assert facts["marks"] > 1000
    assert facts["least"] > 7
    dim = facts["paper"] == "rgb(21, 23, 26)"
    assert dim is dark


def test_words_say_what_decided():
    def said(k: int, survival: list[float], lost: float = 0.0) -> str:
        costs = [1.0, 1.2, 1.4, 1.6, 1.8]
        parts = {"lambda": 1.5, "lost": lost, "survival": survival, "costs": costs}
        tokens = 1 + sum(survival[:k])
        expected = Expectation(tokens / costs[k], tokens, 0.02, parts)
        return live.in_words(Decision("r", k, "marginal", expected), 1)

    assert said(0, []) == "K = 0: there is no draft."
    assert "token 1 is accepted with chance 0.10 and would pay from 0.30 on" in said(0, [0.1, 0.05])
    assert "drafts have cost this request 3.1% already" in said(0, [0.9], lost=0.031)
    words = said(2, [0.9, 0.8, 0.2])
    assert words.startswith("K = 2: accepted with chance 0.90, 0.80; 2.7 tokens expected")
    assert "Not 3: token 3 is accepted with chance 0.20 and would pay from 0.30 on" in words
    tried = Decision("r", 3, "test", Expectation(1.25))
    assert live.in_words(tried, 1) == "K = 3 (test, utility 1.25 so far)."
    assert live.in_words(Decision("r", 0, "fault"), 1) == "K = 0 (fault)."


# ---- what clients may try ------------------------------------------------------------------------

DEEP: Any = 1
for _ in range(500):
    DEEP = [DEEP]

HOSTILE: list[Any] = [
    {"cascade_policy": "x" * 1_000_000},
    {"cascade_policy": "static:" + "9" * 100_000},
    {"cascade_policy": "static:-1"},
    {"cascade_policy": "cascade[" * 10_000},
    {"cascade_policy": "../../etc/passwd"},
    {"cascade_policy": "os:system[x=1]"},
    {"cascade_policy": ["marginal"]},
    {"cascade_max_k": 10**400},
    {"cascade_max_k": -1},
    {"cascade_max_k": 1.5},
    {"cascade_max_k": "3"},
    {"cascade_max_k": float("nan")},
    {"cascade_max_k": float("inf")},
    {"cascade_max_k": {"a": {"b": {}}}},
    {"cascade_report": "yes" * 1000},
    {"cascade_report": DEEP},
    {"cascade_task": ["a"] * 100_000},
    {"cascade_" + "k" * 100_000: 1},
    {f"cascade_{n}": n for n in range(10_000)},
    "cascade_policy",
    ["cascade_policy", "off"],
]


@pytest.mark.engine
def test_whatever_a_client_writes_is_refused_or_served_and_no_fault(operated: Operated):
    url, body = f"{operated.url}/v1/completions", {"model": "local", "prompt": "a", "max_tokens": 2}
    for xargs in HOSTILE:
        text = json.dumps({**body, "vllm_xargs": xargs})
        answer = httpx.post(url, content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400, str(xargs)[:80]
        assert len(answer.text) < 5000, str(xargs)[:80]
    assert operated.value("faults_total") == 0


@pytest.mark.engine
def test_many_different_policies_leave_few_behind_and_every_request_is_served(operated: Operated):
    def ask(n: int) -> int:
        xargs = {"cascade_policy": f"cascade[set_steps={n + 1}]"}
        body = {"model": "local", "prompt": "a", "max_tokens": 1, "vllm_xargs": xargs}
        return httpx.post(f"{operated.url}/v1/completions", json=body, timeout=300).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(200))) == {200}
    assert operated.value("policies") <= MOST_SPECS
    assert operated.value("requests_running") == 0
    assert operated.value("requests_total", policy="other") >= 200
    assert operated.value("faults_total") == 0


# ---- reports, without a server -------------------------------------------------------------------


async def _sent(*messages: Message, report: Any) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def asked(_name: str) -> Any:
        return report

    reporting = Reporting(send, asked)
    for message in messages:
        await reporting(message)
    return sent


def started(kind: bytes, status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        (b"application/json", 200, b"not json"),
        (b"application/json", 200, b"[1, 2]"),
        (b"application/json", 200, b'{"choices": []}'),
        (b"application/json", 400, b'{"id": "x", "error": {}}'),
        (b"text/plain", 200, b"data"),
    ],
)
def test_answers_of_other_kinds_go_out_as_they_are(kind: bytes, status: int, body: bytes):
    first, last = {"type": "http.response.body", "body": body[:3], "more_body": True}, body[3:]
    messages = asyncio.run(
        _sent(
            started(kind, status),
            first,
            {"type": "http.response.body", "body": last},
            report={"steps": 1},
        )
    )
    assert messages[0]["status"] == status
    assert b"".join(message.get("body", b"") for message in messages) == body


def test_where_no_engine_knows_of_it_nothing_is_added():
    body = {"type": "http.response.body", "body": b'{"id": "x"}'}
    sent = asyncio.run(_sent(started(b"application/json"), body, report=None))
    assert sent[1]["body"] == b'{"id": "x"}'
    assert dict(sent[0]["headers"])[b"content-length"] == b"11"
