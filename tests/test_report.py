"""The report: what it says follows from the rows, and a browser shows it on screens and phones."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moecascade.cli.demo import table
from moecascade.errors import ConfigError
from moecascade.evaluation import results
from moecascade.evaluation.report import diagnostics
from moecascade.evaluation.report import page as reporting
from moecascade.evaluation.report.diagnostics import r_squared, ratio, step_times, utility_points
from moecascade.evaluation.report.headline import findings
from moecascade.evaluation.report.speedups import best_static, condition_of, summarise
from moecascade.evaluation.request_record import AtK, Row
from moecascade.evaluation.workloads import ALL
from tests.test_bench import ROW

POLICIES = ("off", "vllm", "static:1", "static:3", "static:8", "cascade", "marginal", "bandit")
COST = {0: 1.0, 1: 1.3, 3: 1.7, 8: 2.4}
K_OF = {"static:1": 1, "static:3": 3, "static:8": 8, "cascade": 3, "marginal": 8, "bandit": 1}
ACCEPTANCE = {"code": 0.8, "math": 0.4, "extraction": 0.9}


def measured(
    policy: str, task: str, prompt: str, rng: random.Random, temperature: float = 0.0
) -> Row:
    """A request of 100 steps, half of them with drafts, on a machine with some noise."""
    k = K_OF.get(policy, 0)
    right = sum(ACCEPTANCE[task] ** j for j in range(1, k + 1)) * (1 - temperature / 2)
    emitted = 100 + round(50 * right)
    noise = rng.lognormvariate(0, 0.03)
    at = [AtK(0, 50, 50, 50 * 0.02 * noise, 50.0, 0.05)]
    at += [AtK(k, 50, emitted - 50, 50 * 0.02 * COST[k] * noise, emitted - 52.0, 0.08)]
    seconds = sum(part.seconds for part in at)
    seen = replace(
        ROW,
        policy=policy,
        task=task,
        prompt=prompt,
        temperature=temperature,
        tokens=emitted + 1,
        decoded=emitted,
        decode_seconds=seconds,
        steps=100,
        emitted=emitted,
        drafted=50 * k,
        k_total=50 * k,
        steps_at_0=50 if k else 100,
        step_seconds=seconds,
        controller_seconds=100 * 40e-6,
        handover_seconds=0.03 * seconds,
        by_k=tuple(at) if k else (AtK(0, 100, 100, seconds),),
        drafted_at=(50,) * k,
        accepted_at=tuple(round(50 * ACCEPTANCE[task] ** (j + 1)) for j in range(k)),
        series=tuple((k * (i % 2), 1 + k * (i % 2), 0.02, 1.1) for i in range(40)),
    )
    if policy == "vllm":  # its steps are not logged
        return replace(seen, steps=0, emitted=0, step_seconds=0.0, by_k=(), series=())
    return seen


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rng = random.Random(0)
    made = [
        measured(policy, task, f"{task}-{i}", rng, temperature)
        for temperature in (0.0, 0.8)
        for task in ACCEPTANCE
        for i in range(4)
        for policy in POLICIES
    ]
    dense = [replace(r, model="dense", step_seconds=r.step_seconds) for r in made]
    crowd = [
        replace(
            r,
            concurrency=4,
            block=f"mc-{r.run}-{r.policy}-{r.prompt[-1]}",
            block_seconds=r.decode_seconds,
        )
        for r in made
        if r.temperature == 0 and r.policy in ("off", "marginal")
    ]
    return [*made, *dense, *crowd]


@pytest.fixture(scope="module")
def found(rows: list[Row]) -> results.Results:
    return results.collect(
        "bench",
        arguments={"models": ["local", "dense"], "policies": list(POLICIES), "seed": 0},
        models=[{"name": "local"}, {"name": "dense"}],
        servers=[],
        rows=[results.plain(row) for row in rows],
        summary=[],
    )


# ---- what is analysed ----------------------------------------------------------------------------


def test_step_times_are_over_the_same_prompts_without_drafts(rows: list[Row]) -> None:
    curve = step_times(row for row in rows if row.model == "local")
    assert [at.k for at in curve] == [0, 1, 3, 8]
    for at in curve:
        assert at.cost == pytest.approx(COST[at.k], rel=0.05)
        assert at.low <= at.cost <= at.high


def test_a_k_that_was_hardly_seen_is_left_out() -> None:
    base = replace(ROW, by_k=(AtK(0, 100, 100, 2.0),))
    rare = replace(ROW, policy="cascade", by_k=(AtK(0, 96, 96, 1.92), AtK(2, 4, 8, 0.2)))
    assert [at.k for at in step_times([base, rare])] == [0]


def test_utility_is_the_speed_up_where_users_see_what_the_engine_measures(rows: list[Row]) -> None:
    points = utility_points(rows)
    assert len(points) == 2 * 2 * 3 * 6  # models, temperatures, tasks, policies with steps
    assert r_squared(points) == pytest.approx(1.0, abs=1e-3)
    # A user who waits for something else as well breaks it.
    slow = [
        replace(row, decode_seconds=2 * row.decode_seconds) if row.policy == "static:8" else row
        for row in rows
    ]
    found = r_squared(utility_points(slow))
    assert found is not None
    assert found < 0.9


def test_a_ratio_is_of_the_pairs_that_both_ran(rows: list[Row]) -> None:
    found = ratio(rows, "static:8", "static:8")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    ahead, behind = ratio(rows, "static:3", "static:1"), ratio(rows, "static:1", "static:3")
    assert ahead is not None
    assert behind is not None
    # The other way round, but for the weights of the pairs.
    assert ahead.value == pytest.approx(1 / behind.value, rel=0.05)
    assert ratio(rows, "static:3", "nobody") is None
    assert ratio([], "static:3", "static:1") is None


def test_a_short_runs_ratio_has_an_interval_all_the_same(rows: list[Row]) -> None:
    first: dict[tuple[str, float, str], str] = {}
    for row in rows:
        first.setdefault((row.model, row.temperature, row.task), row.prompt)
    short = [row for row in rows if first[row.model, row.temperature, row.task] == row.prompt]
    found = ratio(short, "static:3", "static:1")
    assert found is not None
    assert found.pairs == len(first)  # one for each task under each condition
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    # With one task under one condition there is nothing to draw from.
    (one,) = {(r.model, r.temperature) for r in short[:1]}
    alone = [r for r in short if (r.model, r.temperature) == one and r.task == short[0].task]
    single = ratio(alone, "static:3", "static:1")
    assert single is not None
    assert (single.pairs, single.low) == (1, None)


def test_the_best_static_k_is_chosen_for_each_condition(rows: list[Row]) -> None:
    best = diagnostics.hindsight(rows)
    assert {c.concurrency for c in best} == {1}
    for condition, spec in best.items():
        speed = {
            cell.policy: cell.speedup or 0.0
            for cell in summarise(rows)
            if (cell.condition, cell.workload) == (condition, ALL)
            and cell.policy.startswith("static:")
        }
        assert len(speed) == 3
        assert spec == max(speed, key=speed.__getitem__)
    chosen = diagnostics.with_hindsight(rows)
    assert {row.policy for row in chosen} == {diagnostics.HINDSIGHT}
    assert len(chosen) == sum(
        row.concurrency == 1 and row.policy in best.values()
        for row in rows
        if best.get(condition_of(row)) == row.policy
    )


def test_static_ks_are_compared_on_what_all_of_them_were_asked(rows: list[Row]) -> None:
    best = diagnostics.hindsight(rows)
    # A further run, in which one of them met easier prompts: a thousand times faster.
    further = [
        replace(
            row,
            request="mc-ffffffff-00001",
            decode_seconds=row.decode_seconds / (1000 if row.policy == "static:1" else 1),
        )
        for row in rows
        if row.policy in ("off", "static:1", "cascade")
    ]
    assert {row.run for row in further} == {"ffffffff"}
    assert diagnostics.hindsight([*rows, *further]) == best
    assert "static:1" in diagnostics.hindsight(further).values()  # alone it is what there is
    # What was chosen is compared with in both runs.
    chosen = diagnostics.with_hindsight([*rows, *further])
    assert len(chosen) >= len(diagnostics.with_hindsight(rows))


def test_what_a_policy_saw_is_compared_with_what_came(rows: list[Row]) -> None:
    told = [replace(row, utility=1.5) if row.policy == "marginal" else row for row in rows]
    points = diagnostics.foreseen(told, "marginal")
    assert {(p.policy, round(p.utility, 9)) for p in points} == {("marginal", 1.5)}
    measured = {
        (p.condition, p.task): p.speedup for p in utility_points(rows) if p.policy == "marginal"
    }
    assert {(p.condition, p.task): p.speedup for p in points} == pytest.approx(measured)
    assert diagnostics.foreseen(rows, "marginal") == []  # where nothing was said there is no point


def test_acceptance_is_by_place_in_the_draft(rows: list[Row]) -> None:
    curve = diagnostics.acceptance(r for r in rows if r.task == "code" and r.policy == "static:8")
    assert len(curve) == 8
    assert curve == pytest.approx([0.8**j for j in range(1, 9)], abs=0.02)


def test_foresight_is_kept_apart_by_drafts(rows: list[Row]) -> None:
    none, eight = diagnostics.calibration(rows, "marginal")
    assert (none.k, none.expected, none.time_error) == (0, None, 0.05)
    assert (eight.k, eight.time_error) == (8, 0.08)
    assert eight.expected is not None
    assert eight.accepted is not None
    assert eight.accepted - eight.expected == pytest.approx(2 / 50 / 8)


# ---- what is written -----------------------------------------------------------------------------


def test_every_plot_of_the_evaluation_is_there(found: results.Results) -> None:
    names = {picture.name for picture in reporting.build([found]).pictures}
    wanted = {
        "overview",
        "step-times",
        "speedups-local-t0",
        "speedups-local-t08",
        "speedups-dense-t0",
    }
    wanted |= {"utility", "acceptance", "course", "k-shares", "foresight", "throughput-local"}
    assert wanted <= names


def test_runs_that_vary_settings_have_tables_of_their_own(found: results.Results) -> None:
    other = [
        {**values, "request": values["request"].replace("mc-", "mc-f", 1)[:-1], "policy": policy}
        for values in found.rows
        for policy in ("off", "cascade", "cascade[backoff=1]")
        if values["policy"] == policy.partition("[")[0]
        and (values["model"], values["concurrency"]) == ("local", 1)
    ]
    whole = reporting.build([found, replace(found, rows=other)])
    alone = reporting.build([found])
    assert whole.cells == alone.cells
    assert {cell.policy for cell in whole.varied} == {"off", "cascade", "cascade[backoff=1]"}
    titles = [table.title for table in reporting.tables(whole)]
    assert titles[0] == "All tasks together"
    assert titles[-1] == "Other settings: local, temperature 0.8"
    assert "settings-local-t08" in {picture.name for picture in whole.pictures}
    (line,) = [f.ours for f in whole.findings if "without back-off" in f.what]
    assert "K = 0 in" in line
    assert "; worst workload " in line
    page = reporting.html(whole)
    assert "cascade without back-off (backoff = 1)" in page  # what a spec with settings means
    assert "test-and-set on measured utility" in page
    console = Console(file=StringIO(), width=120)
    console.print(table(whole.varied, "", ""))
    assert isinstance(console.file, StringIO)
    assert "cascade[backoff=1]" in console.file.getvalue()
    only = reporting.build([replace(found, rows=other)])
    assert [table.title for table in reporting.tables(only)] == titles[-2:]


def test_a_run_that_is_repeated_is_compared_with_its_own_baseline(found: results.Results) -> None:
    slow = [
        {
            **row,
            **{name: 3 * row[name] for name in ("decode_seconds", "step_seconds", "block_seconds")},
            "by_k": [{**at, "seconds": 3 * at["seconds"]} for at in row["by_k"]],
        }
        for row in found.rows
    ]
    once = reporting.build([found])
    twice = reporting.build([found, replace(found, rows=slow), found])
    assert len(twice.rows) == 3 * len(once.rows)
    for cell, again in zip(once.cells, twice.cells, strict=True):
        assert (again.condition, again.policy, again.workload) == (
            cell.condition,
            cell.policy,
            cell.workload,
        )
        assert len(again.each) == 3 * len(cell.each)
        assert again.speedup == pytest.approx(cell.speedup)


def test_the_summary_names_what_was_measured_and_how_to_repeat_it(found: results.Results) -> None:
    text = reporting.markdown(reporting.build([found]))
    cells = {(c.policy, c.workload): c for c in summarise(reporting.build([found]).rows)}
    speedup = cells["static:3", "code"].speedup
    assert f"{speedup:.2f}" in text
    for words in (
        "utility against measured speed-up",
        "0.994",
        "vLLM without us",
        "3.0% of a step until",
        "| `bandit` |",
    ):
        assert words in text
    assert "moecascade bench --models local,dense --policies off,vllm," in text


def test_the_worst_workload_is_the_worst_however_few_its_prompts(rows: list[Row]) -> None:
    """One with an interval is named beside it, not in its place."""
    few = [row for row in rows if row.policy in ("off", "cascade") and row.concurrency == 1]
    first = next(row for row in few if row.policy == "off" and row.task == "math")
    alone = [
        replace(first, task="tools", policy="off"),
        replace(first, task="tools", policy="cascade", decode_seconds=2 * first.decode_seconds),
    ]
    made = findings([*few, *alone], [*few, *alone], summarise([*few, *alone]), [], [])
    (line,) = [f.ours for f in made if f.what.startswith("cascade: worst workload")]
    assert line.startswith("100.0% slower (tools")  # it takes twice the time
    assert "too few prompts for an interval" in line
    assert "; with an interval: " in line


def test_findings_that_compare_policies_are_of_one_request_at_a_time(rows: list[Row]) -> None:
    """In a crowd few policies ran, and a block weighs as much as many requests."""
    alone = [row for row in rows if row.concurrency == 1]
    crowd = [
        replace(row, concurrency=4, block=row.policy, block_seconds=60.0)
        for row in alone
        if row.policy in ("off", "vllm", "cascade", "static:3")
    ]

    def said(of: list[Row]) -> dict[str, str]:
        return {f.what: f.ours for f in findings(of, of, summarise(of), [], [])}

    first, both = said(alone), said([*alone, *crowd])
    for what in first:
        assert "at once" in what or both[what] == first[what], what
    assert "4 at once: " in both["cascade: throughput against no speculation"]
    # With one fixed K there was no table to choose.
    assert "cascade: throughput against the best table of K" not in both
    more = [replace(r, policy="static:8", block="8") for r in crowd if r.policy == "static:3"]
    slower = [replace(row, block_seconds=90.0) for row in more]
    tabled = said([*alone, *crowd, *slower])["cascade: throughput against the best table of K"]
    assert tabled.startswith("4 at once: +0.0%")  # all but the slower K took equally long


def test_the_best_table_is_of_batch_sizes_at_which_there_was_a_choice(rows: list[Row]) -> None:
    alone = [r for r in rows if (r.concurrency, r.model, r.temperature) == (1, "local", 0)]
    crowd = [
        replace(row, concurrency=4, block=row.policy, block_seconds=60.0)
        for row in alone
        if row.policy in ("off", "static:3")
    ]
    both = [*alone, *crowd]
    made = findings(both, both, summarise(both), [], [])
    (line,) = [f.ours for f in made if f.what.startswith("the best table")]
    best = best_static([c for c in summarise(alone) if c.workload == ALL])
    assert best is not None
    assert line == f"local, T = 0: K = {best.policy.removeprefix('static:')}"


def test_a_finding_says_when_it_is_within_the_noise(rows: list[Row]) -> None:
    same = [row for row in rows if row.policy in ("off", "cascade") and row.concurrency == 1]
    rng = random.Random(1)
    twin = [
        replace(row, policy="marginal", decode_seconds=row.decode_seconds * rng.choice((0.9, 1.1)))
        for row in same
        if row.policy == "cascade"
    ]
    made = findings([*same, *twin], [*same, *twin], summarise([*same, *twin]), [], [])
    (line,) = [f.ours for f in made if f.what == "marginal over cascade"]
    assert "within the noise" in line


def test_results_without_a_baseline_or_of_another_kind_are_refused(
    tmp_path: Path, found: results.Results
) -> None:
    with pytest.raises(ConfigError, match="no results in"):
        reporting.load([tmp_path])
    broken = replace(found, rows=[{"request": "only"}])
    with pytest.raises(ConfigError, match="another version"):
        reporting.build([broken])
    only = [values for values in found.rows if values["policy"] == "cascade"]
    with pytest.raises(ConfigError, match="'off'"):
        reporting.build([replace(found, rows=only)])


# ---- what is seen --------------------------------------------------------------------------------

MEASURE = """
<script>
window.addEventListener("load", () => {
  const shown = e => e.getClientRects().length > 0 && e.getBoundingClientRect().width > 0;
  const svgs = [...document.querySelectorAll("svg")].filter(shown);
  const scale = s => s.getBoundingClientRect().width / s.viewBox.baseVal.width;
  const sizes = svgs.flatMap(s => [...s.querySelectorAll("text")].map(
    t => parseFloat(getComputedStyle(t).fontSize) * scale(s)));
  const facts = {
    width: innerWidth, page: document.documentElement.scrollWidth, plots: svgs.length,
    marks: Math.min(...svgs.map(s => s.querySelectorAll("path, use").length)),
    text: Math.min(...sizes), texts: sizes.length,
    body: parseFloat(getComputedStyle(document.body).fontSize),
    fetched: performance.getEntriesByType("resource").filter(
      e => !e.name.startsWith("data:")).length,
  };
  document.title = "FACTS" + JSON.stringify(facts);
});
</script>
"""


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        lacking = "no Chromium; on Debian: apt install chromium"
        if os.environ.get("CI"):
            pytest.fail(lacking)
        pytest.skip(lacking)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, found: results.Results) -> Path:
    """The report as a user gets it, written by the command's own code."""
    out = tmp_path_factory.mktemp("report")
    written = reporting.write(reporting.build([found]), out)
    assert written[0] == out / "report.html"
    assert all(path.stat().st_size > 500 for path in written)
    return written[0]


@pytest.mark.parametrize(("width", "least"), [(400, 8.0), (1280, 9.0)])
def test_a_browser_shows_it_on_phones_and_screens(page: Path, width: int, least: float) -> None:
    copy = page.with_name(f"measured-{width}.html")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    # A window is at least 500 pixels wide in headless Chromium: a frame is as narrow as it is told.
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(
        f'<iframe id="f" src="{copy.name}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>f.onload = () => setTimeout(() => document.title = f.contentDocument.title, 300)"
        "</script>"
    )
    answer = subprocess.run(
        [
            browser(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--virtual-time-budget=4000",
            "--window-size=1400,1000",
            f"--user-data-dir={page.parent / f'profile-{width}'}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in answer.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    match = re.search(r"FACTS(\{.*?\})", answer.stdout)
    assert match, answer.stdout[:500]
    facts = json.loads(match.group(1).replace("&quot;", '"'))
    assert facts["width"] == width
    assert facts["page"] <= width  # nothing sticks out: wide tables scroll within themselves
    assert facts["plots"] == text.count('<div class="wide">')
    assert facts["marks"] > 10
    assert facts["texts"] > 100
    assert facts["text"] >= least
    assert facts["body"] >= 15
    assert facts["fetched"] == 0
