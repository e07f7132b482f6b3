"""Whatever fails, answers are right, no request is lost, and the fault is counted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from moecascade import policies
from moecascade.core import registry
from moecascade.core.controller import MOST_SLOW, SLOW, Controller
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.step import Decision, Proposal
from moecascade.errors import ConfigError
from moecascade.policies import Policy, register
from moecascade.telemetry.recorder import Recorder
from moecascade.vllm import link
from tests.conftest import Engine
from tests.test_vllm import PROMPTS, left_as_it_was, policy

CALLBACKS = ("add", "drop", "decide", "observe", "lookahead", "explain")
TOKENS = 32
DISK = OSError(28, "No space left on device")


class Fails(Policy):
    """Always drafts three, until one of its callbacks fails."""

    name = "fails"
    at = ""  # the callback
    seconds = 0.0  # that deciding takes

    def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
        time.sleep(self.seconds)
        return [Decision(p.request_id, min(3, p.length), "always") for p in proposals]

    def __getattribute__(self, name: str) -> Any:
        if name in CALLBACKS and name == type(self).at:

            def fail(*_: Any) -> Any:
                raise ZeroDivisionError(f"a bug in {name}")

            return fail
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def own_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(policies.classes()))
    monkeypatch.setattr(Fails, "at", "")
    monkeypatch.setattr(Fails, "seconds", 0.0)
    register(Fails)


@pytest.fixture(scope="module")
def reference(ngram_engine: Engine) -> list[list[int]]:
    """What the first two prompts are answered without drafts."""
    return ngram_engine.generate(PROMPTS[:2], policy("off"), TOKENS)


@pytest.fixture
def engine(ngram_engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield from left_as_it_was(ngram_engine, request)
    ngram_engine.scheduler.controller._groups.pop("fails", None)


@pytest.mark.engine
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_policy_that_raises_in_any_callback_costs_its_own_drafts_only(
    engine: Engine, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch, callback: str
):
    faults = dict(engine.scheduler.cascade_faults)
    monkeypatch.setattr(Fails, "at", callback)
    asked = [policy("fails"), policy("static:3")]
    outputs, steps = engine.generate_logged(PROMPTS[:2], asked, TOKENS)
    assert outputs == reference
    drafted = sum(p["drafted"] for s in steps for p in s["requests"] if p["policy"] == "static:3")
    assert drafted > 0  # the other does not notice
    found = engine.scheduler.cascade_faults
    more = {kind: n - faults.get(kind, 0) for kind, n in found.items() if n != faults.get(kind, 0)}
    asked_for = {"lookahead": {}, "explain": "explanation of policy 'fails'"}  # no model drafts
    kind = asked_for.get(callback, "policy 'fails'")
    assert set(more) == ({kind} if kind else set())


@pytest.mark.engine
def test_a_policy_that_takes_200_ms_raises_a_fault_and_is_retired(
    engine: Engine, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Fails, "seconds", 0.2)
    outputs, steps = engine.generate_logged(PROMPTS[1:2], policy("fails"), TOKENS)
    assert outputs == reference[1:]
    slow = [step for step in steps if step["controller"] > 0.2]
    assert len(slow) <= MOST_SLOW + 1
    assert steps[-1]["requests"][0]["why"] == "fault"
    assert engine.scheduler.cascade_faults["policy 'fails'"] >= 1


def clocks() -> dict[str, Callable[[], float]]:
    """Return clocks that go wrong, by what they do."""
    calls = {"n": 0}

    def jump(seconds: float) -> Callable[[], float]:
        def now() -> float:
            calls["n"] += 1
            return time.perf_counter() + (seconds if calls["n"] % 60 > 30 else 0.0)

        return now

    return {
        "stands still": lambda: 12.0,
        "an hour forward and back": jump(3600.0),
        "an hour back and forward": jump(-3600.0),
    }


@pytest.mark.engine
@pytest.mark.parametrize("way", list(clocks()))
def test_a_clock_that_goes_wrong_costs_no_more_than_gain(
    engine: Engine, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch, way: str
):
    now = clocks()[way]
    monkeypatch.setattr(engine.scheduler._clock, "_now", now)
    monkeypatch.setattr(engine.scheduler._recorder, "_now", now)
    monkeypatch.setattr(engine.scheduler.controller, "_now", now)
    asked = [policy("cascade"), policy("marginal")]
    assert engine.generate(PROMPTS[:2], asked, TOKENS) == reference


@pytest.mark.engine
def test_a_step_of_a_hundred_times_the_usual_time_is_a_pause(
    engine: Engine, reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    clock, late = engine.scheduler._clock, {"by": 0.0}
    monkeypatch.setattr(clock, "_now", lambda: time.perf_counter() + late["by"])
    engine.add("paused", PROMPTS[1], policy("marginal"), TOKENS)
    tokens: list[int] = []
    for step in range(200):
        if step == 12:
            late["by"] += 5.0
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
        for output in engine.llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
    assert tokens == reference[1]
    costs = engine.scheduler.controller._groups["marginal"].policy._costs
    assert costs.seconds(1) < 1.0  # five seconds were not taken for a step's


@pytest.mark.parametrize("log", ["step_log", "trace_log"])
@pytest.mark.parametrize("path", ["/proc/moecascade.jsonl", "/dev/full/moecascade.jsonl"])
def test_a_log_in_a_folder_that_cannot_be_written_stops_the_start(log: str, path: str):
    options = ServerOptions(**{log: path})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{log} .* cannot be written"):
        Recorder(options, lambda what, how: None)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kept", "kind"), [("_metrics", "metrics"), ("_steps", "step_log"), ("_traces", "trace_log")]
)
def test_what_can_no_longer_be_written_or_counted_raises_once_and_is_given_up(
    engine: Engine,
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kept: str,
    kind: str,
):
    class Full:
        def __getattr__(self, _name: str) -> Any:
            raise DISK

    recorder = engine.scheduler._recorder
    monkeypatch.setattr(getattr(recorder, kept), "it", Full())
    assert engine.generate(PROMPTS[:2], policy("static:3"), TOKENS) == reference
    assert getattr(recorder, kept).it is None
    assert engine.scheduler.cascade_faults.pop(kind) == 1


def test_an_engine_that_cannot_be_asked_is_left_out_and_a_bad_question_answered_by_nothing():
    def answer(question: Any) -> Any:
        return 1 // question["by"]

    engine = link.Link(7, answer)
    try:
        with pytest.raises(OSError, match="in use"):
            link.Link(7, answer)
        assert link.ask(7, {"by": 0}) is None  # a bug in the answer
        assert link.ask(7, {}) is None
        assert link.ask(7, {"by": 1}) == 1  # it goes on
        assert link.ask(8, {"by": 1}) is None
    finally:
        engine.close()
    time.sleep(0.05)
    assert link.ask(7, {"by": 1}) is None


def test_a_link_closes_whenever_it_is_asked_to():
    """Also in the moment in which it has answered somebody and waits for nobody yet."""
    for _ in range(200):
        engine = link.Link(7, lambda question: question)
        assert link.ask(7, {"a": 1}) == {"a": 1}
        engine.close()
    assert link.ask(7, {}) is None


def test_an_engine_that_stands_still_keeps_nobody_waiting():
    """Its socket takes callers, as a stopped process's does, and nobody answers them."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(link.address(7))
        silent.listen(4)
        asker = threading.Thread(target=link.ask, args=(7, {}))
        asker.start()
        asker.join(10 * link.PATIENCE)
        assert not asker.is_alive()


