"""HTTP: refuse bad per-request options with status 400 before they reach the engine.

``vllm serve ... --middleware moecascade.vllm.http.ValidateOptions``; `moecascade serve` adds it.
Without it a bad option is logged and the request runs under the server's policy.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moecascade.errors import ConfigError
from moecascade.options import REQUEST_PREFIX, request_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MARK = REQUEST_PREFIX.encode()


class ValidateOptions:
    """ASGI middleware that reads ``vllm_xargs`` of JSON requests and checks our entries.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 where our options are wrong; pass everything else on untouched."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages, body = await _read(receive)
        problem = _problem(body, _max_k(scope)) if _MARK in body else None
        if problem is not None:
            await _refuse(send, problem)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    """Return the messages that make up the request's body, and the body."""
    messages: list[Message] = []
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, body


def _max_k(scope: Scope) -> int | None:
    """Return the engine's longest draft where the server says so."""
    config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    speculative = getattr(config, "speculative_config", None)
    return getattr(speculative, "num_speculative_tokens", None)


def _problem(body: bytes, max_k: int | None) -> str | None:
    """Return what is wrong with the options in `body`; None where nothing is, or it is no JSON."""
    try:
        extra_args: Any = json.loads(body).get("vllm_xargs")
        if isinstance(extra_args, dict):
            request_options(extra_args, max_k)
    except ConfigError as error:
        return str(error)
    except (ValueError, AttributeError):
        return None  # vLLM says what is wrong with it
    return None


async def _refuse(send: Send, problem: str) -> None:
    """Answer in the form of the OpenAI API's errors."""
    error = {"message": problem, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
