"""HTTP: what the API server does for us, as a middleware.

``vllm serve ... --middleware moecascade.vllm.http.Middleware``; `moecascade serve` adds it. It

* refuses bad per-request options with status 400 before they reach the engine (without it a bad
  option is logged and ignored; the request's others apply),
* adds our metrics to ``/metrics``,
* adds to the answer of a request that asks for it what speculation did (`reports`),
* serves the live page at ``/cascade``, where the server's configuration says so.

Everything else passes through it untouched.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from moecascade.core.options import (
    REQUEST_PREFIX,
    RequestOptions,
    check_unseen,
    request_options,
    server_options,
)
from moecascade.errors import ConfigError
from moecascade.vllm import compat, drafters, link, support
from moecascade.vllm.reports import Reporting

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SIGNS = (REQUEST_PREFIX.encode(), b"\\u00", b"\0")
"""A body without any of these holds no key of ours: not as it is, not escaped, not in UTF-16."""

PAGE, STATE, METRICS = "/cascade", "/cascade/state", "/metrics"
NOTHING_ELSE = (
    b"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
POLICY = (
    (b"content-security-policy", NOTHING_ELSE),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
"""Headers of the page: it loads nothing from anywhere, and nobody can put it into another."""

MOST_SAID = 1000  # characters of an error message, which quotes what is wrong
FRESH = 0.5  # seconds for which an engine's answer does for all who ask


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of the engine: its longest draft, policies' settings, who may choose."""

    max_k: int | None = None
    settings_of: Callable[[str], Mapping[str, Any]] = lambda _name: {}
    may_choose: bool = True
    shows_drafts: bool = True
    live_page: bool = False
    engines: int = 0
    model: str = ""


class Middleware:
    """The ASGI middleware.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app
        self._told: _Known | None = None
        self._answers: dict[str, tuple[float, dict[int, Any]]] = {}
        self._asking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what is ours to do; pass everything else on untouched."""
        method, path = scope.get("method"), scope.get("path")
        if scope["type"] == "http" and method == "POST":
            await self._request(scope, receive, send)
        elif scope["type"] == "http" and method == "GET" and path == METRICS:
            await self._metrics(scope, receive, send)
        elif scope["type"] == "http" and method == "GET" and path in {PAGE, STATE}:
            await self._page(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 where our options are wrong; let the answer say what was asked for."""
        kinds = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
        if not any(b"json" in kind for kind in kinds):
            await self._app(scope, receive, send)  # audio, images: nothing of ours
            return
        messages, body = await _read(receive)
        if any(sign in body for sign in _SIGNS):  # to read all twice would cost time
            try:
                asked = _asked(body, self._known(scope))
            except ConfigError as error:
                await _refuse(send, str(error))
                return
            if asked.report:
                send = Reporting(send, partial(self._report, scope))

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add ours to what vLLM says."""
        from moecascade.vllm.exposition import Exposition  # vLLM has what it needs

        engines = await self._ask(scope, "metrics")
        ours = Exposition(self._known(scope).model, engines).text() if engines else b""
        await self._app(scope, receive, _Appending(send, ours))

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Show the live page, where it is wanted; else the path is nobody's."""
        if not self._known(scope).live_page:
            await self._app(scope, receive, send)
        elif scope["path"] == PAGE:
            page = resources.files(__package__).joinpath("live_page.html").read_bytes()
            await _send(send, 200, b"text/html; charset=utf-8", page, POLICY)
        else:
            engines = await self._ask(scope, "live")
            body = json.dumps({"model": self._known(scope).model, "engines": engines}).encode()
            await _send(send, 200, b"application/json", body)

    async def _report(self, scope: Scope, name: str) -> Any:
        """Return what speculation did for an ended request, None where no engine knows."""
        for engine in range(self._known(scope).engines):
            question = {"want": "report", "id": name}
            if (found := await asyncio.to_thread(link.ask, engine, question)) is not None:
                return found
        return None

    async def _ask(self, scope: Scope, wanted: str) -> dict[int, Any]:
        """Return what each engine answers; one answer does for all who ask within a moment."""
        now = asyncio.get_running_loop().time
        async with self._asking:
            asked, found = self._answers.get(wanted, (-1.0, {}))
            if asked < 0 or now() - asked > FRESH:
                numbers, question = range(self._known(scope).engines), {"want": wanted}
                asks = (asyncio.to_thread(link.ask, number, question) for number in numbers)
                said = await asyncio.gather(*asks)
                found = {n: one for n, one in zip(numbers, said, strict=True) if one is not None}
                self._answers[wanted] = now(), found
            return found

    def _known(self, scope: Scope) -> _Known:
        """Return what the server says of its engine."""
        if self._told is None:
            config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
            if config is None or config.speculative_config is None:
                return _Known()  # it does not say
            max_k, facts = drafters.max_k(config), support.facts(config)
            shows_drafts = not config.scheduler_config.async_scheduling
            options = server_options(config.additional_config, max_k, facts, shows_drafts)
            settings_of = partial(options.settings_of, facts=facts)
            self._told = _Known(
                max_k,
                settings_of,
                options.request_options,
                shows_drafts,
                options.live_page,
                compat.engines(config) if options.metrics else 0,
                compat.model_name(config),
            )
        return self._told


ValidateOptions = Middleware  # its name until it did more


class _Appending:
    """Sends an answer on with something added to its end, if it is plain text.

    Args:
        send: Where it goes.
        added: What is added.
    """

    def __init__(self, send: Send, added: bytes) -> None:
        self._send = send
        self._added = added

    async def __call__(self, message: Message) -> None:
        """Send one message on."""
        if message["type"] == "http.response.start" and self._added:
            headers = {name.lower(): value for name, value in message["headers"]}
            plain = headers.get(b"content-type", b"").startswith(b"text/plain")
            if message["status"] != 200 or not plain or b"content-encoding" in headers:
                self._added = b""
            elif (length := headers.get(b"content-length")) is not None:
                longer = b"%d" % (int(length) + len(self._added))
                kept = [(k, v) for k, v in message["headers"] if k.lower() != b"content-length"]
                message = {**message, "headers": [*kept, (b"content-length", longer)]}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + self._added}
        await self._send(message)


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    """Return the messages that make up the request's body, and the body."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(message.get("body", b"") for message in messages)


def _asked(body: bytes, known: _Known) -> RequestOptions:
    """Return the options in `body`, the defaults where there are none; ConfigError: bad ones."""
    try:
        extra_args: Any = json.loads(body).get("vllm_xargs")
        if not isinstance(extra_args, dict):
            return RequestOptions()
        asked = request_options(extra_args, known.max_k, known.settings_of)
    except ConfigError:
        raise
    except (ValueError, AttributeError, RecursionError):
        return RequestOptions()  # vLLM says what is wrong with it
    if not known.may_choose and (asked.policy is not None or asked.max_k is not None):
        raise ConfigError(
            "vllm_xargs: this server lets no request choose cascade_policy or "
            "cascade_max_k (request_options is false); leave them out"
        )
    if asked.policy is not None and not known.shows_drafts:
        check_unseen(asked.policy)
    return asked


async def _refuse(send: Send, problem: str) -> None:
    """Answer in the form of the OpenAI API's errors, however much the client wrote."""
    if len(problem) > MOST_SAID:
        problem = f"{problem[: MOST_SAID // 2]} ... {problem[-MOST_SAID // 2 :]}"
    error = {"message": problem, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    await _send(send, 400, b"application/json", json.dumps({"error": error}).encode())


async def _send(
    send: Send, status: int, kind: bytes, body: bytes, more: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
