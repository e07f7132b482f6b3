"""The plugin in the real vLLM: lossless, per request, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from moecascade import policies
from moecascade.core import registry
from moecascade.core.options import ServerOptions
from moecascade.core.step import Step
from moecascade.policies import register
from moecascade.telemetry import traces
from tests.conftest import MAX_K, MAX_LEN, Engine
from tests.policies import RandomK

pytestmark = pytest.mark.engine

PROMPTS = [
    """Rename the variable x to total in this Python code and repeat the code:
def add(values):
    x = 0
    for v in values:
        x = x + v
    return x

def add(values):
    total = 0
""",
    """The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. \
The days of the week are""",
    "Question: a farmer has 12 cows, buys 7 more, then sells 4. How many cows are left?\nAnswer:",
    "Once upon a time, in a village at the foot of a mountain, there lived an old clockmaker who",
    """Name: Ada Lovelace. Born: 1815. City: London.
As JSON: {"name": "Ada Lovelace", "born": 1815, "city": "London"}
Name: Alan Turing. Born: 1912. City: Maida Vale.
As JSON:""",
]


class Raises(RandomK):
    """A test's policy that works for some steps, then raises."""

    name = "raises"

    def observe(self, step: Step) -> None:
        if self._random.random() < 0.2:
            raise ZeroDivisionError("a bug in a policy")


@pytest.fixture(autouse=True)
def own_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(policies.classes()))
    register(RandomK)
    register(Raises)


