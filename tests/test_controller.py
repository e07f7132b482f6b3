"""Policies by name, requests by policy, and faults that stay where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moecascade import policies
from moecascade.core import registry
from moecascade.core.controller import MOST_SPECS, Controller
from moecascade.core.options import (
    RequestOptions,
    ServerOptions,
    request_options,
    server_options,
    valid_request_options,
)
from moecascade.core.spec import Spec
from moecascade.core.step import Decision, Expectation, Proposal, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.policies import Policy, create, register

ROOT = Path(policies.__file__).parent.parent


class Faulty(Policy):
    """Decides well until told to fail."""

    name = "faulty"
    fail_in: ClassVar[str] = ""
    k: ClassVar[Any] = 2
    says: ClassVar[Any] = Expectation(1.5, 3.0, 0.02)

    def _fail(self, where: str) -> None:
        if where == self.fail_in:
            raise RuntimeError(where)

    def add(self, request_id: str, max_k: int, prompt: Sequence[int] = ()) -> None:
        self._fail("add")

    def drop(self, request_id: str) -> None:
        self._fail("drop")

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        self._fail("decide")
        return [Decision(p.request_id, self.k, "faulty") for p in proposals]

    def observe(self, step: Step) -> None:
        self._fail("observe")

    def lookahead(self, request_ids: Sequence[str]) -> int:
        self._fail("lookahead")
        return self.k  # type: ignore[no-any-return]

    def explain(self, request_id: str) -> Expectation | None:
        self._fail("explain")
        return self.says  # type: ignore[no-any-return]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Faulty]]:
    monkeypatch.setattr(registry, "_REGISTRY", dict(policies.classes()))
    fail_in, k, says = Faulty.fail_in, Faulty.k, Faulty.says
    yield register(Faulty)
    Faulty.fail_in, Faulty.k, Faulty.says = fail_in, k, says


def controller(policy: str = "static:3") -> tuple[Controller, list[str]]:
    faults: list[str] = []
    made = Controller(ServerOptions(policy=policy), 8, lambda what, _how: faults.append(what))
    return made, faults


def step(*request_ids: str) -> Step:
    return Step(0.03, True, tuple(RequestStep(r, 0, 1) for r in request_ids))


def decide(c: Controller, request_ids: Sequence[str]) -> dict[str, Decision]:
    return c.decide([Proposal(request_id) for request_id in request_ids])


def ks(decisions: Mapping[str, Decision]) -> dict[str, int]:
    return {request_id: decision.k for request_id, decision in decisions.items()}


def test_each_request_is_decided_for_by_its_own_policy() -> None:
    c, _ = controller()
    c.add("a", RequestOptions())
    c.add("b", RequestOptions(policy="off"))
    c.add("c", RequestOptions(policy="static:8", max_k=5))
    c.add("d", RequestOptions(policy="cascade"))
    assert ks(decide(c, ["d", "c", "b", "a"])) == {"a": 3, "b": 0, "c": 5, "d": 0}
    assert [c.spec(r) for r in "abcd"] == ["static:3", "off", "static:8", "cascade"]
    for _ in range(4):
        c.observe(step("a", "b", "c", "d"))
    assert decide(c, ["d"])["d"].k == 3
    assert c.lookahead(["a", "b"]) == 3


def test_decisions_say_what_is_expected_of_them_only_where_that_is_asked(
    faulty: type[Faulty],
) -> None:
    c, _ = controller()
    c.add("says", RequestOptions(policy="faulty"))
    c.add("does not", RequestOptions())
    proposals = [Proposal("says"), Proposal("does not")]
    asked = c.decide(proposals, explain=True)
    assert asked["says"].expected == faulty.says
    assert asked["does not"].expected is None
    faulty.fail_in = "explain"  # it is not even called
    assert all(d.expected is None for d in c.decide(proposals).values())


@pytest.mark.parametrize("broken", [{"fail_in": "explain"}, {"says": {"utility": 1.0}}])
def test_a_policy_that_cannot_explain_itself_decides_all_the_same(
    faulty: type[Faulty], broken: dict[str, Any]
) -> None:
    for name, value in broken.items():
        setattr(faulty, name, value)
    c, faults = controller()
    c.add("bad", RequestOptions(policy="faulty"))
    for _ in range(2):
        decision = c.decide([Proposal("bad")], explain=True)["bad"]
        assert (decision.k, decision.expected) == (2, None)
    assert faults == ["explanation of policy 'faulty'"] * 2


def test_a_request_s_cap_holds_whatever_its_policy_says(faulty: type[Faulty]) -> None:
    c, faults = controller("faulty")
    c.add("capped", RequestOptions(max_k=1))
    assert c.lookahead(["capped"]) == 1
    c.add("free", RequestOptions())
    assert ks(decide(c, ["free", "capped"])) == {"free": 2, "capped": 1}
    assert c.lookahead(["capped", "free"]) == 2
    c.drop("capped")
    c.add("capped", RequestOptions())  # the name again, without a cap
    assert ks(decide(c, ["capped"])) == {"capped": 2}
    assert not faults


@pytest.mark.parametrize("where", ["add", "decide", "observe", "lookahead"])
def test_a_policy_that_raises_costs_only_its_own_requests_their_drafts(
    faulty: type[Faulty], where: str
) -> None:
    c, faults = controller()
    faulty.fail_in = where
    c.add("good", RequestOptions())
    c.add("bad", RequestOptions(policy="faulty"))
    decide(c, ["good", "bad"])
    c.observe(step("good", "bad"))
    c.lookahead(["good", "bad"])
    assert ks(decide(c, ["good", "bad"])) == {"good": 3, "bad": 0}
    assert faults == ["policy 'faulty'"]
    c.drop("good")
    c.drop("bad")
    assert len(c) == 0


def test_a_request_ends_whatever_its_policy_does(faulty: type[Faulty]) -> None:
    c, faults = controller()
    c.add("bad", RequestOptions(policy="faulty"))
    faulty.fail_in = "drop"
    c.drop("bad")
    assert faults == ["policy 'faulty'"]
    assert len(c) == 0


@pytest.mark.parametrize("k", [-1, 9, 2.0, float("nan")])
def test_a_decision_that_is_no_draft_length_is_a_fault(faulty: type[Faulty], k: int) -> None:
    faulty.k = k
    c, faults = controller("faulty")
    c.add("r", RequestOptions())
    assert ks(decide(c, ["r"])) == {"r": 0}
    assert faults == ["policy 'faulty'"]


def test_whole_numbers_of_any_kind_are_decisions(faulty: type[Faulty]) -> None:
    faulty.k = np.int64(3)
    c, faults = controller("faulty")
    c.add("r", RequestOptions())
    assert [(d.k, type(d.k)) for d in decide(c, ["r"]).values()] == [(3, int)]
    assert c.lookahead(["r"]) == 3
    faulty.k = 2.5
    assert c.lookahead(["r"]) == 0
    assert faults == ["policy 'faulty'"]


@pytest.mark.parametrize("answered", ["", "a", "aab", "ba", "abc"])
def test_decisions_for_other_requests_than_asked_are_a_fault(
    faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch, answered: str
) -> None:
    monkeypatch.setattr(
        faulty, "decide", lambda _self, _proposals: [Decision(r, 2, "faulty") for r in answered]
    )
    c, faults = controller("faulty")
    for request_id in "ab":
        c.add(request_id, RequestOptions())
    assert ks(decide(c, ["a", "b"])) == {"a": 0, "b": 0}
    assert faults == ["policy 'faulty'"]


def test_after_a_fault_new_requests_get_a_fresh_policy(faulty: type[Faulty]) -> None:
    c, _ = controller("faulty")
    faulty.fail_in = "observe"
    c.add("old", RequestOptions())
    retired = c._groups["faulty"].policy
    c.observe(step("old"))
    faulty.fail_in = ""
    c.add("new", RequestOptions())
    assert c._groups["faulty"].policy is not retired
    assert ks(decide(c, ["old", "new"])) == {"old": 0, "new": 2}


@pytest.mark.parametrize(
    ("extra", "k", "task", "faults"),
    [
        (None, 3, "", []),
        ({"cascade_policy": "static:5", "cascade_task": "code", "other": 1}, 5, "code", []),
        ({"cascade_policy": "static:5", "cascade_max_k": 2}, 2, "", []),
        ({"cascade_policy": "no-such", "cascade_max_k": 2}, 2, "", ["request options"]),
        ({"cascade_policy": "off", "cascade_max_k": 99}, 0, "", ["request options"]),
    ],
)
def test_a_request_gets_what_it_asks_for_and_of_bad_options_the_good_ones(
    extra: dict[str, Any] | None, k: int, task: str, faults: list[str]
) -> None:
    c, reported = controller()
    assert c.begin("r", extra).task == task
    assert ks(decide(c, ["r"])) == {"r": k}
    assert reported == faults


def test_where_requests_may_not_choose_only_task_and_report_count() -> None:
    options = ServerOptions(policy="static:3", request_options=False)
    c = Controller(options, 8, lambda what, how: None)
    asked = {"cascade_policy": "off", "cascade_max_k": 1, "cascade_task": "code"}
    granted = c.begin("r", {**asked, "cascade_report": True})
    assert granted == RequestOptions(task="code", report=True)
    assert ks(decide(c, ["r"])) == {"r": 3}


def test_a_request_whose_policy_cannot_be_made_runs_under_the_server_s(
    faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "__init__", lambda self, settings, max_k: 1 // 0)
    c, faults = controller()
    granted = c.begin("r", {"cascade_policy": "faulty", "cascade_max_k": 2})
    assert granted == RequestOptions(max_k=2)
    assert faults == ["policies"]
    assert ks(decide(c, ["r"])) == {"r": 2}


def test_unknown_requests_run_without_drafts() -> None:
    c, faults = controller()
    assert ks(decide(c, ["who"])) == {"who": 0}
    assert c.spec("who") == ""
    c.drop("who")
    assert not faults


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cascad", ["'cascad'", "did you mean 'cascade'", "static:K"]),
        ("static", ["'static'", "whole number", "static:3"]),
        ("static:x", ["'static:x'", "whole number"]),
        ("static:9", ["static:9", "from 0 to 8", "num_speculative_tokens"]),
        ("static:" + "9" * 5000, ["whole number", "static:3"]),
        ("off:1", ["'off:1'", "no argument"]),
    ],
)
def test_a_bad_policy_is_refused_with_value_and_remedy(spec: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        create(spec, 8)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"polcy": "off"}, ["'polcy'", "did you mean 'policy'"]),
        ({"policy": "fast"}, ["'fast'", "cascade"]),
        ({"policy": 3}, ["policy must be a text", "3"]),
        ({"policy": "static:12"}, ["from 0 to 8"]),
        ({"options": {"cascade": {"set_step": 3}}}, ["'set_step'", "did you mean 'set_steps'"]),
        ({"options": {"cascade": {"set_steps": 0}}}, ["set_steps must be at least 1", "0"]),
        ({"options": {"cascade": {"set_steps": "x"}}}, ["whole number", "'x'"]),
        ({"options": {"cascade": 3}}, ["mapping", "3"]),
        ({"options": {"static": 5}}, ["options of policy 'static'", "mapping", "5"]),
        ({"options": {"cascade": {"backoff": float("inf")}}}, ["backoff must be a number", "inf"]),
        ({"options": {"cascade": {"backoff": 10**400}}}, ["backoff must be a number"]),
        ({"options": {"cascadee": {}}}, ["'cascadee'", "did you mean 'cascade'"]),
        ([1], ["expected a mapping", "[1]"]),
    ],
)
def test_bad_configuration_is_refused_with_value_and_remedy(config: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        server_options({"cascade": config}, 8)
    for word in words:
        assert word in str(error.value)


def test_configuration_that_the_model_contradicts_is_refused_at_start() -> None:
    dense = {"experts": 1, "top_k": 1}
    config = {"cascade": {"policy": "off", "options": {"marginal": {"top_k": 2}}}}
    server_options(config, 8)
    with pytest.raises(ConfigError, match=r"top_k must be from 1 to experts \(1\), got 2"):
        server_options(config, 8, dense)


def test_no_configuration_is_sensible() -> None:
    nothings: list[Any] = [None, {}, {"other_plugin": {"x": 1}}, {"cascade": {}}]
    for nothing in nothings:
        assert server_options(nothing, 8) == ServerOptions(policy="marginal")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cascade_polcy": "off"}, ["'cascade_polcy'", "did you mean 'cascade_policy'"]),
        ({"cascade_policy": "best"}, ["'best'", "cascade", "marginal, off", "static:K"]),
        ({"cascade_policy": 1}, ["cascade_policy", "1"]),
        ({"cascade_max_k": 9}, ["from 0 to 8", "9"]),
        ({"cascade_max_k": -1}, ["from 0 to 8", "-1"]),
        ({"cascade_max_k": "3"}, ["whole number", "'3'"]),
        ({"cascade_max_k": True}, ["whole number", "True"]),
    ],
)
def test_bad_request_options_are_refused_with_value_and_remedy(
    asked: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        request_options(asked, 8)
    for word in words:
        assert word in str(error.value)


def test_request_options_leave_those_of_others_alone() -> None:
    assert request_options({"session_id": "x"}, 8) == RequestOptions()
    assert request_options(None, 8) == RequestOptions()
    asked = {"cascade_policy": "static:2", "cascade_max_k": 0, "other": 1}
    assert request_options(asked, 8) == RequestOptions("static:2", 0)


@pytest.mark.parametrize("key", ["moecascade", "cascde", "Cascade"])
def test_a_misspelt_key_of_ours_is_refused_and_those_of_others_are_not(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        server_options({key: {"policy": "off"}}, 8)
    assert (
        server_options({"cache": 1, "facade": 2, "cascade": {"policy": "off"}}, 8).policy == "off"
    )


def test_of_options_that_are_partly_wrong_the_others_count() -> None:
    wrong = {"cascade_policy": "no-such", "cascade_max_k": 0, "cascade_task": "code", "seed": 1}
    assert valid_request_options(wrong, 8) == RequestOptions(None, 0, "code")
    assert valid_request_options({"cascade_max_k": 9, "cascade_policy": "off"}, 8).policy == "off"
    assert valid_request_options(None, 8) == RequestOptions()


# ---- policies of others --------------------------------------------------------------------------

HALF = """
from moecascade.policies import Decision, Policy, register