def test_somebody_who_calls_and_says_nothing_keeps_the_others_waiting_for_a_moment_only():
    engine = link.Link(7, lambda question: question)
    try:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(link.address(7))
            answers = [link.ask(7, {"a": 1}) for _ in range(3)]
        assert answers[-1] == {"a": 1}
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("seconds", "retired"),
    [
        ([SLOW * 2] * MOST_SLOW, True),
        ([SLOW * 2] * (MOST_SLOW - 1), False),
        ([SLOW * 2, SLOW / 2] * 50, False),  # now and then
        ([SLOW * 2, SLOW * 2, SLOW / 2] * MOST_SLOW, True),
        ([SLOW / 2] * 1000, False),
    ],
)
def test_a_policy_is_retired_when_it_is_slow_as_a_rule(seconds: list[float], retired: bool):
    clock = {"at": 0.0}
    faults: list[str] = []
    controller = Controller(
        ServerOptions(policy="fails"),
        8,
        lambda what, how: faults.append(f"{what}: {how}"),
        now=lambda: clock["at"],
    )

    class Waits(Fails):
        def decide(self, proposals: Sequence[Proposal]) -> list[Decision]:
            clock["at"] += took
            return super().decide(proposals)

    controller._groups["fails"].policy = Waits(None, 8)
    controller.add("r", RequestOptions())
    for took in [*seconds, 0.0]:  # noqa: B007 -- which `decide` reads
        decision = controller.decide([Proposal("r", [1, 2, 3])])["r"]
    assert (decision.why == "fault") is retired
    assert decision.k == (0 if retired else 3)
    assert len(faults) == retired
    if retired:
        assert "more than 20 ms" in faults[0]