@pytest.fixture(params=["ngram", "draft_model"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine with each drafter in turn, in which a test leaves nothing behind."""
    engine: Engine = request.getfixturevalue(f"{request.param}_engine")
    yield from left_as_it_was(engine, request)


@pytest.fixture
def any_engine(ngram_engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The same with one drafter, for what has nothing to do with drafters."""
    yield from left_as_it_was(ngram_engine, request)


def left_as_it_was(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    faults = dict(engine.scheduler.cascade_faults)
    yield engine
    engine.drain()
    scheduler = engine.scheduler
    assert len(scheduler.controller) == 0
    assert scheduler._decisions == {}
    assert scheduler._ended == []
    if "raises" not in request.node.name:
        assert dict(scheduler.cascade_faults) == faults


def policy(spec: str, **more: Any) -> dict[str, Any]:
    return {"cascade_policy": spec, **more}


def test_greedy_output_is_the_same_under_every_policy(any_engine: Engine) -> None:
    reference = any_engine.generate(PROMPTS, policy("off"))
    drafted = {}
    for spec in ("static:3", "cascade", "marginal", "marginal[crowd=2]", "random"):
        outputs, steps = any_engine.generate_logged(PROMPTS, policy(spec))
        assert outputs == reference, spec
        drafted[spec] = {r["drafted"] for step in steps for r in step["requests"]}
        emitted: Counter[str] = Counter()
        for r in (r for step in steps for r in step["requests"]):
            assert r["drafted"] < max(
                1, len(outputs[0]) - emitted[r["id"]]
            )  # what there is room for
            emitted[r["id"]] += r["emitted"]
        assert emitted.total() == sum(map(len, outputs))
    assert (
        {0, 3} <= drafted["static:3"] <= {0, 1, 2, 3}
    )  # near its end an answer has room for fewer
    assert len(drafted["random"]) > 4
    assert max(drafted["cascade"]) >= 1


def test_four_requests_at_once_each_get_the_k_of_their_own_policy(any_engine: Engine) -> None:
    asked = [
        policy("off"),
        policy("static:3"),
        policy("static:8", cascade_max_k=5),
        policy("cascade"),
    ]
    steps = any_engine.steps_of(lambda: any_engine.generate([PROMPTS[1]] * 4, asked))
    together = [s for s in steps if s["decode"] and len(s["requests"]) == 4]
    assert len(together) > 10
    ks: dict[str, set[int]] = {}
    for step in together:
        for r in step["requests"]:
            ks.setdefault(r["policy"], set()).add(r["k"])
            assert r["drafted"] <= r["k"]
            assert 1 <= r["emitted"] <= r["drafted"] + 1
    assert ks["off"] == {0}
    assert ks["static:3"] == {3}
    assert ks["static:8"] == {5}
    assert {0, 3} <= ks["cascade"]
    mixed = [{r["drafted"] for r in step["requests"]} for step in together]
    assert max(map(len, mixed)) >= 3  # different draft lengths verified in one batch


def test_aborts_in_flight_leave_no_state(any_engine: Engine) -> None:
    for i, prompt in enumerate(PROMPTS):
        any_engine.add(f"abort-{i}", prompt, policy(["cascade", "random"][i % 2]), 200)
    any_engine.step(6)
    scheduler = any_engine.scheduler
    assert len(scheduler.controller) == len(PROMPTS)
    any_engine.llm.llm_engine.abort_request(["abort-0", "abort-3"])
    any_engine.step(2)
    assert len(scheduler.controller) == len(PROMPTS) - 2
    any_engine.llm.llm_engine.abort_request([f"abort-{i}" for i in range(len(PROMPTS))])
    any_engine.drain()
    assert len(scheduler.controller) == 0


def test_preempted_requests_go_on_losslessly_and_leave_no_state(any_engine: Engine) -> None:
    prompts = [f"{i}. {prompt}" for i, prompt in enumerate(PROMPTS + PROMPTS[:3])]
    length = 130  # with the prompt more than a block, see KV_BLOCKS
    reference = any_engine.generate(prompts[:2], policy("off"), max_tokens=length)
    preempted: list[int] = []
    scheduler = any_engine.scheduler
    requests: dict[str, Any] = {}

    def run() -> None:
        for i, prompt in enumerate(prompts):
            any_engine.add(
                f"preempt-{i}", prompt, policy(["random", "cascade", "marginal"][i % 3]), length
            )
        outputs: dict[str, list[int]] = {}
        while any_engine.llm.llm_engine.has_unfinished_requests():
            requests.update(scheduler.requests)
            for output in any_engine.llm.llm_engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        preempted.append(sum(request.num_preemptions for request in requests.values()))
        assert [outputs["preempt-0"], outputs["preempt-1"]] == reference
        assert len(outputs) == len(prompts)
        assert all(len(tokens) == length for tokens in outputs.values())

    faults = dict(any_engine.scheduler.cascade_faults)
    steps = any_engine.steps_of(run)
    assert dict(any_engine.scheduler.cascade_faults) == faults
    assert preempted[0] > 0
    # the steps that recompute a preempted request are not taken for decoding
    assert any(not step["decode"] for step in steps[10:])


def test_a_policy_that_raises_does_not_disturb_the_output(any_engine: Engine) -> None:
    reference = any_engine.generate(PROMPTS, policy("off"))
    before = any_engine.scheduler.cascade_faults["policy 'raises'"]
    asked = [policy("raises")] * 3 + [policy("random")] * 2
    outputs, steps = any_engine.generate_logged(PROMPTS, asked)
    assert outputs == reference
    assert any_engine.scheduler.cascade_faults["policy 'raises'"] > before
    rows = [r for step in steps for r in step["requests"]]
    retired = [r["k"] for r in rows if r["policy"] == ""]
    assert len(retired) > 50
    assert set(retired) == {0}  # off, and not tried again
    after = rows[rows.index(next(r for r in rows if r["policy"] == "")) :]
    assert sum(r["drafted"] for r in after) > 0  # the others still draft


def test_whatever_raises_in_the_plugin_costs_drafts_not_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = engine.generate(PROMPTS[:2], policy("off"))
    faults = engine.scheduler.cascade_faults
    for name in ("observe", "decide", *["lookahead"] * engine.scheduler._drafter.one_by_one):
        before = faults.total()

        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug in the plugin: this raises in the engine's process")

        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler.controller, name, broken)
            assert engine.generate(PROMPTS[:2], policy("static:3")) == reference, name
        assert faults.total() > before, name


def test_a_worker_that_keeps_drafts_to_itself_is_asked_for_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's second model runner, for GPUs, sends -1 for drafts unless a step is marked."""
    reference = engine.generate(PROMPTS[:2], policy("off"))
    faults = dict(engine.scheduler.cascade_faults)
    for answers, heeded in ((True, "heeded"), (False, "not heeded")):
        with monkeypatch.context() as patch:
            keeps_drafts_to_itself(engine, patch, answers)
            outputs, steps = engine.generate_logged(PROMPTS[:2], policy("static:3"))
        assert outputs == reference, heeded
        drafted = sum(part["drafted"] for step in steps for part in step["requests"])
        assert (drafted > 0) is answers, heeded
        if answers:
            assert dict(engine.scheduler.cascade_faults) == faults
    assert engine.scheduler.cascade_faults.pop("drafts") > 0


def keeps_drafts_to_itself(engine: Engine, patch: pytest.MonkeyPatch, answers: bool) -> None:
    """Let the engine send drafts as the second runner does, or never tell them."""
    scheduler, core = engine.scheduler, engine.core
    schedule, take = scheduler.schedule, core.model_executor.take_draft_token_ids
    marked: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        marked.append(output.has_structured_output_requests)
        return output

    def taken() -> Any:
        drafts = take()
        if drafts is not None and not (answers and marked[-1]):
            drafts.draft_token_ids = [[-1] * len(draft) for draft in drafts.draft_token_ids]
        return drafts

    patch.setattr(scheduler, "schedule", watched)
    patch.setattr(core.model_executor, "take_draft_token_ids", taken)


def test_drafts_that_are_filled_up_are_verified_as_far_as_they_were_found(
    ngram_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-gram drafter of vLLM's second runner fills drafts up with the text's last token."""
    engine = ngram_engine
    take = engine.core.model_executor.take_draft_token_ids

    def filled() -> Any:
        drafts = take()
        if drafts is not None:
            drafts.draft_token_ids = [
                draft + [engine.scheduler.requests[name].all_token_ids[-1]] * (MAX_K - len(draft))
                if name in engine.scheduler.requests
                else draft
                for name, draft in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
            ]
        return drafts

    def drafted(steps: list[Any]) -> int:
        return sum(part["drafted"] for step in steps for part in step["requests"])

    reference, steps = engine.generate_logged(PROMPTS, policy("static:8"))
    plain = drafted(steps)
    monkeypatch.setattr(engine.core.model_executor, "take_draft_token_ids", filled)
    outputs, steps = engine.generate_logged(PROMPTS, policy("static:8"))
    assert outputs == reference
    assert drafted(steps) > 1.3 * plain  # it would verify what nobody found
    padding = dataclasses.replace(engine.scheduler._drafter, pads=True)
    monkeypatch.setattr(engine.scheduler, "_drafter", padding)
    outputs, steps = engine.generate_logged(PROMPTS, policy("static:8"))
    assert outputs == reference
    # Where the text ends alike, a fill cannot be told from a find (here 280 against 264).
    assert plain <= drafted(steps) <= 1.1 * plain


def test_near_the_end_of_a_context_nothing_is_drafted_so_nothing_verified_nor_learnt_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one request comes near it vLLM drafts for none, and sends zeros as their drafts."""
    tokens = engine.llm.get_tokenizer().encode(30 * PROMPTS[1])
    long = {"prompt_token_ids": tokens[: MAX_LEN - 30]}
    prompts: list[Any] = [long, PROMPTS[3]]
    reference = engine.generate(prompts, policy("off"))
    seen: list[Step] = []
    observe = engine.scheduler.controller.observe

    def watched(step: Step) -> None:
        seen.append(step)
        observe(step)

    monkeypatch.setattr(engine.scheduler.controller, "observe", watched)
    slowly = [policy("static:1"), policy(f"static:{MAX_K}")]  # the long one comes near by steps
    assert engine.generate(prompts, slowly) == reference
    first, position = seen[0].requests[0].request_id, MAX_LEN - 30
    away: list[Step] = []
    near: list[Step] = []
    for step in seen:
        parts = {part.request_id: part for part in step.requests}
        if len(parts) == 2:
            (near if position > MAX_LEN - MAX_K + 1 else away).append(step)
        position += parts[first].emitted if first in parts else 0
    assert any(part.drafted for step in away for part in step.requests)
    assert len(near) >= 3
    assert not any(part.drafted for step in near for part in step.requests)
    assert not any(step.passes for step in near[1:])


def test_a_pause_is_no_steps_time(ngram_engine: Engine) -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = ngram_engine
    engine.add("paused", PROMPTS[3], policy("off"), 8)
    engine.step(3)
    assert not engine.scheduler._clock.idle
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert engine.scheduler._clock.idle
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()


@pytest.mark.parametrize("log", ["step_log", "trace_log"])
def test_a_log_that_cannot_be_written_is_given_up_which_costs_no_drafts(
    ngram_engine: Engine, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    engine = ngram_engine
    reference = engine.generate(PROMPTS[:2], policy("off"))

    class Full:
        def __getattr__(self, _name: str) -> Any:
            raise OSError(28, "No space left on device")

    observed: list[Step] = []
    observe = engine.scheduler.controller.observe

    def watched(step: Step) -> None:
        observed.append(step)
        observe(step)

    kept = getattr(engine.scheduler._recorder, {"step_log": "_steps", "trace_log": "_traces"}[log])
    monkeypatch.setattr(kept, "it", Full())
    monkeypatch.setattr(engine.scheduler.controller, "observe", watched)
    assert engine.generate(PROMPTS[:2], policy("static:3")) == reference
    assert sum(part.drafted for step in observed for part in step.requests) > 0
    assert kept.it is None  # given up with the first fault
    assert engine.scheduler.cascade_faults.pop(log) == 1


def test_bad_request_options_are_ignored_and_the_others_apply_raises(any_engine: Engine) -> None:
    reference = any_engine.generate(PROMPTS[:1], policy("off"))
    for bad in (policy("no-such"), {"cascade_max_k": 99}, {"cascade_polcy": "off"}):
        outputs, steps = any_engine.generate_logged(PROMPTS[:1], bad)
        assert outputs == reference
        assert {r["policy"] for s in steps for r in s["requests"]} == {ServerOptions().policy}
    # What else it asks for is done: who wants no drafts gets none.
    outputs, steps = any_engine.generate_logged(
        PROMPTS[:1], {**policy("no-such"), "cascade_max_k": 0}
    )
    assert outputs == reference
    assert {r["k"] for s in steps for r in s["requests"]} == {0}
    assert any_engine.scheduler.cascade_faults["request options"] >= 4


def test_steps_with_prefill_are_not_taken_for_decoding(any_engine: Engine) -> None:
    def run() -> None:
        any_engine.add("early", PROMPTS[1], policy("static:3"), 40)
        any_engine.step(10)
        any_engine.add("late", PROMPTS[0], policy("static:3"), 20)
        any_engine.drain()

    steps = any_engine.steps_of(run)
    prefill = [i for i, step in enumerate(steps) if not step["decode"]]
    assert prefill == [0, 10]
    assert all(step["seconds"] > 0 for step in steps)


def test_a_model_drafter_drafts_no_further_than_wanted(draft_model_engine: Engine) -> None:
    engine = draft_model_engine
    seen: list[tuple[int, int]] = []
    scheduler = engine.scheduler
    schedule = scheduler.schedule

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        wanted = max((d.k for d in scheduler._decisions.values()), default=0)
        seen.append((wanted, output.num_spec_tokens_to_schedule))
        return output

    scheduler.schedule = watch
    try:
        engine.generate(PROMPTS[:2], policy("off"), max_tokens=16)
        assert {drafted for _, drafted in seen} == {0}
        seen.clear()
        engine.generate(PROMPTS[:2], policy("static:2"), max_tokens=16)
        assert {drafted for _, drafted in seen if drafted} == {2}
        seen.clear()
        engine.generate(PROMPTS[:1], policy("marginal"), max_tokens=16)
        assert min(drafted for _, drafted in seen) >= 1  # the first token is free
    finally:
        del scheduler.schedule
    assert MAX_K > 2


def test_traces_hold_what_was_said_and_how_it_was_made(any_engine: Engine) -> None:
    path = any_engine.step_log.with_name("traces.jsonl")
    before = len(path.read_text().splitlines()) if path.exists() else 0
    outputs, steps = any_engine.generate_logged(
        PROMPTS[:2], policy("static:3", cascade_task="copy")
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()[before:]]
    assert sorted(row["output_token_ids"] for row in rows) == sorted(outputs)
    assert {row["task"] for row in rows} == {"copy"}
    drafted = sum(step["drafted"] for row in rows for step in row["steps"])
    assert drafted == sum(part["drafted"] for step in steps for part in step["requests"]) > 0
    found = list(traces.read([path]))[before:]
    assert sorted(list(trace.output) for trace in found) == sorted(outputs)


def test_the_models_experts_are_known_to_policies_that_ask(any_engine: Engine) -> None:
    any_engine.generate(PROMPTS[:1], policy("marginal"), max_tokens=2)
    group = any_engine.scheduler.controller._groups["marginal"]
    assert (group.policy.settings.experts, group.policy.settings.top_k) == (8, 2)


def test_the_log_says_what_was_expected_and_what_deciding_took(any_engine: Engine) -> None:
    _, steps = any_engine.generate_logged(PROMPTS[:1], policy("marginal"))
    decode = [step for step in steps if step["decode"]][1:]
    assert all(0 < step["controller"] < step["seconds"] for step in decode)
    assert all(0 < step["handover"] < step["seconds"] for step in decode)
    parts = [part for step in decode for part in step["requests"]]
    assert all(part["expected_tokens"] >= 1 for part in parts)
    assert all(part["utility"] > 0 for part in parts)
    assert all(part["expected_seconds"] > 0 for part in parts)


def test_later_drafts_are_accepted_at_a_temperature(ngram_engine: Engine) -> None:
    _, steps = ngram_engine.generate_logged(
        [PROMPTS[0]] * 16, policy("static:4"), max_tokens=24, temperature=0.7
    )
    emitted = [p["emitted"] for step in steps for p in step["requests"] if p["drafted"] >= 2]
    assert sum(n >= 3 for n in emitted) > 0.1 * len(emitted)
