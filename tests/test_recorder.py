"""What the adapter measures and writes down: the clock of steps, and the logs that may fail."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.step import Decision, Expectation, RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.telemetry import step_log, traces
from moecascade.telemetry.recorder import Recorder
from moecascade.vllm.clock import StepClock

STEP = Step(0.03, True, (RequestStep("a", 3, 2, [7, 8]), RequestStep("b", 0, 1, [9])))


class Time:
    """A time that the test sets."""

    at = 100.0

    def __call__(self) -> float:
        return self.at


def test_a_step_lasts_from_the_end_of_the_one_before_or_from_when_it_was_scheduled():
    time = Time()
    clock = StepClock(time)
    assert clock.idle
    clock.begin()
    time.at += 3
    clock.begin()  # the next one is scheduled while this one runs
    assert clock.end(busy=True) == 3
    time.at += 2
    assert clock.end(busy=False) == 2
    assert clock.idle
    time.at += 50
    assert clock.end(busy=True) is None  # nobody saw it begin
    clock.stop()
    time.at += 50
    clock.begin()
    time.at += 1
    assert clock.end(busy=True) == 1


def test_the_time_of_deciding_and_of_the_handover_is_counted_until_it_is_taken():
    time = Time()
    clock = StepClock(time)
    clock.handed_over()  # drafts before any step
    assert clock.take() == (0, 0)
    clock.processed()
    time.at += 5
    clock.handed_over()
    for _ in range(2):
        with clock.deciding():
            time.at += 1
    with contextlib.suppress(ZeroDivisionError), clock.deciding():
        time.at += 4
        raise ZeroDivisionError
    assert clock.take() == (6, 5)
    assert clock.take() == (0, 0)


def recorder(folder: Path, *logs: str) -> tuple[Recorder, list[str]]:
    faults: list[str] = []
    paths: dict[str, Any] = {log: str(folder / log) for log in logs}
    options = ServerOptions(trace_tokens=True, metrics=False, **paths)
    return Recorder(options, lambda what, _how: faults.append(what)), faults


def record(made: Recorder) -> None:
    made.begin("a", RequestOptions(task="code"), [1, 2], "cascade")
    decisions = {"a": Decision("a", 3, "test", Expectation(1.5, None, 0.02, {"phase": "test"}))}
    made.step(STEP, decisions, lambda r: r * 2, (0.1, 0.2))
    made.end("a")
    made.flush(idle=True)


def test_what_was_expected_is_logged_as_it_was_decided(tmp_path: Path):
    made, faults = recorder(tmp_path, "step_log", "trace_log")
    assert made.wants_reasons()
    record(made)
    (line,) = step_log.read(tmp_path / "step_log")
    a, b = line["requests"]
    assert a == {
        "id": "a",
        "policy": "aa",
        "k": 3,
        "why": "test",
        "drafted": 3,
        "emitted": 2,
        "utility": 1.5,
        "expected_seconds": 0.02,
    }
    assert (b["k"], b["why"], b["policy"]) == (0, "", "bb")
    assert (line["controller"], line["handover"]) == (0.1, 0.2)
    (trace,) = traces.read([tmp_path / "trace_log"])
    assert (trace.prompt, trace.output) == ((1, 2), (7, 8))
    assert not faults


def test_without_logs_nothing_is_written_nor_asked(tmp_path: Path):
    made, faults = recorder(tmp_path)
    assert not any(made.wants_reasons() for _ in range(100))
    record(made)
    made.close()
    assert list(tmp_path.iterdir()) == []
    assert not faults


@pytest.mark.parametrize("full", ["step_log", "trace_log"])
def test_a_log_that_cannot_be_written_is_given_up_once_and_the_other_goes_on(
    tmp_path: Path, full: str
):
    class Full:
        def __getattr__(self, _name: str) -> Any:
            raise OSError(28, "No space left on device")

    made, faults = recorder(tmp_path, "step_log", "trace_log")
    kept: Any = {"step_log": made._steps, "trace_log": made._traces}[full]
    kept.it = Full()
    for _ in range(3):
        record(made)
    made.close()
    assert faults == [full]
    assert made.wants_reasons() is (full != "step_log")
    other = {"step_log": "trace_log", "trace_log": "step_log"}[full]
    assert len((tmp_path / other).read_text().splitlines()) == 3
    assert (tmp_path / full).read_text() == ""


def test_traces_are_for_their_owner_alone(tmp_path: Path):
    made, _ = recorder(tmp_path, "step_log", "trace_log")
    record(made)
    made.close()
    assert (tmp_path / "trace_log").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("log", ["step_log", "trace_log"])
def test_a_file_that_cannot_be_opened_is_refused_with_its_option(tmp_path: Path, log: str):
    (tmp_path / log).mkdir()
    with pytest.raises(ConfigError, match=f"{log} .* cannot be written .*choose another file"):
        recorder(tmp_path, log)
