"""`min_tokens` with drafts: the answer ends where it would end without."""

from __future__ import annotations

import pytest

from tests.conftest import MAX_K, Engine

pytestmark = pytest.mark.engine

COUNTING = "1\n2\n3\n4\n1\n2\n3\n"  # drafts are right, and the model wants to end


@pytest.mark.parametrize("min_tokens", [7, 20])
def test_an_answer_ends_where_it_would_end_without_drafts(ngram_engine: Engine, min_tokens: int):
    limits = {"ignore_eos": False, "min_tokens": min_tokens, "max_tokens": 40}
    asked = [{"cascade_policy": f"static:{k}"} for k in range(MAX_K + 1)][:8]
    answers, steps = ngram_engine.generate_logged([COUNTING] * len(asked), asked, **limits)
    assert answers == answers[:1] * len(asked)
    out: dict[str, int] = {}
    drafted = 0
    for part in (part for step in steps for part in step["requests"]):
        before = out.get(part["id"], 0)
        assert before >= min_tokens or before + part["drafted"] < min_tokens, part
        out[part["id"]] = before + part["emitted"]
        drafted += part["drafted"]
    assert drafted
