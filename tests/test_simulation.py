"""Simulation: the planner's step times in replay, and policies on them as they have to come out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moecascade.errors import ConfigError
from moecascade.evaluation.workloads import workloads
from moecascade.replay import simulation
from moecascade.replay.planning import devices, plan
from moecascade.replay.planning.step_time import Drafter, Setup, step_time
from moecascade.telemetry.traces import Trace
from tests.conftest import Answer

DEVICE = Setup(devices.find("RTX-6000-Ada"))


def text(task: str, copied: float, seed: int) -> Trace:
    """An answer that copies its prompt in stretches, and goes its own way between them."""
    rng = random.Random(seed)
    prompt = [rng.randrange(5000) for _ in range(300)]
    output: list[int] = []
    while len(output) < 150:
        at = rng.randrange(280)
        output += prompt[at : at + 20] if rng.random() < copied else rng.sample(range(9000), 10)
    return Trace(f"{task}-{seed}", task, tuple(prompt), tuple(output[:150]))


TRACES = [
    text(task, copied, seed)
    for task, copied in (("code", 0.3), ("math", 0.05), ("extraction", 0.15))
    for seed in range(4)
]


@pytest.mark.parametrize("batch", [1, 4])
def test_replay_takes_the_time_that_the_planner_says(batch: int) -> None:
    model = plan.find_model("OLMoE-1B-7B-0924")
    made = simulation.conditions_of(model, DEVICE, Drafter("ngram"), max_k=8, batch=batch)
    one = step_time(model, DEVICE).total
    for requests, k in ((1, 0), (batch, 0), (batch, 3), (batch, 8)):
        took = step_time(model, DEVICE, requests=requests, k=k).total
        assert made.cost(requests * (k + 1)) == pytest.approx(took / one)


@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "OLMoE-1B-7B-0924", "Llama-3.1-8B-Instruct"])
def test_the_planner_s_expectation_is_what_its_steps_take(name: str) -> None:
    model = plan.find_model(name)
    times = plan.expected_times(model, DEVICE, max_k=7)
    assert times == sorted(times)
    assert times[3] == step_time(model, DEVICE, k=7, context=0).total
    assert times[4] == step_time(model, DEVICE, requests=8, k=1, context=0).total


def test_the_paper_s_models_come_out_in_order() -> None:
    """An oracle above all, `marginal` above `cascade`, and neither slower than no speculation."""
    engines = [
        (name, simulation.conditions_of(plan.find_model(name), DEVICE, Drafter("ngram"), max_k=8))
        for name in simulation.PAPER[:2]
    ]
    mixes = workloads(["code", "math", "extraction"])
    specs = ["static:1", "static:8", "cascade", "marginal", "oracle"]
    told: list[int] = []
    found = simulation.simulate(TRACES, engines, mixes, specs, seeds=1, tell=lambda: told.append(1))
    assert len(found) == len(told) == 2 * 7 * 5
    for name, _ in engines:
        mean = {
            spec: sum(f.speedup for f in found if f.model == name and f.policy == spec) / 7
            for spec in specs
        }
        assert max(mean, key=lambda spec: mean[spec]) == "oracle"
        assert mean["marginal"] > mean["cascade"] > 0.98
    again = simulation.simulate(TRACES, engines, mixes, specs, seeds=1, jobs=2)
    assert again == found


def test_drawn_drafts_are_right_as_often_as_published() -> None:
    (profile,) = plan.profiles_for("eagle3")
    long = [Trace(str(i), "x", (1,), tuple(range(2000))) for i in range(10)]
    drawn = simulation.with_drafts(long, profile)
    right = [count for trace in drawn for count in trace.drafts if isinstance(count, int)]
    for place, chance in enumerate(profile.survival):
        assert sum(count > place for count in right) / len(right) == pytest.approx(chance, abs=0.02)
    assert (
        drawn == simulation.with_drafts(long, profile) != simulation.with_drafts(long, profile, 1)
    )


def test_workloads_take_equal_shares_of_tasks() -> None:
    mixed = simulation.mixed(TRACES[:6], ["code", "math"])
    assert sorted(t.task for t in mixed) == ["code"] * 2 + ["math"] * 2
    with pytest.raises(ConfigError, match="'chat'"):
        simulation.mixed(TRACES, ["chat"])


def test_the_command_prints_tables_beside_the_paper_s(
    tmp_path: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.conftest.COLUMNS", 80)
    path = tmp_path / "t.jsonl"
    rows = [
        {"id": t.id, "task": t.task, "prompt_token_ids": t.prompt, "output_token_ids": t.output}
        for t in TRACES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--models", "Mixtral-8x7B-v0.1", "--policies", "static:1,cascade", "--jobs", 1)
    shown = cli("simulate", path, *options)
    assert shown.returncode == 0
    assert "paper's worst" in shown.stdout
    assert "0.79" in shown.stdout  # 26% slower
    assert max(map(len, shown.stdout.splitlines())) <= 80
    asked = cli("simulate", path, *options, "--json")
    assert len(json.loads(asked.stdout)["found"]) == 14
    refused = cli("simulate", path, *options, "--drafter", "eagle3")
    assert (refused.returncode, "hold no drafts" in refused.stderr) == (2, True)
    drawn = cli(
        *("simulate", path, *options[:2], "--drafter", "eagle3", "--acceptance", "chat, EAGLE-3"),
        *("--policies", "static:3,marginal", "--batch", 4, "--jobs", 1),
    )
    assert drawn.returncode == 0
    assert "with 1, 2, ... drafts of each request takes" in drawn.stdout
    wrong = cli("simulate", path, *options, "--drafter", "eagle3", "--acceptance", "chat, EAGLE")
    assert (wrong.returncode, "did you mean 'chat, EAGLE-3'" in wrong.stderr) == (2, True)
    none = cli("simulate", path, *options, "--acceptance", "math")
    assert (none.returncode, "none is known of this drafter" in none.stderr) == (2, True)
    for row in rows:
        row["drafts"] = [2] * 149
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("simulate", path, *options, "--drafter", "eagle3", "--late").returncode == 0
