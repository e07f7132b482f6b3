"""What speculation did for a request, in its answer: for requests that ask (``cascade_report``).

vLLM's own place for it has fixed fields, says nothing of steps without drafts, and exists for some
versions and some of its ways to answer. So the answer gets a field ``"cascade"`` of ours, beside
``"usage"``: in a stream as a last message of its own, before ``[DONE]``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Message, Send

DONE = b"data: [DONE]"


class Reporting:
    """Sends an answer on with a report added.

    Args:
        send: Where it goes.
        report: Gives the report on the request that the answer names, None where there is none.
    """

    def __init__(self, send: Send, report: Callable[[str], Awaitable[Any]]) -> None:
        """Begin with nothing sent."""
        self._send = send
        self._report = report
        self._start: Message | None = None  # held back: the answer's length will change
        self._body = b""
        self._last: dict[str, Any] = {}  # of a stream's messages

    async def __call__(self, message: Message) -> None:
        """Send one message on, or keep it until the answer is whole."""
        if message["type"] == "http.response.start":
            kinds = [v for k, v in message["headers"] if k.lower() == b"content-type"]
            if kinds and kinds[0].startswith(b"application/json") and message["status"] == 200:
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                self._body += message.get("body", b"")
                if not message.get("more_body", False):
                    await self._whole(self._start)
                return
            message = {**message, "body": await self._streamed(message.get("body", b""))}
        await self._send(message)

    async def _whole(self, start: Message) -> None:
        body = self._body
        try:
            answer = json.loads(body)
            if (said := await self._report(str(answer["id"]))) is not None:
                body = json.dumps({**answer, "cascade": said}, ensure_ascii=False).encode()
        except (ValueError, KeyError, TypeError):
            pass  # not an answer of the kind that has a report
        kept = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        length = (b"content-length", b"%d" % len(body))
        await self._send({**start, "headers": [*kept, length]})
        await self._send({"type": "http.response.body", "body": body})

    async def _streamed(self, chunk: bytes) -> bytes:
        """Return a part of a stream; before its end comes the report."""
        for line in chunk.split(b"\n"):
            if line.startswith(b"data: {"):
                try:
                    self._last = json.loads(line[6:])
                except ValueError:
                    continue  # a line cut in two: any other names the request as well
        if DONE not in chunk or "id" not in self._last:
            return chunk
        if (said := await self._report(str(self._last["id"]))) is None:
            return chunk
        report = json.dumps({**self._last, "choices": [], "usage": None, "cascade": said})
        before, _, after = chunk.partition(DONE)
        return before + b"data: " + report.encode() + b"\n\n" + DONE + after