@register
class Half(Policy):
    name = "half"

    def decide(self, proposals):
        return [Decision(p.request_id, len(p.tokens) // 2, "half") for p in proposals]
"""


def in_process(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds the modules and packages in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def trace(folder: Path) -> Path:
    path = folder / "traces.jsonl"
    row = {"id": "r", "task": "t", "prompt_token_ids": [1, 2, 3] * 9}
    path.write_text(json.dumps({**row, "output_token_ids": [1, 2, 3] * 40}) + "\n")
    return path


REPLAY = "from moecascade.cli.app import run; import sys; sys.argv[1:] = {!r}; run()"


def test_the_smallest_policy_of_all_is_a_name_and_a_decision() -> None:
    space: dict[str, Any] = {}
    known = dict(policies.classes())
    try:
        exec(HALF, space)
        c, faults = controller("half")
        c.add("r", RequestOptions())
        assert c.decide([Proposal("r", [1, 2, 3, 4, 5])], explain=True)["r"].k == 2
        c.observe(step("r"))
        assert c.lookahead(["r"]) == 8
        c.drop("r")
        assert not faults
    finally:
        registry._REGISTRY.clear()
        registry._REGISTRY.update(known)


def test_a_policy_in_a_file_is_found_by_commands_and_by_the_server(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HALF)
    command = REPLAY.format(["replay", str(trace(tmp_path)), "--policies", "off,half", "--json"])
    ran = in_process(tmp_path, command, MOECASCADE_POLICIES="mine")
    assert ran.returncode == 0, ran.stderr
    assert "half" in ran.stdout
    assert in_process(tmp_path, command).returncode == 2  # nobody said where it is
    serve = (
        "from moecascade.core.options import server_options, request_options\n"
        "server_options({'cascade': {'policy': 'half'}}, 8)\n"
        "print(request_options({'cascade_policy': 'half'}, 8).policy)"
    )
    ran = in_process(tmp_path, serve, MOECASCADE_POLICIES=" mine ,")
    assert (ran.returncode, ran.stdout) == (0, "half\n"), ran.stderr


def test_a_module_that_cannot_be_imported_is_named_with_a_remedy(tmp_path: Path) -> None:
    code = "from moecascade.core.options import server_options; server_options({}, 8)"
    ran = in_process(tmp_path, code, MOECASCADE_POLICIES="no_such_module")
    for words in ("ConfigError: MOECASCADE_POLICIES", "'no_such_module'", "PYTHONPATH"):
        assert words in ran.stderr


def test_installed_packages_bring_policies_and_a_broken_one_is_no_more_than_a_warning(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(HALF.replace("@register\n", ""))
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = ["half = mine:Half", "broken = mine:Missing", "lacking = mine:Decision"]
    (info / "entry_points.txt").write_text("\n".join(["[moecascade.policies]", *points]))
    ran = in_process(
        tmp_path, "from moecascade import create; print(type(create('half', 8)).__name__)"
    )
    assert (ran.returncode, ran.stdout) == (0, "Half\n"), ran.stderr
    for words in ("'broken'", "mine:Missing", "'lacking'", "'Decision' lacks name"):
        assert words in ran.stderr
    ran = in_process(tmp_path, "from moecascade import policies; print(policies.names())")
    assert "'half'" in ran.stdout


@pytest.mark.parametrize("name", ["this", "this:s", "antigravity", "os.path:join", "json[x=1]"])
def test_a_request_cannot_make_the_server_import_anything(name: str) -> None:
    loaded = set(sys.modules)
    with pytest.raises(ConfigError):
        request_options({"cascade_policy": name}, 8)
    c, _ = controller()
    with pytest.raises(ConfigError):
        c.add("r", RequestOptions(policy=name))
    assert set(sys.modules) - loaded == set()


def test_a_class_that_lacks_members_is_refused_and_one_that_has_them_all_is_taken(
    faulty: type[Faulty],
) -> None:
    class Bare:
        name = "bare"

        def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
            return []

    with pytest.raises(ConfigError, match=r"'.*Bare' lacks argument, Settings, .*observe"):
        register(Bare)
    with pytest.raises(ConfigError, match="lacks name, decide"):
        register(type("Nothing", (Policy,), {}))
    duck = type("Duck", (), {k: getattr(faulty, k) for k in dir(faulty) if k[0] != "_"})
    duck._fail = faulty._fail  # type: ignore[attr-defined]
    duck.__init__ = lambda self, settings, max_k: None  # type: ignore[misc]
    duck.name = "duck"  # type: ignore[attr-defined]
    duck.check = classmethod(lambda cls, settings, max_k: None)  # type: ignore[attr-defined]
    assert not issubclass(register(duck), Policy)
    c, faults = controller("duck")
    c.add("r", RequestOptions())
    assert c.decide([Proposal("r")], explain=True)["r"].expected == faulty.says
    assert not faults


def test_a_policy_that_cannot_be_made_is_refused_where_it_is_asked_for(
    faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "__init__", lambda self, settings, max_k: 1 // 0)
    c, _ = controller()
    with pytest.raises(ConfigError, match="'faulty' cannot be made: ZeroDivisionError"):
        c.add("r", RequestOptions(policy="faulty"))
    assert len(c) == 0


def test_checking_a_spec_makes_no_policy(
    faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "__init__", lambda self, settings, max_k: pytest.fail("made"))
    assert request_options({"cascade_policy": "faulty"}, 8).policy == "faulty"
    assert server_options({"cascade": {"policy": "faulty"}}, 8).policy == "faulty"
    assert policies.settings_for("static:3", 8).k == 3


# ---- specs with settings, and what is known of the model -----------------------------------------


def test_a_spec_may_carry_settings() -> None:
    policy = policies.create("cascade[set_steps=32,backoff=1]", 8)
    settings = policy.settings
    assert (settings.set_steps, settings.backoff, settings.trial_steps) == (32, 1, 4)
    assert policies.parse("static:3") == Spec("static", "3", {})
    assert policies.split("off, cascade[backoff=1,set_steps=8],static:3") == [
        "off",
        "cascade[backoff=1,set_steps=8]",
        "static:3",
    ]
    spec = "dynamic-table[table=[[1,4,5],[5,16,3]]]"
    assert policies.split(f"off,{spec},cascade") == ["off", spec, "cascade"]
    assert policies.parse(spec).settings == {"table": [[1, 4, 5], [5, 16, 3]]}
    policies.create(spec, 8)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab ", max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(
    st.builds(
        Spec,
        st.sampled_from(["off", "static", "hf-heuristic"]),
        st.none() | st.sampled_from(["", "3", "x"]),
        st.dictionaries(st.sampled_from(["k", "set_steps"]), VALUES, max_size=2),
    )
)
def test_a_spec_is_the_same_after_it_was_written_and_read(spec: Spec) -> None:
    assert policies.parse(str(spec)) == spec
    assert policies.split(f"{spec},off,{spec}") == [str(spec), "off", str(spec)]


def test_only_static_policies_have_a_static_k() -> None:
    ks = {spec: policies.parse(spec).static_k for spec in ("static:3", "static:0", "static", "off")}
    assert ks == {"static:3": 3, "static:0": 0, "static": None, "off": None}
    assert policies.parse("static:x").static_k is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cascade[set_steps=1" + "0" * 400 + "]", "whole number"),
        ("cascade[", "name=value"),
        ("cascade[backoff]", "name=value"),
        ("cascade[backoff=x]", "name=value"),
        ("cascade[bakoff=1]", "did you mean 'backoff'"),
        ("cascade[backoff=0]", "at least 1"),
        ("off[k=1]", "unknown key"),
    ],
)
def test_settings_in_a_spec_are_checked(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        policies.create(spec, 8)


def test_what_is_known_of_the_model_reaches_policies_that_ask_and_yields_to_the_user() -> None:
    facts = {"experts": 64, "top_k": 8}
    options = ServerOptions(options={"marginal": {"top_k": 4}})
    controller = Controller(options, 8, lambda what, how: None, facts)
    controller.add("a", RequestOptions(policy="marginal"))
    controller.add("b", RequestOptions(policy="marginal[experts=16]"))
    controller.add("c", RequestOptions(policy="cascade"))
    found = {
        spec: controller._groups[spec].policy.settings
        for spec in ("marginal", "marginal[experts=16]")
    }
    assert (found["marginal"].experts, found["marginal"].top_k) == (64, 4)
    assert (found["marginal[experts=16]"].experts, found["marginal[experts=16]"].top_k) == (16, 4)


def test_requests_that_ask_for_ever_new_specs_do_not_fill_the_memory() -> None:
    server = ServerOptions()
    controller = Controller(server, 8, lambda what, how: None)
    controller.add("stays", RequestOptions(policy="cascade[set_steps=7]"))
    for i in range(10_000):
        controller.add(f"r{i}", RequestOptions(policy=f"cascade[set_steps={100 + i}]"))
        controller.drop(f"r{i}")
    assert len(controller._groups) == MOST_SPECS
    assert controller.spec("stays") == "cascade[set_steps=7]"
    kept = {server.policy, "cascade[set_steps=7]", "cascade[set_steps=10099]"}
    assert kept <= set(controller._groups)


def test_where_all_policies_that_are_kept_are_in_use_one_more_is_refused() -> None:
    controller = Controller(ServerOptions(), 8, lambda what, how: None)
    asked = [RequestOptions(policy=f"cascade[set_steps={100 + i}]") for i in range(MOST_SPECS)]
    for i, options in enumerate(asked[:-1]):
        controller.add(f"r{i}", options)
    with pytest.raises(ConfigError, match="ask for one of them"):
        controller.add("more", asked[-1])
    assert len(controller) == MOST_SPECS - 1
    controller.add("more", asked[0])
    controller.drop("r3")
    controller.add("again", asked[-1])


# ---- any sequence of events ----------------------------------------------------------------------


class Moody(Faulty):
    """Fails where and when the machine below says; else it decides by the length of the draft."""

    name = "moody"

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        self._fail("decide")
        if self.fail_in == "others":
            return [Decision("nobody", 1, "moody")]
        k = {"K": -1, "type": 1.5}.get(self.fail_in)
        return [
            Decision(p.request_id, len(p.tokens) if k is None else k, "moody")  # type: ignore[arg-type]
            for p in proposals
        ]


MAX_K = 5
SOUND = ("off", "static:2", "static:5", "cascade[trial_steps=1]", "marginal[crowd=1]", "goodput")
MODES = ("", "", "add", "drop", "decide", "observe", "lookahead", "explain", "others", "K", "type")
SPECS = (*SOUND, "moody", "moody")
REQUESTS = st.sampled_from("abcdef")


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class Life(RuleBasedStateMachine):
    """Requests come, decode, end and come again, under policies good and bad."""

    def __init__(self) -> None:
        super().__init__()
        self.known = dict(policies.classes())
        register(Moody)
        self.faults: list[str] = []
        self.controller = Controller(
            ServerOptions(policy="static:2"), MAX_K, lambda what, _how: self.faults.append(what)
        )
        self.alive: dict[str, tuple[str, int]] = {}  # spec and cap

    def teardown(self) -> None:
        for request_id in list(self.alive):
            self.controller.drop(request_id)
        assert len(self.controller) == 0
        assert all(not group.members for group in self.controller._groups.values())
        assert not self.controller._caps
        assert {fault for fault in self.faults if "moody" not in fault} == set()
        registry._REGISTRY.clear()
        registry._REGISTRY.update(self.known)
        Moody.fail_in = ""

    @rule(mode=st.sampled_from(MODES))
    def mood(self, mode: str) -> None:
        Moody.fail_in = mode

    @rule(request_id=REQUESTS, spec=st.sampled_from(SPECS), cap=st.integers(0, 9))
    def add(self, request_id: str, spec: str, cap: int) -> None:
        self.controller.add(request_id, RequestOptions(spec, cap), [1, 2, 3])
        self.alive[request_id] = spec, min(cap, MAX_K)

    @rule(request_id=REQUESTS)
    def drop(self, request_id: str) -> None:
        self.controller.drop(request_id)
        self.alive.pop(request_id, None)

    @rule(
        asked=st.lists(REQUESTS, unique=True, min_size=1),
        right=st.integers(0, MAX_K),
        seconds=st.none() | st.floats(0.001, 1.0),
        decode=st.booleans(),
        explain=st.booleans(),
    )
    def step(
        self, asked: list[str], right: int, seconds: float | None, decode: bool, explain: bool
    ) -> None:
        draft = [1, 2, 3, 1, 2]
        proposals = [Proposal(request_id, draft) for request_id in asked]
        decisions = self.controller.decide(proposals, explain=explain)
        assert set(decisions) == set(asked)
        for request_id, decision in decisions.items():
            spec, cap = self.alive.get(request_id, ("", 0))
            assert decision.request_id == request_id
            assert type(decision.k) is int
            assert 0 <= decision.k <= cap
            assert explain or decision.expected is None
            if spec.startswith("static"):  # whatever befalls the others
                assert (decision.k, decision.why) == (min(int(spec[-1]), cap), "static")
            if spec == "moody":
                assert (decision.k, decision.why) in {(cap, "moody"), (0, "fault")}
            if not self.controller.spec(request_id):
                assert (decision.k, decision.why) == (0, "fault")
        assert self.controller.lookahead(asked) <= max(
            self.alive.get(request_id, ("", 0))[1] for request_id in asked
        )
        parts = []
        for request_id, decision in decisions.items():
            emitted = min(right, decision.k) + 1
            parts.append(RequestStep(request_id, decision.k, emitted, draft[:emitted]))
        self.controller.observe(Step(seconds, decode, tuple(parts)))

    @invariant()
    def only_the_faulty_lose_their_policy(self) -> None:
        assert len(self.controller) == len(self.alive)
        for request_id, (spec, _cap) in self.alive.items():
            assert self.controller.spec(request_id) in ({spec} if spec != "moody" else {spec, ""})


TestLife = Life.TestCase


def test_whether_anybody_could_want_a_draft() -> None:
    controller = Controller(ServerOptions(policy="marginal"), 8, lambda *_: None)
    for name, asked in {
        "off": RequestOptions(policy="off"),
        "capped": RequestOptions(max_k=0),
        "cut": RequestOptions(max_k=2),
    }.items():
        controller.add(name, asked)
    assert not controller.drafts(["off", "capped", "unknown"])
    assert controller.drafts(["off", "cut"])
    assert not controller.drafts([])


@pytest.mark.parametrize("may_ask", [True, False])
def test_what_a_request_may_ask_for_is_compiled_before_it_does(may_ask: bool) -> None:
    """In a process of its own, which has not imported it for another test."""
    code = (
        "import sys\n"
        "from moecascade.core.controller import Controller\n"
        "from moecascade.core.options import ServerOptions\n"
        f"Controller(ServerOptions(policy='off', request_options={may_ask}), 8, print)\n"
        "print('moecascade.core.marginal.predictor' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{may_ask}\n"
