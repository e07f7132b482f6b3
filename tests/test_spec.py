"""How policies are named and settings are read: specs, ranges, types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecascade.core.options import RequestOptions, request_options, valid_request_options
from moecascade.core.settings import MOST, check_ranges, from_mapping
from moecascade.core.spec import Spec, parse, split
from moecascade.core.step import Proposal, RequestStep, matching_prefix
from moecascade.errors import ConfigError
from moecascade.policies import applicable, create, learns, names

# ---- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("off", Spec("off")),
        ("static:3", Spec("static", "3")),
        ("static:", Spec("static", "")),
        ("a[b=1]", Spec("a", None, {"b": 1})),
        (
            'a:2[b=1,c=[1,2],d={"e":[3,4]}]',
            Spec("a", "2", {"b": 1, "c": [1, 2], "d": {"e": [3, 4]}}),
        ),
        ("a[ b = 1.5 ]", Spec("a", None, {"b": 1.5})),
    ],
)
def test_a_spec_is_taken_apart(text: str, spec: Spec) -> None:
    assert parse(text) == spec
    assert parse(text).settings == spec.settings
    assert parse(str(spec)) == spec
    assert parse(str(spec)).settings == spec.settings


def test_a_spec_is_written_as_it_is_read() -> None:
    for text in ("off", "static:3", "static:", "a[b=1]", "a:2[b=1,c=[1,2]]"):
        assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text", ["a[", "a[b]", "a[b=]", "a[b=1", "a[]", "a[b=1]x", "a[b=" + "[" * 9999]
)
def test_brackets_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\[name=value,...\]"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "k"),
    [("static:3", 3), ("static:0", 0), ("static", None), ("static:x", None), ("off:3", None)],
)
def test_static_k_is_that_of_static_alone(text: str, k: int | None) -> None:
    assert parse(text).static_k == k


@given(
    st.lists(
        st.sampled_from(
            ["off", "static:3", "a[b=1,c=2]", "t[u=[[1,2],[3,4]]]", 'd[e={"f":1,"g":2}]']
        ),
        min_size=1,
    )
)
def test_a_list_of_specs_is_split_at_commas_outside_of_brackets(specs: list[str]) -> None:
    assert split(",".join(specs)) == specs
    assert split(" , ".join(specs)) == specs


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    needed: int
    whole: int = 1
    number: float = 1.0
    truth: bool = False
    text: str = ""
    many: Sequence[int] = ()
    by_name: Mapping[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values",
    [
        {"whole": 0},
        {"whole": -int(MOST)},
        {"whole": int(MOST)},
        {"number": 2},
        {"number": -2.5},
        {"number": MOST},
        {"truth": True},
        {"text": "x"},
        {"many": [1]},
        {"by_name": {"x": 1}},
    ],
)
def test_values_of_the_right_type_become_settings(values: dict[str, Any]) -> None:
    made = from_mapping(Sample, {"needed": 7, **values}, "here")
    assert made == Sample(7, **values)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("whole", 1.0, "a whole number"),
        ("whole", True, "a whole number"),
        ("whole", int(MOST) + 1, "a whole number"),
        ("number", True, "a number"),
        ("number", "1", "a number"),
        ("number", inf, "a number"),
        ("number", nan, "a number"),
        ("number", -MOST * 2, "a number"),
        ("truth", 1, "true or false"),
        ("text", None, "a text"),
        ("many", 3, "Sequence"),
        ("by_name", [1], "Mapping"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {name} must be .*{kind}"):
        from_mapping(Sample, {"needed": 7, name: value}, "here")


def test_what_is_missing_unknown_or_no_mapping_is_named() -> None:
    with pytest.raises(ConfigError, match="here: needed is missing"):
        from_mapping(Sample, {"whole": 1}, "here")
    with pytest.raises(ConfigError, match=r"unknown key 'hole'.*whole"):
        from_mapping(Sample, {"needed": 1, "hole": 1}, "here")
    with pytest.raises(ConfigError, match="expected a mapping"):
        from_mapping(Sample, "needed", "here")
    with pytest.raises(ConfigError, match="allowed: none"):
        create("off[k=1]", 8)


def test_ranges_include_their_ends() -> None:
    for value in (1, 7):
        check_ranges(Sample(value), "p", needed=(1, 7))
    with pytest.raises(ConfigError, match="policy 'p': needed must be from 1 to 7, got 8"):
        check_ranges(Sample(8), "p", needed=(1, 7))
    with pytest.raises(ConfigError, match="needed must be at least 1, got 0"):
        check_ranges(Sample(0), "p", needed=(1, inf))
    with pytest.raises(ConfigError, match="number"):
        check_ranges(Sample(1, number=nan), "p", number=(0, inf))


# ---- the registry --------------------------------------------------------------------------------


def test_policies_say_whether_they_learn_and_what_they_take_of_a_model() -> None:
    assert [learns(spec) for spec in ("marginal", "bandit", "cascade", "static:3", "no-such")] == [
        *(True, True),
        *(False, False, False),
    ]
    facts = {"experts": 64, "top_k": 8, "colour": 1}
    assert applicable("marginal", facts) == {"experts": 64, "top_k": 8}
    assert applicable("cascade", facts) == applicable("no-such", facts) == {}
    assert {"static:K", "off", "cascade"} <= set(names())
    assert list(names()) == sorted(names())


def test_an_argument_has_at_most_nine_digits() -> None:
    assert create("static:" + "9" * 9, 10**9).settings.k == 10**9 - 1
    with pytest.raises(ConfigError, match="whole number"):
        create("static:" + "1" * 10, 10**12)


@pytest.mark.parametrize("k", [0, 8])
def test_static_takes_every_k_that_the_engine_can_verify(k: int) -> None:
    assert create(f"static:{k}", 8).settings.k == k
    with pytest.raises(ConfigError):
        create(f"static:{k + 9}", 8)


# ---- a request's options -------------------------------------------------------------------------


def test_a_cap_goes_from_0_to_the_engines_longest_draft() -> None:
    for cap in (0, 8):
        assert request_options({"cascade_max_k": cap}, 8) == RequestOptions(max_k=cap)
    assert request_options({"cascade_max_k": 99}, None).max_k == 99
    for cap in (-1, 9):
        with pytest.raises(ConfigError, match="from 0 to 8"):
            request_options({"cascade_max_k": cap}, 8)
    with pytest.raises(ConfigError, match="from 0 to the engine's longest draft"):
        request_options({"cascade_max_k": -1}, None)
    with pytest.raises(ConfigError, match="cascade_task must be a text"):
        request_options({"cascade_task": 3}, 8)


def test_a_policy_s_own_longest_draft_is_checked_where_the_engine_s_is_known() -> None:
    assert request_options({"cascade_policy": "static:99"}, None).policy == "static:99"
    with pytest.raises(ConfigError, match="from 0 to 8"):
        request_options({"cascade_policy": "static:99"}, 8)


def test_a_policy_is_checked_with_the_settings_that_the_server_has_for_it() -> None:
    asked = {"cascade_policy": "marginal[top_k=9]"}
    with pytest.raises(ConfigError, match="top_k"):
        request_options(asked, 8)
    assert request_options(asked, 8, lambda _name: {"experts": 16}).policy == "marginal[top_k=9]"


def test_each_right_option_counts_whatever_the_others_are() -> None:
    right = {"cascade_policy": "off", "cascade_max_k": 3, "cascade_task": "code"}
    assert valid_request_options(right, 8) == RequestOptions("off", 3, "code")
    backwards = dict(reversed(right.items()))
    assert valid_request_options(backwards, 8) == RequestOptions("off", 3, "code")
    for name in right:
        left = {k: v for k, v in right.items() if k != name}
        assert valid_request_options({**right, name: []}, 8) == request_options(left, 8)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafted", "emitted", "accepted"), [(3, 4, 3), (3, 1, 0), (3, 0, 0), (0, 1, 0), (2, 5, 2)]
)
def test_accepted_are_the_tokens_but_the_target_s_own(
    drafted: int, emitted: int, accepted: int
) -> None:
    assert RequestStep("r", drafted, emitted).accepted == accepted


@pytest.mark.parametrize(
    ("draft", "tokens", "same"),
    [
        ([1, 2, 3], [1, 2, 9], 2),
        ([1], [1, 2], 1),
        ([1, 2], [1], 1),
        ([], [1], 0),
        ([2, 1], [1, 1], 0),
    ],
)
def test_the_matching_prefix_ends_at_the_first_difference(
    draft: list[int], tokens: list[int], same: int
) -> None:
    assert matching_prefix(draft, tokens) == same


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("marginal", {"top_k": 3, "experts": 2}, "from 1 to experts (2), got 3"),
        ("marginal", {"top_k": 0, "experts": 2}, "from 1 to experts (2), got 0"),
        ("marginal", {"most_lost": 0.0}, "most_lost must be above 0, got 0"),
        ("marginal", {"crowd": -1}, "crowd must be at least 0, got -1"),
        ("marginal", {"rate_memory": 0.5}, "rate_memory must be at least 1, got 0.5"),
        ("dynamic-table", {"table": [[1, 4]]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": [[1, 4, 5, 6]]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": [[1, "4", 5]]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": [[1, 4, 5.5]]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": [7]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": ["abc"]}, "each entry is [first size, last size, K]"),
        ("dynamic-table", {"table": []}, ""),
        ("dynamic-table", {"table": [[2, 4, 5]]}, ""),
    ],
)
def test_what_means_nothing_is_refused(name: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        create(name, 8, settings)
    assert words in str(refused.value)


def test_what_just_means_something_is_taken() -> None:
    for settings in (
        {"top_k": 2, "experts": 2},
        {"top_k": 1, "experts": 1},
        {"most_lost": 1e-9},
        {"crowd": 0},
        {"rate_memory": 1.0},
    ):
        create("marginal", 8, settings)
    for table in ([[1, 4, 5]], [[1, 1, 0], [2, 9, 8]]):
        create("dynamic-table", 8, {"table": table})


def test_a_draft_has_a_length_whether_it_is_seen_or_not() -> None:
    assert Proposal("r", [7, 8]).length == 2
    assert Proposal("r", unseen=3).length == 3
    assert Proposal("r").length == 0
