"""Replay drafts what vLLM would have drafted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.ngram import NgramDrafter

# few different tokens, so that matches are many, long, and overlapping
texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def by_definition(text: list[int], shortest: int, longest: int, k: int) -> list[int]:
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for end in range(n, len(text)):
            if text[end - n : end] == text[-n:]:
                return text[end : end + k]
    return []


@given(texts, st.integers(1, 3), st.integers(0, 3), st.integers(1, 8), st.integers(0, 60))
def test_the_drafter_follows_its_definition(
    text: list[int], shortest: int, more: int, k: int, cut: int
) -> None:
    drafter = NgramDrafter(text[:cut], shortest, shortest + more, k)
    drafter.extend(text[cut:])
    assert drafter.propose() == by_definition(text, shortest, shortest + more, k)


@pytest.mark.engine
@given(texts, st.integers(1, 3), st.integers(0, 3), st.integers(1, 8))
def test_the_drafter_proposes_what_vllm_proposes(
    text: list[int], shortest: int, more: int, k: int
) -> None:
    import numpy as np
    from vllm.v1.spec_decode.ngram_proposer import (
        _find_longest_matched_ngram_and_propose_tokens as propose,
    )

    longest = shortest + more
    theirs = propose(np.array(text, dtype=np.int32), shortest, longest, 10_000, k)
    assert NgramDrafter(text, shortest, longest, k).propose() == theirs.tolist()
