"""What is measured of one request: the row of all results, and how the step log becomes part of it.

A client sees when tokens come; the step log says how the engine made them: K, drafts, step times,
what the policy expected. A row holds both. What was not measured is None, never 0.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MARK = re.compile(r"mc-([0-9a-f]{8})-[0-9]{5}")
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
        seconds: Their time, None where that of one is not known.
        judged: How many steps show which drafts were right: all but the request's last step, where
            the end of the answer may hide accepted drafts.
        judged_emitted: Tokens that those gave.
        expected_tokens: Tokens that the policy expected of those, None where it says nothing.
        seconds_error: Median over all steps of ``|expected - measured| / measured`` step time,
            likewise.
    """

    drafted: int
    steps: int
    emitted: int
    seconds: float | None
    judged: int
    judged_emitted: int
    expected_tokens: float | None = None
    seconds_error: float | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """What the step log says of a request's decode steps.

    Attributes:
        steps: Decode steps that it took part in.
        emitted: Tokens that those steps gave it.
        drafted: Draft tokens that those steps verified.
        k_total: Sum over those steps of the draft length K that the policy chose.
        steps_at_0: How many of them the policy ran at K = 0.
        seconds: Their time as the engine measured it, None where that of one is not known;
            `Row.decode_seconds` is what a user saw.
        controller_seconds: Part of it that policies took.
        handover_seconds: Part of it that drafts took from vLLM's worker to its scheduler.
        by_k: The steps by drafts verified.
        utility: What the policy took for the utility of its steps, on average by their time; None
            where it says nothing.
        series: Each step's (K, tokens, seconds or None, utility or None); empty but for the few
            requests that are to be drawn.
    """

    steps: int
    emitted: int
    drafted: int
    k_total: int
    steps_at_0: int
    seconds: float | None
    controller_seconds: float
    handover_seconds: float
    by_k: tuple[AtK, ...]
    utility: float | None = None
    series: tuple[tuple[int, int, float | None, float | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One measured request.

    Attributes:
        run: The run that it was measured in; rows are compared within one.
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
        gaps: Median, 95th and 99th percentile of the time between messages (ITL), in seconds; None
            where there was a single message.
        finish_reason: Why it ended.
        engine: What the step log says of it, None where there was none.
        text: What the model wrote; kept where results are small.
    """

    run: str
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
    gaps: tuple[float, float, float] | None
    finish_reason: str
    engine: Engine | None = None
    text: str = ""

    @property
    def seconds_per_token(self) -> float:
        """Decode time per token (TPOT), in seconds; needs a second token."""
        return self.decode_seconds / self.decoded


def from_json(values: Mapping[str, Any]) -> Row:
    """Return the row that JSON gave back as a mapping; KeyError or TypeError where it is none."""
    known = dict(values) if "engine" in values else _from_schema_1(values)
    engine, gaps = known["engine"], known["gaps"]
    if engine is not None:
        engine = Engine(
            **{
                **engine,
                "by_k": tuple(AtK(**at) for at in engine["by_k"]),
                "series": tuple(tuple(step) for step in engine["series"]),
            }
        )
    return Row(**{**known, "gaps": gaps and tuple(gaps), "engine": engine})


def _from_schema_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of results/1: one flat object, the run in the request's name, 0 for unknown."""
    gone = ("reference", "accepted_at", "drafted_at")
    known = {name: value for name, value in values.items() if name not in gone}
    run = MARK.search(known["request"])
    seconds = known.pop("step_seconds")
    engine = {name: known.pop(name) for name in Engine.__slots__ if name != "seconds"}
    engine["seconds"] = seconds or None
    return {**known, "run": run[1] if run else "", "engine": engine if engine["steps"] else None}


class Step(NamedTuple):
    """A request's part of a decode step, as the step log tells of it."""

    k: int
    drafted: int
    emitted: int
    seconds: float | None
    controller: float
    handover: float
    utility: float | None
    expected_tokens: float | None
    expected_seconds: float | None


def tally(log: Iterable[Mapping[str, Any]]) -> dict[str, list[Step]]:
    """Return the decode steps of our requests, by name; steps with prefill do not count."""
    found: dict[str, list[Step]] = defaultdict(list)
    for line in log:
        n = len(line["requests"])
        for part in line["requests"] if line["decode"] else ():
            if match := MARK.search(part["id"]):
                step = Step(
                    part["k"],
                    part["drafted"],
                    part["emitted"],
                    line["seconds"],
                    line.get("controller", 0.0) / n,
                    line.get("handover", 0.0) / n,
                    *map(part.get, ("utility", "expected_tokens", "expected_seconds")),
                )
                found[match.group()].append(step)
    return found


def summed(steps: Sequence[Step], keep_series: bool = False) -> Engine | None:
    """Return a request's steps in sum, with the series where it is kept; None where none are."""
    if not steps:
        return None
    told = [(step.utility, step.seconds) for step in steps if step.utility and step.seconds]
    by_k: dict[int, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        by_k[step.drafted].append(i)
    return Engine(
        steps=len(steps),
        emitted=sum(step.emitted for step in steps),
        drafted=sum(step.drafted for step in steps),
        k_total=sum(step.k for step in steps),
        steps_at_0=sum(step.k == 0 for step in steps),
        seconds=_sum(step.seconds for step in steps),
        controller_seconds=sum(step.controller for step in steps),
        handover_seconds=sum(step.handover for step in steps),
        by_k=tuple(_at(k, steps, mine) for k, mine in sorted(by_k.items())),
        utility=sum(u * s for u, s in told) / sum(s for _, s in told) if told else None,
        series=tuple((s.k, s.emitted, s.seconds, s.utility) for s in steps if keep_series),
    )


def _at(k: int, steps: Sequence[Step], which: Sequence[int]) -> AtK:
    mine = [steps[i] for i in which]
    judged = [steps[i] for i in which if i + 1 < len(steps)]
    expected = [s.expected_tokens for s in judged if s.expected_tokens is not None]
    errors = [
        abs(s.expected_seconds - s.seconds) / s.seconds
        for s in mine
        if s.expected_seconds is not None and s.seconds
    ]
    return AtK(
        drafted=k,
        steps=len(mine),
        emitted=sum(step.emitted for step in mine),
        seconds=_sum(step.seconds for step in mine),
        judged=len(judged),
        judged_emitted=sum(step.emitted for step in judged),
        expected_tokens=sum(expected) if expected else None,
        seconds_error=statistics.median(errors) if errors else None,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum, None where one of the values is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
