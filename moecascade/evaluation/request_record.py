"""What is measured of one request: the row of all results, and how the step log becomes part of it.

A client sees when tokens come; the step log says how the engine made them: K, drafts, step times,
what the policy expected. A row holds both.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MARK = re.compile(r"mc-[0-9a-f]{8}-[0-9]{5}")
"""Our names of requests; vLLM wraps them (``chatcmpl-NAME-1f2e3d4c``), so they are searched for."""

PLAIN = "vllm"
"""Stands in the place of a policy for vLLM as it is, without plugin and speculation."""
BASELINE = "off"
"""The policy that speed-ups are over."""


@dataclass(frozen=True, slots=True)
class AtK:
    """A request's decode steps that verified equally many drafts.

    Attributes:
        drafted: Drafts verified.
        steps: Steps.
        emitted: Tokens that they gave.
        seconds: Their time.
        expected_tokens: Tokens that the policy expected of those that can be judged, None where it
            says nothing.
        seconds_error: Median over all of ``|expected - measured| / measured`` step time, likewise.
        judged: How many steps show which drafts were right: all but the request's last step, where
            the end of the answer may hide accepted drafts. 0 in rows of before 26 November 2026.
        judged_emitted: Tokens that those gave.
    """

    drafted: int
    steps: int
    emitted: int
    seconds: float
    expected_tokens: float | None = None
    seconds_error: float | None = None
    judged: int = 0
    judged_emitted: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One measured request.

    Attributes:
        request: Its name, as in the step log.
        model: The model's name.
        prompt: The prompt's name.
        task: The prompt's task.
        policy: Spec of the policy that it ran under, or `PLAIN`.
        temperature: Of sampling.
        concurrency: Requests in flight at once.
        block: Requests of one block ran together, under one policy.
        block_seconds: From sending the block's first request to the end of its last answer.
        place: Which it was among the policies on this prompt, from 0; rotated, so drift cancels.
        seed: Seed of its sampling.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens generated.
        decoded: Tokens generated after the first message of the stream.
        first_seconds: From sending to the first message (TTFT).
        decode_seconds: From the first message to the last.
        gaps: Median, 95th and 99th percentile of the time between messages (ITL), in seconds.
        finish_reason: Why it ended.
        steps: Decode steps that it took part in. This and what follows is from the step log; zero
            or empty where there was none.
        emitted: Tokens that those steps gave it.
        drafted: Draft tokens that those steps verified.
        k_total: Sum over those steps of the draft length K that the policy chose.
        steps_at_0: How many of them the policy ran at K = 0.
        step_seconds: Their time as the engine measured it; `decode_seconds` is what a user saw.
        controller_seconds: Part of it that policies took.
        handover_seconds: Part of it that drafts took from vLLM's worker to its scheduler.
        by_k: The steps by drafts verified.
        accepted_at: How often the first, second, ... token of a draft was accepted, and
        drafted_at: how often it was verified, in the steps that can be judged (`AtK.judged`).
        utility: What the policy took for the utility of its steps, on average by their time; None
            where it says nothing.
        series: Each step's (K, tokens, seconds, utility or None); of few requests, to be drawn.
        text: What the model wrote; kept where results are small.
    """

    request: str
    model: str
    prompt: str
    task: str
    policy: str
    temperature: float
    concurrency: int
    block: str
    block_seconds: float
    place: int
    seed: int
    prompt_tokens: int
    tokens: int
    decoded: int
    first_seconds: float
    decode_seconds: float
    gaps: tuple[float, float, float]
    finish_reason: str
    steps: int = 0
    emitted: int = 0
    drafted: int = 0
    k_total: int = 0
    steps_at_0: int = 0
    step_seconds: float = 0.0
    controller_seconds: float = 0.0
    handover_seconds: float = 0.0
    by_k: tuple[AtK, ...] = ()
    accepted_at: tuple[int, ...] = ()
    drafted_at: tuple[int, ...] = ()
    utility: float | None = None
    series: tuple[tuple[int, int, float, float | None], ...] = ()
    text: str = ""

    @property
    def run(self) -> str:
        """The run that it was measured in: rows are compared within one."""
        match = MARK.search(self.request)
        return match.group().split("-")[1] if match else ""

    @property
    def seconds_per_token(self) -> float:
        """Decode time per token (TPOT), in seconds; needs a second token."""
        return self.decode_seconds / self.decoded


