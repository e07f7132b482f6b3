"""Bad per-request options are answered with 400; everything else reaches the server as it came."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware as Using
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from moecascade.vllm.http import Middleware

JSON = {"content-type": "application/json; charset=utf-8"}


async def echo(request: Request) -> Response:
    return Response(await request.body(), headers={"x-passed": "yes"})


@pytest.fixture
def client() -> TestClient:
    app = Starlette(
        routes=[Route("/v1/completions", echo, methods=["GET", "POST"])],
        middleware=[Using(Middleware)],
    )
    text = SimpleNamespace(num_experts=8, num_experts_per_tok=4)
    app.state.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=8, method="eagle"),
        model_config=SimpleNamespace(hf_text_config=text, served_model_name="m"),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        additional_config={"cascade": {"options": {"cascade": {"set_steps": 32}}}},
        scheduler_config=SimpleNamespace(async_scheduling=False),
    )
    return TestClient(app)


def test_a_policy_that_has_to_see_drafts_is_refused_where_they_are_not_shown(
    client: TestClient,
) -> None:
    body = {"vllm_xargs": {"cascade_policy": "survival-budget"}}
    assert client.post("/v1/completions", json=body).status_code == 200
    app: Any = client.app
    app.state.vllm_config.scheduler_config.async_scheduling = True
    fresh = TestClient(Starlette(routes=app.routes, middleware=[Using(Middleware)]))
    fresh.app.state.vllm_config = app.state.vllm_config  # type: ignore[attr-defined]
    answer = fresh.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "--no-async-scheduling" in answer.text


@pytest.mark.parametrize(
    ("xargs", "word"),
    [
        ({"cascade_policy": "cascad"}, "did you mean 'cascade'"),
        ({"cascade_policy": "static:9"}, "from 0 to 8"),
        ({"cascade_max_k": 99}, "from 0 to 8"),
        ({"cascade_kmax": 3}, "did you mean 'cascade_max_k'"),
        ({"cascade_task": 3}, "must be a text"),
        ({"cascade_policy": "cascade[set_steps=0]"}, "at least 1"),
        ({"cascade_policy": "marginal[experts=3]"}, "top_k must be from 1 to experts (3), got 4"),
        ({"cascade_policy": "static:" + "9" * 5000}, "whole number after the colon"),
        ({"cascade_policy": "cascade[backoff=Infinity]"}, "backoff must be a number"),
    ],
)
def test_bad_options_are_answered_with_400(client: TestClient, xargs: Any, word: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", "vllm_xargs": xargs})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "vllm_xargs"
    assert word in error["message"]
    assert "x-passed" not in answer.headers


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"vllm_xargs": {"cascade_policy": "static:3", "cascade_max_k": 2}}).encode(),
        json.dumps({"vllm_xargs": {"other": 1}}).encode(),
        json.dumps({"vllm_xargs": "cascade_policy"}).encode(),
        b'{"cascade_policy": ',  # no JSON: the server's to refuse
        b'["cascade_"]',
        b"",
        b"x" * 300_000,
    ],
)
def test_everything_else_passes_unchanged(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 200
    assert answer.headers["x-passed"] == "yes"
    assert answer.content == body


def test_a_body_in_pieces_is_read_whole_and_passed_whole(client: TestClient) -> None:
    def pieces(text: str) -> Any:
        return (text[i : i + 7].encode() for i in range(0, len(text), 7))

    good = json.dumps({"prompt": "y" * 100, "vllm_xargs": {"cascade_policy": "off"}})
    answer = client.post("/v1/completions", content=pieces(good), headers=JSON)
    assert answer.content == good.encode()
    bad = good.replace('"off"', '"of"')
    assert client.post("/v1/completions", content=pieces(bad), headers=JSON).status_code == 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_bad_option_is_found_however_its_key_is_written(
    client: TestClient, encoding: str
) -> None:
    escaped = "".join(f"\\u{ord(sign):04x}" for sign in "cascade_policy")
    for key in ("cascade_policy", "\\u0063ascade_policy", "cascade\\u005Fpolicy", escaped):
        bad = f'{{"vllm_xargs": {{"{key}": "no-such"}}}}'.encode(encoding)
        answer = client.post("/v1/completions", content=bad, headers=JSON)
        assert answer.status_code == 400
        assert "'no-such'" in answer.json()["error"]["message"]
        good = f'{{"vllm_xargs": {{"{key}": "off"}}}}'.encode(encoding)
        assert client.post("/v1/completions", content=good, headers=JSON).content == good


def test_json_is_known_however_it_is_written(client: TestClient) -> None:
    body = b'{"vllm_xargs": {"cascade_policy": "no-such"}}'
    for kind in ("Application/JSON", "application/vnd.api+json"):
        answer = client.post("/v1/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 400


def test_what_is_no_json_is_passed_on_without_waiting_for_any_of_it() -> None:
    began: list[str] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        began.append("the application")

    async def receive() -> Any:
        raise AssertionError(f"{began or 'the middleware'} waits for a body")

    async def send(_message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"audio/wav")]}
    asyncio.run(Middleware(app)(scope, receive, send))
    assert began == ["the application"]


def test_reading_is_left_alone(client: TestClient) -> None:
    assert client.get("/v1/completions").status_code == 200


def test_who_may_not_choose_is_told_so(client: TestClient) -> None:
    config = client.app.state.vllm_config  # type: ignore[attr-defined]
    config.additional_config = {"cascade": {"request_options": False}}
    for xargs in ({"cascade_policy": "off"}, {"cascade_max_k": 0}):
        answer = client.post("/v1/completions", json={"prompt": "x", "vllm_xargs": xargs})
        assert answer.status_code == 400
        assert "request_options is false" in answer.json()["error"]["message"]
    answer = client.post("/v1/completions", json={"vllm_xargs": {"cascade_task": "code"}})
    assert answer.status_code == 200
