"""How `marginal` puts numbers in buckets: each by its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.marginal import predictor
from moecascade.core.marginal.judge import outcome
from moecascade.core.marginal.predictor import LONGEST_MATCH

LENGTHS = [(1, 0), (2, 1), (3, 2), (4, 3), (6, 4), (8, 5), (12, 6), (16, 7), (31, 8), (32, 9)]
OCCURRED = [(1, 1), (2, 2), (3, 3), (7, 4), (15, 5), (63, 6)]  # up to so often; the group


def group(value: float, groups: list[tuple[int, int]], beyond: int) -> int:
    return next((number for most, number in groups if value <= most), beyond)


@pytest.mark.parametrize("length", range(LONGEST_MATCH + 1))
def test_a_match_is_in_the_bucket_of_its_length(length: int) -> None:
    assert predictor._LENGTH[length] == group(length, LENGTHS, 9)


@given(st.integers(1, 200), st.integers(0, 200))
def test_a_phrase_is_in_the_bucket_of_how_often_it_occurred_and_went_on_so(n: int, so: int) -> None:
    share = 0 if not so else 4 if so >= n else 1 + 3 * so // n
    assert predictor._phrase_bucket(n, so) == 5 * group(n, OCCURRED, 7) + share


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 32), st.integers(0, 32))
def test_what_speaks_for_a_draft_and_against_it_has_buckets_of_its_own(
    places: int, agreed: int, agreeing: int, opposing: int
) -> None:
    agreed = min(agreed, places)
    # Shares: none; below a third, two thirds, all; all of them.
    share = 0 if not agreed else 1 + (3 * agreed >= places) + (3 * agreed >= 2 * places)
    share += agreed == places > 0
    assert predictor._agreed_bucket(places, agreed) == 5 * share + min(places, 4)
    stronger = opposing >= agreeing
    assert (
        predictor._against_bucket(agreeing, opposing) == 2 * group(opposing, LENGTHS, 9) + stronger
    )


@pytest.mark.parametrize(
    ("rights", "state"), [([0], 0), ([1], 1), ([2], 1), ([3], 2), ([9], 2), ([3, 0, 1], 19)]
)
def test_how_drafts_fared_is_a_number_to_the_base_of_three(rights: list[int], state: int) -> None:
    last = 0
    for right in rights:
        last = outcome(last, right, 27)
    assert last == state
    for _ in range(3):  # what is older is forgotten
        last = outcome(last, 0, 27)
    assert last == 0
