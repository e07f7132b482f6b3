"""What is counted is what happened; what it is called, the docs say; nobody can swell it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moecascade.core import registry
from moecascade.core.options import RequestOptions
from moecascade.core.step import Decision, Expectation, Proposal, RequestStep, Step
from moecascade.telemetry.metrics import FAMILIES, PREFIX, REPORTS, Metrics, Totals, in_words
from moecascade.vllm.exposition import Exposition

DOCS = Path(__file__).parents[1] / "docs" / "operating.md"


def metrics() -> Metrics:
    return Metrics("marginal", registry.names(), {"experts": 8, "top_k": 2})


def text(*engines: Metrics) -> str:
    return Exposition("moe", {n: e.snapshot(1) for n, e in enumerate(engines)}).text().decode()


def value(exposed: str, name: str, **labels: str) -> float:
    """Return the sum of the samples that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
        if sample.name == PREFIX + name
        and all(sample.labels[key] == wanted for key, wanted in labels.items())
    )


def run(counts: Metrics, steps: int = 200, requests: int = 4, seed: int = 0) -> dict[str, int]:
    """Play steps of a made-up engine; return what happened in them."""
    rng = random.Random(seed)
    names = [f"r{n}" for n in range(requests)]
    for name in names:
        counts.begin(name, RequestOptions(), "marginal")
    done = {"verified": 0, "accepted": 0, "emitted": 0, "off": 0}
    for _ in range(steps):
        counts.propose([Proposal(name, [1, 2, 3, 4]) for name in names])
        parts = []
        for name in names:
            k = rng.choice((0, 0, 1, 3))
            right = min(k, rng.randrange(4))
            parts.append(RequestStep(name, k, right + 1, list(range(1, right + 2))))
            done["verified"] += k
            done["accepted"] += right
            done["emitted"] += right + 1
            done["off"] += not k
        seconds = 0.02 * (1.0 + 0.1 * sum(part.drafted for part in parts))
        counts.step(Step(seconds, True, tuple(parts)), {}, (1e-4, 2e-4))
    return done


def test_what_is_counted_is_what_happened():
    counts = metrics()
    done = run(counts)
    exposed = text(counts)
    assert value(exposed, "draft_tokens_proposed_total") == 200 * 4 * 4
    assert value(exposed, "draft_tokens_verified_total", policy="marginal") == done["verified"]
    assert value(exposed, "draft_tokens_accepted_total") == done["accepted"]
    assert value(exposed, "tokens_emitted_total") == done["emitted"]
    assert value(exposed, "request_steps_total", k="0") == done["off"]
    assert value(exposed, "request_steps_total") == 800
    assert value(exposed, "shadow_drafts_total") == done["off"]
    assert value(exposed, "shadow_drafts_right_total") == done["off"]  # every token is a 1 first
    assert value(exposed, "draft_positions_verified_total") == done["verified"]
    assert value(exposed, "draft_positions_accepted_total") == done["accepted"]
    assert value(exposed, "steps_total", kind="decode") == 200
    assert value(exposed, "controller_seconds_total") == pytest.approx(0.02)
    assert value(exposed, "requests_running") == 4


def test_a_speed_up_is_what_the_same_tokens_would_have_taken_over_what_they_took():
    counts = metrics()
    spent = 0.0
    counts.begin("r", RequestOptions(report=True), "static:3")
    for n in range(400):  # plain steps take 10 ms, with three drafts 15, and give two tokens
        k = 3 if n // 10 % 2 else 0
        seconds = 0.015 if k else 0.01
        spent += seconds
        counts.step(Step(seconds, True, (RequestStep("r", k, 2 if k else 1),)), {}, (0.0, 0.0))
    counts.end("r")
    exposed = text(counts)
    took = value(exposed, "decode_seconds_total", policy="static:3")
    without = value(exposed, "baseline_seconds_total", policy="static:3")
    assert took == pytest.approx(spent, rel=0.02)
    assert without == pytest.approx(6.0, rel=0.03)
    assert value(exposed, "saved_seconds_total") == pytest.approx(without - took)
    assert value(exposed, "lost_seconds_total") == 0
    report = counts.take_report("r")
    assert report is not None
    assert report["estimated_speedup"] == pytest.approx(6.0 / 5.0, rel=0.03)
    assert (report["steps"], report["steps_without_drafts"]) == (400, 200)
    assert (report["draft_tokens"], report["mean_draft_length"]) == (600, 1.5)
    assert counts.take_report("r") is None


