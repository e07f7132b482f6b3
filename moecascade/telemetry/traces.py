"""Traces: what requests said, so that policies can be replayed on it without an engine.

A trace is JSON Lines, one request a line:

    {"id": "code-1", "task": "code", "prompt_token_ids": [...], "output_token_ids": [...],
     "steps": [{"drafted": 3, "emitted": 2, "seconds": 0.031}, ...]}

``steps`` are those of the engine that it was recorded on, and may be missing. So may ``drafts``,
what a drafter proposed at each place of the answer: its first entry when the first token was out,
its second with two, and so on. An entry is a list of token ids, or only the number of its tokens
that are right. A log of live traffic (`TraceLog`) holds token ids only where they were asked for;
it cannot be replayed without. Further keys are allowed and ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moecascade.core.step import Proposal, Step
from moecascade.errors import ConfigError
from moecascade.telemetry.files import json_line, open_to_append, records

KEYS = ("id", "task", "prompt_token_ids", "output_token_ids")
FORM = f"a line is a JSON object with {', '.join(KEYS)}"
TOKEN_LIMIT = 2**31
"""Token ids are below it: vLLM keeps them in signed 32 bits."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request.

    Attributes:
        id: Its name.
        task: What kind of request it is; results are broken down by it.
        prompt: Token ids of the prompt.
        output: Token ids of the answer, at least one.
        drafts: What a drafter proposed with 1, 2, ... tokens of the answer out: its tokens, or how
            many of them are right. Empty where none was recorded.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    drafts: tuple[tuple[int, ...] | int, ...] = ()


def read(paths: Iterable[str | Path]) -> Iterator[Trace]:
    """Yield the requests of trace files, without those that say nothing.

    Raises:
        ConfigError: A file cannot be read, or a line is not a trace; names file and line.
    """
    for path in paths:
        for place, row in records(path):
            trace = _trace(row, place)
            if trace.output:
                yield trace


def _trace(row: Any, place: str) -> Trace:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: not a trace ({row!r:.40}); {FORM}")
    if missing := [key for key in KEYS if key not in row]:
        raise ConfigError(f"{place}: not a trace, it has no {', '.join(missing)}; {FORM}")
    if row["output_token_ids"] is None:
        raise ConfigError(
            f"{place}: recorded without token ids, so it cannot be replayed; record with "
            "trace_tokens on, or with 'moecascade record'"
        )
    prompt, output = (_tokens(row[key], key, place) for key in KEYS[2:])
    drafts = row.get("drafts") or []
    if not isinstance(drafts, list):
        raise ConfigError(f"{place}: drafts is {drafts!r:.40}; it must be a list, see 'record'")
    return Trace(
        str(row["id"]), str(row["task"]), prompt, output, tuple(_draft(d, place) for d in drafts)
    )


def _draft(draft: Any, place: str) -> tuple[int, ...] | int:
    """Return a draft, or how many of its tokens are right."""
    if type(draft) is int and draft >= 0:
        return draft
    return _tokens(draft, "drafts", place)


def _tokens(tokens: Any, key: str, place: str) -> tuple[int, ...]:
    """Return token ids; ConfigError where one cannot be one."""
    if not isinstance(tokens, list):
        raise ConfigError(f"{place}: {key} is {tokens!r:.40}; it must be a list of token ids")
    for token in tokens:
        if type(token) is not int or not 0 <= token < TOKEN_LIMIT:
            raise ConfigError(
                f"{place}: {key} holds {token!r:.40}; a token id is a whole number from 0 to "
                f"{TOKEN_LIMIT - 1}; record the trace again"
            )
    return tuple(tokens)


@dataclass(slots=True)
class _Open:
    """A request that has not ended; its tokens are kept where they will be written."""

    task: str
    prompt_tokens: int
    output_tokens: int = 0
    prompt: Sequence[int] = ()
    output: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


class TraceLog:
    """Writes a trace of each request of an engine to a file, when the request ends.

    Args:
        path: The file; it is created, with its folder, or appended to.
        tokens: Whether to write token ids. They are what was said: only where users agree.
        drafts: Whether to write what the drafter proposed at each place.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | Path, tokens: bool, drafts: bool = False) -> None:
        """Open the file."""
        self._file: TextIO = open_to_append(Path(path), private=True)
        self._tokens = tokens
        self._drafts = drafts
        self._open: dict[str, _Open] = {}

    def begin(self, request_id: str, task: str, prompt: Sequence[int]) -> None:
        """A request begins."""
        # A copy: in a streaming session vLLM lengthens its list by the answer and what comes next.
        kept = tuple(prompt) if self._tokens else ()
        self._open[request_id] = _Open(task, len(prompt), prompt=kept)

    def step(self, step: Step) -> None:
        """Take a step's part of each request."""
        for part in step.requests:
            if (request := self._open.get(part.request_id)) is not None and part.emitted:
                request.output_tokens += len(part.tokens)
                if self._tokens:
                    request.output.extend(part.tokens)
                request.steps.append(
                    {"drafted": part.drafted, "emitted": part.emitted, "seconds": step.seconds}
                )

    def propose(self, proposals: Iterable[Proposal]) -> None:
        """Take what the drafter proposes for what follows the tokens that are out."""
        for proposal in proposals if self._drafts else ():
            if (request := self._open.get(proposal.request_id)) is not None:
                # Places that a step went past have no draft.
                request.drafts += [[] for _ in range(len(request.drafts), request.output_tokens)]
                request.drafts[request.output_tokens - 1 :] = [list(proposal.tokens)]

    def end(self, request_id: str) -> None:
        """A request ended, however it ended: write it. Unknown names are ignored."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        line = {
            "id": request_id,
            "task": request.task,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "prompt_token_ids": list(request.prompt) if self._tokens else None,
            "output_token_ids": request.output if self._tokens else None,
            "steps": request.steps,
        }
        if self._drafts:
            line["drafts"] = request.drafts
        self._file.write(json_line(line))

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file; requests that have not ended are left out."""
        self._file.close()
