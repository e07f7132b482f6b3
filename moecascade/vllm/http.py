"""HTTP: refuse bad per-request options with status 400 before they reach the engine.

``vllm serve ... --middleware moecascade.vllm.http.ValidateOptions``; `moecascade serve` adds it.
Without it a bad option is logged and ignored; the request's others apply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moecascade.core.options import (
    REQUEST_PREFIX,
    RequestOptions,
    check_unseen,
    request_options,
    server_options,
)
from moecascade.errors import ConfigError
from moecascade.vllm import drafters, support

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SIGNS = (REQUEST_PREFIX.encode(), b"\\u00", b"\0")
"""A body without any of these holds no key of ours: not as it is, not escaped, not in UTF-16."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of the engine: its longest draft, policies' settings, who may choose."""

    max_k: int | None = None
    settings_of: Callable[[str], Mapping[str, Any]] = lambda _name: {}
    may_choose: bool = True
    shows_drafts: bool = True


class ValidateOptions:
    """ASGI middleware that reads ``vllm_xargs`` of JSON requests and checks our entries.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app
        self._told: _Known | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 where our options are wrong; pass everything else on untouched."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        kinds = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
        if not any(b"json" in kind for kind in kinds):
            await self._app(scope, receive, send)  # audio, images: nothing of ours
            return
        messages, body = await _read(receive)
        concerned = any(sign in body for sign in _SIGNS)  # to read all twice would cost time
        if concerned and (problem := _problem(body, self._known(scope))) is not None:
            await _refuse(send, problem)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

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
            self._told = _Known(max_k, settings_of, options.request_options, shows_drafts)
        return self._told


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    """Return the messages that make up the request's body, and the body."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(message.get("body", b"") for message in messages)


def _problem(body: bytes, known: _Known) -> str | None:
    """Return what is wrong with the options in `body`; None where nothing is, or it is no JSON."""
    try:
        extra_args: Any = json.loads(body).get("vllm_xargs")
        if isinstance(extra_args, dict):
            asked = request_options(extra_args, known.max_k, known.settings_of)
            if not known.may_choose and asked != RequestOptions(task=asked.task):
                return (
                    "vllm_xargs: this server lets no request choose cascade_policy or "
                    "cascade_max_k (request_options is false); leave them out"
                )
            if asked.policy is not None and not known.shows_drafts:
                check_unseen(asked.policy)
    except ConfigError as error:
        return str(error)
    except (ValueError, AttributeError, RecursionError):
        return None  # vLLM says what is wrong with it
    return None


async def _refuse(send: Send, problem: str) -> None:
    """Answer in the form of the OpenAI API's errors."""
    error = {"message": problem, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
