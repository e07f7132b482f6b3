"""Requests with a seed on the real vLLM, where their prompts are computed in several steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NGRAM, Engine, make_engine, stop_engine

STEP = 128
"""Tokens of a step, enough for 8 requests with drafts: each prompt here fits in, not all."""


@pytest.fixture(scope="session")  # stopped any sooner it would take the process's others with it
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("seeds") / "steps.jsonl"
    more: dict[str, Any] = {"max_num_batched_tokens": STEP, "enable_prefix_caching": False}
    engine = make_engine(log, NGRAM, **more)
    yield engine
    stop_engine(engine)


@pytest.mark.engine
def test_a_seed_gives_the_same_text_where_its_prompt_was_split(engine: Engine) -> None:
    """Plain vLLM 0.32 on a CPU dies of it."""
    prompts = [f"Tell me of {i}: " + "one two three " * 25 for i in range(3)]
    off = {"cascade_policy": "off"}
    seeded: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "seed": 7}
    alone = [engine.generate([prompt], off, **seeded)[0] for prompt in prompts]
    together, steps = engine.generate_logged(prompts, off, **seeded)
    assert any(not part["emitted"] for step in steps for part in step["requests"])  # split
    assert together == alone
    (other,) = engine.generate(prompts[:1], off, **{**seeded, "seed": 8})
    assert other != alone[0]  # so it is the seed that decides
    drafted = engine.generate(prompts, {"cascade_policy": "static:8"}, **seeded)
    assert [len(tokens) for tokens in drafted] == [6, 6, 6]
