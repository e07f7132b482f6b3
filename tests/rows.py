"""Measured requests as they might have been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moecascade.evaluation.request_record import AtK, Engine, Row

ENGINE = Engine(
    steps=100,
    emitted=100,
    drafted=0,
    k_total=0,
    steps_at_0=100,
    seconds=2.0,
    controller_seconds=0.0,
    handover_seconds=0.0,
    by_k=(AtK(0, 100, 100, 2.0, 99, 99),),
)
ROW = Row(
    run="00000000",
    request="mc-00000000-00000",
    model="local",
    prompt="code-01",
    task="code",
    policy="off",
    temperature=0.0,
    concurrency=1,
    block="mc-00000000-00000",
    block_seconds=2.1,
    place=0,
    seed=0,
    prompt_tokens=50,
    tokens=101,
    decoded=100,
    first_seconds=0.1,
    decode_seconds=2.0,
    gaps=(0.02, 0.03, 0.04),
    finish_reason="length",
    engine=ENGINE,
    text="...",
)


def row(prompt: str, policy: str, tokens: int, seconds: float, **fields: Any) -> Row:
    """A request of a policy whose decoding took so long."""
    task = prompt.partition("-")[0]
    fields = {"decoded": tokens, "decode_seconds": seconds, **fields}
    return replace(ROW, prompt=prompt, task=task, policy=policy, **fields)
