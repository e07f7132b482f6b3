"""A client for the OpenAI-compatible HTTP API that measures: one chat completion, with its times.

Needs httpx, which vLLM brings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecascade.errors import SetupError, TooLongError

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion and when it came.

    Attributes:
        text: What the model wrote.
        prompt_tokens: Tokens of the prompt, from the server's usage.
        tokens: Tokens generated, from the server's usage. One message of the stream may hold
            several, so messages are not counted.
        first_tokens: How many of them the first message held.
        first_seconds: From sending the request to the first message.
        decode_seconds: From the first message to the last one that brought tokens.
        finish_reason: Why it ended ("stop", "length").
        gaps: Seconds between messages that brought tokens (ITL), one fewer than messages.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_tokens: int
    first_seconds: float
    decode_seconds: float
    finish_reason: str
    gaps: tuple[float, ...] = ()

    @property
    def decoded(self) -> int:
        """Tokens that came in `decode_seconds`: all but those of the first message."""
        return self.tokens - self.first_tokens


async def chat(
    http: httpx.AsyncClient,
    model: str,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    request_id: str,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    xargs: Mapping[str, Any] | None = None,
) -> Reply:
    """Send a user message or a conversation and return the streamed answer with its times.

    Args:
        http: A client whose base URL is the server's.
        model: The name under which the server serves the model.
        prompt: The message, or messages as the API has them.
        request_id: Becomes part of the request's name in the engine, so in the step log.
        max_tokens: The longest answer.
        temperature: 0 for greedy.
        seed: For sampling, None for a random one.
        xargs: ``vllm_xargs``, such as ``{"cascade_policy": "static:3"}``.

    Raises:
        SetupError: The server refuses or fails, or the connection breaks; TooLongError where the
            prompt does not fit into the model's context.
    """
    import httpx

    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        # Usage on each message says how many tokens have come when, exactly.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **({} if seed is None else {"seed": seed}),
        **({"vllm_xargs": dict(xargs)} if xargs else {}),
    }
    headers = {"X-Request-Id": request_id}
    text: list[str] = []
    gaps: list[float] = []
    seen = prompt_tokens = first_tokens = 0
    first = last = 0.0
    reason = ""
    sent = time.perf_counter()
    try:
        async with http.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")
                too_long = response.status_code == 400 and "context length" in detail
                raise (TooLongError if too_long else SetupError)(
                    f"the server answered {response.status_code} to a request for {model!r}: "
                    f"{detail[:500]}"
                )
            async for line in response.aiter_lines():
                now = time.perf_counter()
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                message = json.loads(data)
                if "error" in message:
                    raise SetupError(f"the server failed: {message['error']}")
                for choice in message["choices"]:
                    text.append(choice.get("delta", {}).get("content") or "")
                    reason = choice.get("finish_reason") or reason
                usage = message.get("usage") or {}
                prompt_tokens = usage.get("prompt_tokens", prompt_tokens)
                tokens = usage.get("completion_tokens", seen)
                if tokens > seen:
                    if seen:
                        gaps.append(now - last)
                    else:
                        first, first_tokens = now, tokens
                    last = now
                    seen = tokens
    except httpx.HTTPError as error:
        raise SetupError(
            f"the connection to {http.base_url} broke: {error or type(error).__name__}; "
            "see the server's log"
        ) from error
    if not seen:
        raise SetupError(
            f"the server sent no tokens for {request_id!r}; is it vLLM, and its log clean?"
        )
    return Reply(
        text="".join(text),
        prompt_tokens=prompt_tokens,
        tokens=seen,
        first_tokens=first_tokens,
        first_seconds=first - sent,
        decode_seconds=last - first,
        finish_reason=reason,
        gaps=tuple(gaps),
    )