def from_json(values: Mapping[str, Any]) -> Row:
    """Return the row that JSON gave back as a mapping; TypeError where it is none.

    Rows of 0.1.0's development have a `reference`, which nothing reads any more.
    """
    return Row(
        **{
            **{name: value for name, value in values.items() if name != "reference"},
            "gaps": tuple(values["gaps"]),
            "by_k": tuple(AtK(**at) for at in values["by_k"]),
            "accepted_at": tuple(values["accepted_at"]),
            "drafted_at": tuple(values["drafted_at"]),
            "series": tuple(tuple(step) for step in values["series"]),
        }
    )


@dataclass(slots=True)
class Steps:
    """What the step log says of one request: the part of a `Row` of that name."""

    series: list[tuple[int, int, float, float | None]] = field(default_factory=list)
    controller_seconds: float = 0.0
    handover_seconds: float = 0.0
    _drafts: list[tuple[int, int]] = field(default_factory=list)
    _expected: list[tuple[float | None, float | None]] = field(default_factory=list)

    def add(
        self, part: Mapping[str, Any], seconds: float, controller: float, handover: float
    ) -> None:
        """Count a step that took `seconds`; in them deciding, and the drafts' way to it."""
        self.series.append((part["k"], part["emitted"], seconds, part.get("utility")))
        self._drafts.append((part["drafted"], part["emitted"]))
        self.controller_seconds += controller
        self.handover_seconds += handover
        time = part.get("expected_seconds")
        error = abs(time - seconds) / seconds if seconds and time is not None else None
        self._expected.append((part.get("expected_tokens"), error))

    def fields(self, keep_series: bool) -> dict[str, Any]:
        """Return the fields of a `Row`."""
        drafts = [drafted for drafted, _ in self._drafts]
        judged = self._drafts[:-1]
        longest = max((drafted for drafted, _ in judged), default=0)
        return {
            "steps": len(self.series),
            "emitted": sum(emitted for _, emitted in self._drafts),
            "drafted": sum(drafts),
            "k_total": sum(k for k, *_ in self.series),
            "steps_at_0": sum(k == 0 for k, *_ in self.series),
            "step_seconds": sum(seconds for _, _, seconds, _ in self.series),
            "controller_seconds": self.controller_seconds,
            "handover_seconds": self.handover_seconds,
            "by_k": tuple(self._at(drafted) for drafted in sorted(set(drafts))),
            "accepted_at": tuple(
                sum(emitted > j + 1 and drafted > j for drafted, emitted in judged)
                for j in range(longest)
            ),
            "drafted_at": tuple(sum(drafted > j for drafted, _ in judged) for j in range(longest)),
            "utility": self._utility(),
            "series": tuple(self.series) if keep_series else (),
        }

    def _utility(self) -> float | None:
        known = [(u, seconds) for _, _, seconds, u in self.series if u is not None]
        time = sum(seconds for _, seconds in known)
        return sum(u * seconds for u, seconds in known) / time if time else None

    def _at(self, drafted: int) -> AtK:
        mine = [i for i, (verified, _) in enumerate(self._drafts) if verified == drafted]
        judged = [i for i in mine if i + 1 < len(self._drafts)]
        expected = [tokens for i in judged if (tokens := self._expected[i][0]) is not None]
        errors = [error for i in mine if (error := self._expected[i][1]) is not None]
        return AtK(
            drafted=drafted,
            steps=len(mine),
            emitted=sum(self._drafts[i][1] for i in mine),
            seconds=sum(self.series[i][2] for i in mine),
            expected_tokens=sum(expected) if expected else None,
            seconds_error=statistics.median(errors) if errors else None,
            judged=len(judged),
            judged_emitted=sum(self._drafts[i][1] for i in judged),
        )


def tally(log: Iterable[Mapping[str, Any]]) -> dict[str, Steps]:
    """Return what a step log says of our requests, by name; steps with prefill do not count."""
    found: dict[str, Steps] = {}
    for step in log:
        if not step["decode"]:
            continue
        n = len(step["requests"])
        controller, handover = step.get("controller", 0.0) / n, step.get("handover", 0.0) / n
        for part in step["requests"]:
            if match := MARK.search(part["id"]):
                seconds = step["seconds"] or 0.0
                found.setdefault(match.group(), Steps()).add(part, seconds, controller, handover)
    return found