def test_without_drafts_nothing_is_won_or_lost():
    counts = metrics()
    rng = random.Random(1)
    counts.begin("r", RequestOptions(), "off")
    for _ in range(100):
        step = Step(rng.uniform(0.01, 0.03), True, (RequestStep("r", 0, 1),))
        counts.step(step, {}, (0.0, 0.0))
    exposed = text(counts)
    took = value(exposed, "decode_seconds_total")
    assert took > 0
    assert value(exposed, "baseline_seconds_total") == took


def test_time_is_charged_whole_and_to_whom_the_drafts_belong():
    counts = metrics()
    counts.begin("still", RequestOptions(), "off")
    counts.begin("drafts", RequestOptions(), "static:3")
    for n in range(300):
        k = 3 * (n % 2)
        parts = (RequestStep("still", 0, 1), RequestStep("drafts", k, 1))
        counts.step(Step(0.03 if k else 0.02, True, parts), {}, (0.0, 0.0))
    exposed = text(counts)
    still, drafts = (value(exposed, "decode_seconds_total", policy=p) for p in ("off", "static:3"))
    assert still + drafts == pytest.approx(2 * (150 * 0.03 + 150 * 0.02), rel=0.02)
    assert still == pytest.approx(300 * 0.02, rel=0.03)  # as if nobody beside it had drafted


def test_series_stay_few_whatever_users_ask_for_and_nobody_is_named():
    counts = metrics()
    for n in range(5000):
        spec = f"marginal[crowd={n}]" if n % 2 else f"static:{n}"
        counts.begin(f"secret-{n}", RequestOptions(policy=spec, max_k=1), spec)
        decision = Decision(f"secret-{n}", 1, f"reason {n}", Expectation(1.1))
        parts = (RequestStep(f"secret-{n}", 1, 1, [5]),)
        counts.step(Step(0.01, True, parts), {decision.request_id: decision}, (0.0, 0.0))
        counts.fault(f"policy 'secret-{n}'")
        counts.end(f"secret-{n}")
    exposed = text(counts)
    assert "secret" not in exposed
    assert "crowd" not in exposed
    families = list(text_string_to_metric_families(exposed))
    policies = {sample.labels.get("policy") for family in families for sample in family.samples}
    assert len(policies) < 60
    assert len(exposed.splitlines()) < 8000
    assert value(exposed, "faults_total", kind="policy") == 5000
    assert not counts.parts


def test_reports_that_nobody_fetches_are_forgotten():
    counts = metrics()
    for n in range(REPORTS + 100):
        counts.begin(f"r{n}.", RequestOptions(report=True), "marginal")
        counts.end(f"r{n}.")
    assert len(counts.reports) == REPORTS
    assert counts.take_report("r5.") is None
    assert counts.take_report(f"r{REPORTS}.") is not None
    assert counts.take_report("") is None


def test_engines_are_told_apart():
    first, second = metrics(), metrics()
    done = run(first), run(second, seed=5)
    exposed = text(first, second)
    for engine in (0, 1):
        counted = value(exposed, "tokens_emitted_total", engine=str(engine), model_name="moe")
        assert counted == done[engine]["emitted"]


def test_histograms_hold_every_observation_once():
    counts = metrics()
    run(counts)
    for n in range(4):
        counts.end(f"r{n}")
    exposed = text(counts)
    assert value(exposed, "utility_measured_count") == 4
    assert value(exposed, "utility_measured_bucket", le="+Inf") == 4
    assert value(exposed, "step_time_ratio_count") == 199  # nothing is expected of the first
    assert math.isfinite(value(exposed, "utility_measured_sum"))


def test_a_line_for_the_log_says_what_happened_since_the_last():
    counts = metrics()
    assert in_words(Totals(), counts.totals, 0) is None
    done = run(counts)
    line = in_words(Totals(), counts.totals, 4)
    assert line is not None
    assert f"drafts in {1 - done['off'] / 800:.0%} of steps" in line
    assert f"{done['accepted'] / done['verified']:.0%} accepted" in line
    assert "times as fast as without" in line
    assert in_words(counts.totals, counts.totals, 4) is None


def test_the_docs_list_what_is_exported():
    rows: dict[str, tuple[str, str, str]] = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith(f"| `{PREFIX}"):
            name, kind, labels, said, _ = (
                cell.replace("`", "").strip() for cell in line.split("|")[1:]
            )
            rows[name.removeprefix(PREFIX)] = (kind, labels, said)
    wanted: dict[str, Any] = {
        name + ("_total" if family.kind == "counter" else ""): (
            family.kind,
            ", ".join(family.labels),
            family.help,
        )
        for name, family in FAMILIES.items()
    }
    assert rows == wanted
