"""The report: what it says follows from the rows, and a browser shows it on screens and phones."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moecascade.errors import ConfigError
from moecascade.evaluation import results
from moecascade.evaluation.report import charts, speedups, tables
from moecascade.evaluation.report import page as reporting
from moecascade.evaluation.report.analysis import Analysis, analyse
from moecascade.evaluation.report.headline import Number, headline
from moecascade.evaluation.report.roles import HINDSIGHT
from moecascade.evaluation.report.speedups import compare
from moecascade.evaluation.report.statistics import Speedup
from moecascade.evaluation.request_record import AtK, Engine, Row
from tests.browser import dumped
from tests.rows import ENGINE, ROW, row

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
    times = [50 * 0.02 * noise, 50 * 0.02 * COST[k] * noise]
    at = (
        AtK(0, 50, 50, times[0], 49, 49, 49.0, 0.05),
        AtK(k, 50, emitted - 50, times[1], 50, emitted - 50, emitted - 52.0, 0.08),
    )
    seconds = sum(times)
    engine = Engine(
        steps=100,
        emitted=emitted,
        drafted=50 * k,
        k_total=50 * k,
        steps_at_0=50 if k else 100,
        seconds=seconds,
        controller_seconds=100 * 40e-6,
        handover_seconds=0.03 * seconds,
        by_k=at if k else (AtK(0, 100, 100, seconds, 99, 99),),
        series=tuple((k * (i % 2), 1 + k * (i % 2), 0.02, 1.1) for i in range(40)),
    )
    return replace(
        ROW,
        policy=policy,
        task=task,
        prompt=prompt,
        temperature=temperature,
        tokens=emitted + 1,
        decoded=emitted,
        decode_seconds=seconds,
        engine=None if policy == "vllm" else engine,  # its steps are not logged
    )


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
    dense = [replace(r, model="dense") for r in made]
    crowd = [
        replace(
            r, concurrency=4, block=f"{r.policy}-{r.prompt[-1]}", block_seconds=r.decode_seconds
        )
        for r in made
        if r.temperature == 0 and r.policy in ("off", "marginal")
    ]
    return [*made, *dense, *crowd]


@pytest.fixture(scope="module")
def other(rows: list[Row]) -> list[Row]:
    """A run that varies a policy's settings."""
    return [
        replace(r, run="f0000000", policy=policy)
        for r in rows
        for policy in ("off", "cascade", "cascade[backoff=1]")
        if r.policy == policy.partition("[")[0] and (r.model, r.concurrency) == ("local", 1)
    ]


def kept(rows: list[Row], **arguments: Any) -> results.Results:
    return results.collect(
        "bench",
        arguments={"models": ["local"], "policies": list(POLICIES), "seed": 0, **arguments},
        models=[{"name": "local"}, {"name": "dense"}],
        servers=[],
        rows=[results.plain(row) for row in rows],
        summary=[],
    )


@pytest.fixture(scope="module")
def analysis(rows: list[Row]) -> Analysis:
    return analyse(rows)


def over(analysis: Analysis, policy: str, other: str, at_once: int = 1) -> Speedup | None:
    """The comparison of that name."""
    of = {(c.policy, c.over, c.concurrency): c.speedup for c in analysis.main.comparisons}
    return of.get((policy, other, at_once))


def number(analysis: Analysis, what: str) -> Number:
    """The one line of the first table that begins so."""
    (found,) = [of for of in headline(analysis) if of.what.startswith(what)]
    return found


# ---- what is analysed ----------------------------------------------------------------------------


def test_step_times_are_over_the_same_prompts_without_drafts(analysis: Analysis) -> None:
    assert list(analysis.diagnostics.step_times) == ["local", "dense"]
    for curve in analysis.diagnostics.step_times.values():
        assert [at.k for at in curve] == [0, 1, 3, 8]
        for at in curve:
            assert at.cost == pytest.approx(COST[at.k], rel=0.05)
            assert at.low <= at.cost <= at.high


def test_a_k_that_was_hardly_seen_or_not_timed_is_left_out() -> None:
    def with_steps(*by_k: AtK) -> Row:
        return replace(ROW, policy="cascade", engine=replace(ENGINE, by_k=by_k))

    plain, rare = AtK(0, 96, 96, 1.92, 95, 95), AtK(2, 4, 8, 0.2, 4, 8)
    untimed, often = AtK(3, 90, 90, None, 90, 90), AtK(4, 90, 90, 3.6, 90, 90)
    found = analyse([ROW, with_steps(plain, rare, untimed, often)]).diagnostics
    assert [(at.k, round(at.cost, 6)) for at in found.step_times["local"]] == [(0, 1.0), (4, 2.0)]
    # All of a request's time is unknown where some of it is: no point of it among the others'.
    assert found.k_shares["cascade"][3] == pytest.approx(90 / 280)


def test_utility_is_the_speed_up_where_users_see_what_the_engine_measures(
    rows: list[Row], analysis: Analysis
) -> None:
    found = analysis.diagnostics
    assert len(found.utility) == 2 * 2 * 3 * 6  # models, temperatures, tasks, policies with steps
    assert found.r_squared == pytest.approx(1.0, abs=1e-3)
    # A user who waits for something else as well breaks it.
    slow = [
        replace(row, decode_seconds=2 * row.decode_seconds) if row.policy == "static:8" else row
        for row in rows
        if row.concurrency == 1
    ]
    squared = analyse(slow).diagnostics.r_squared
    assert squared is not None
    assert squared < 0.9


def test_foresight_is_kept_apart_by_drafts(analysis: Analysis) -> None:
    none, eight = analysis.diagnostics.calibration["marginal"]
    assert (none.k, none.expected, none.time_error) == (0, None, 0.05)
    assert (eight.k, eight.time_error) == (8, 0.08)
    assert eight.expected is not None
    assert eight.accepted is not None
    assert eight.accepted - eight.expected == pytest.approx(2 / 50 / 8)


def test_overhead_and_shares_of_k_are_of_all_steps(analysis: Analysis) -> None:
    found = analysis.diagnostics
    assert found.k_shares["static:8"] == {0: 0.5, 8: 0.5}
    assert "vllm" not in found.k_shares  # its steps are not known
    assert "vllm" not in found.overheads
    assert found.overheads["off"].handover == pytest.approx(0.03)
    assert found.overheads["off"].deciding == pytest.approx(40e-6 / 0.02, rel=0.05)


def test_a_comparison_is_of_the_pairs_that_both_ran(rows: list[Row]) -> None:
    same = compare(rows, "static:8", "static:8")
    assert same is not None
    assert (same.value, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    ahead, behind = compare(rows, "static:3", "static:1"), compare(rows, "static:1", "static:3")
    assert ahead is not None
    assert behind is not None
    # The other way round, but for the weights of the pairs.
    assert ahead.value == pytest.approx(1 / behind.value, rel=0.05)
    assert compare(rows, "static:3", "nobody") is None
    assert compare([], "static:3", "static:1") is None


def test_ours_are_compared_with_all_others_in_their_own_crowd(
    rows: list[Row], analysis: Analysis
) -> None:
    single = [row for row in rows if row.concurrency == 1]
    for other in POLICIES:
        expected = None if other == "marginal" else compare(single, "marginal", other)
        assert over(analysis, "marginal", other) == expected
    assert over(analysis, "off", "vllm") == compare(single, "off", "vllm")
    crowd = [row for row in rows if row.concurrency == 4]
    assert over(analysis, "marginal", "off", 4) == compare(crowd, "marginal", "off")
    # In hindsight a K can be chosen where several ran, and nothing is better than the best.
    best = over(analysis, "marginal", HINDSIGHT)
    assert best is not None
    assert best.value == min(
        of.value for k in (1, 3, 8) if (of := over(analysis, "marginal", f"static:{k}"))
    )
    assert over(analysis, "marginal", HINDSIGHT, 4) is None


def test_runs_that_vary_settings_are_kept_apart(rows: list[Row], other: list[Row]) -> None:
    whole, alone = analyse([*rows, *other]), analyse(rows)
    assert whole.main == alone.main
    assert whole.diagnostics == alone.diagnostics
    assert {cell.policy for cell in whole.varied.cells} == {"off", "cascade", "cascade[backoff=1]"}
    assert alone.varied.cells == ()
    only = analyse(other)
    assert only.main.cells == ()
    assert only.varied == whole.varied


# ---- what is said --------------------------------------------------------------------------------


def test_the_worst_workload_is_the_worst_however_few_its_prompts() -> None:
    few = [row(f"code-{i}", policy, 10, 1.0) for i in range(4) for policy in ("off", "cascade")]
    alone = [row("tools-1", "off", 10, 1.0), row("tools-1", "cascade", 10, 2.0)]
    worst = number(analyse([*few, *alone]), "cascade: worst workload")
    assert (worst.value, worst.low, worst.behind) == (0.5, None, "tools, local")
    (line,) = tables.first([worst]).lines
    assert str(line[1]) == "100.0% slower"  # it takes twice the time


def test_headline_numbers_that_compare_policies_are_of_one_request_at_a_time(
    rows: list[Row],
) -> None:
    """In a crowd few policies ran, and a block weighs as much as many requests."""
    alone = [row for row in rows if row.concurrency == 1]
    crowd = [
        replace(row, concurrency=4, block=row.policy, block_seconds=60.0)
        for row in alone
        if row.policy in ("off", "vllm", "cascade", "static:3")
    ]
    assert len(headline(analyse(alone))) > 8
    assert headline(analyse([*alone, *crowd])) == headline(analyse(alone))


def test_a_headline_number_says_when_it_is_within_the_noise() -> None:
    seconds = {"off": 1.0, "cascade": 1.0}
    rows = [row(f"code-{i}", p, 10, s) for i in range(8) for p, s in seconds.items()]
    rows += [row(f"code-{i}", "marginal", 10, 0.9 if i % 2 else 1.1) for i in range(8)]
    (line,) = tables.first([number(analyse(rows), "marginal over cascade")]).lines
    assert "within the noise" in str(line[2])
    sure = [replace(r, decode_seconds=0.5) if r.policy == "marginal" else r for r in rows]
    (line,) = tables.first([number(analyse(sure), "marginal over cascade")]).lines
    assert [str(entry) for entry in line[1:3]] == [
        "+100.0% (+100.0% to +100.0%)",
        "8 pairs of 8 prompts",
    ]


@pytest.fixture(scope="module")
def made(rows: list[Row], other: list[Row]) -> reporting.Report:
    return reporting.build([kept(rows), kept(other, flags=["--max-model-len", "4096"])])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, made: reporting.Report) -> Path:
    """The report as a user gets it, written by the command's own code."""
    out = tmp_path_factory.mktemp("report")
    written = reporting.write(made, out)
    assert written[0] == out / "report.html"
    assert all(path.stat().st_size > 500 for path in written)
    return written[0]


# ---- what is written -----------------------------------------------------------------------------


def test_a_number_is_the_same_in_the_terminal_in_markdown_and_on_the_page(
    made: reporting.Report, page: Path
) -> None:
    cell = next(
        cell
        for cell in made.analysis.main.cells
        if (cell.workload, cell.policy) == ("code", "static:3")
    )
    assert cell.speedup is not None
    low, high = cell.speedup.low, cell.speedup.high
    number, within = f"{cell.speedup.value:.2f}", f"{low:.2f} - {high:.2f}"
    screen = Console(file=StringIO(), width=120)
    screen.print(tables.terminal(tables.tasks([cell], "")))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for shown in (text, page.with_suffix(".md").read_text(encoding="utf-8")):
        assert f"{number} ({within})" in shown
    assert f"{number}<small>{within}</small>" in page.read_text(encoding="utf-8")


def test_the_terminal_cuts_no_name_at_eighty_columns(other: list[Row]) -> None:
    screen = Console(file=StringIO(), width=80)
    cells = [cell for cell in speedups.cells(other) if "+" not in cell.workload]
    screen.print(tables.terminal(tables.tasks(cells, "title", "note")))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "cascade[backoff=1]" in text
    assert "…" not in text


def test_every_chart_of_the_evaluation_is_there(rows: list[Row], other: list[Row]) -> None:
    names = {chart.name for chart in charts.charts(analyse([*rows, *other]))}
    assert names == {
        "overview",
        "step-times",
        "utility",
        "course",
        "k-shares",
        *(f"speedups-{at}" for at in ("local-t0", "local-t08", "dense-t0", "dense-t08")),
        *(f"settings-{at}" for at in ("local-t0", "local-t08")),
    }


def test_the_page_has_a_table_for_every_question(made: reporting.Report, page: Path) -> None:
    titles = [table.title for table in made.speedups]
    assert titles[0] == "All tasks together"
    assert len(titles) == 1 + 4 + 1 + 2  # of all, each condition, crowds, the other settings
    assert "Several requests at once, all tasks together" in titles
    assert titles[-2:] == [
        "Other settings: local, temperature 0",
        "Other settings: local, temperature 0.8",
    ]
    assert "--max-model-len 4096" in made.speedups[-1].note
    assert [table.title for table in made.others] == [
        "Ours over the others",
        "Ours over other settings of them",
        "What cascade expects, and what comes",
        "What marginal expects, and what comes",
    ]
    text = page.read_text(encoding="utf-8")
    for table in (*made.speedups, *made.others):
        assert table.title in text
    assert "cascade with backoff = 1" in text  # what a spec with settings means
    assert "moecascade bench --models local --policies off,vllm," in text


def test_a_run_that_is_repeated_is_compared_with_its_own_baseline(rows: list[Row]) -> None:
    slow = [
        replace(r, decode_seconds=3 * r.decode_seconds, block_seconds=3 * r.block_seconds)
        for r in rows
    ]
    once, thrice = (
        reporting.build(found).analysis
        for found in ([kept(rows)], [kept(rows), kept(slow), kept(rows)])
    )
    assert thrice.requests == 3 * once.requests
    for cell, again in zip(once.main.cells, thrice.main.cells, strict=True):
        assert (again.condition, again.policy, again.workload) == (
            cell.condition,
            cell.policy,
            cell.workload,
        )
        assert cell.speedup is not None
        assert again.speedup is not None
        assert again.speedup.pairs == 3 * cell.speedup.pairs
        assert again.speedup.value == pytest.approx(cell.speedup.value)


def test_results_without_a_baseline_or_of_another_kind_are_refused(
    tmp_path: Path, rows: list[Row]
) -> None:
    with pytest.raises(ConfigError, match="no results in"):
        reporting.load([tmp_path])
    with pytest.raises(ConfigError, match="another version"):
        reporting.build([replace(kept([]), rows=[{"request": "only"}])])
    with pytest.raises(ConfigError, match="'off'"):
        reporting.build([kept([row for row in rows if row.policy == "cascade"])])


def test_a_chart_is_drawn_with_missing_values_left_out(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    rows = [row("code-1", "off", 10, 1.0), row("math-1", "off", 0, 0.0)]
    rows += [row("code-1", "static:3", 10, 0.5), row("math-1", "static:3", 0, 0.0)]
    panels = {cell.workload: [cell] for cell in speedups.cells(rows)}
    path = tmp_path / "charts" / "demo.png"
    figure = charts.speedups(panels, narrow=False, each=True)
    charts.save(figure, path, "Title " * 30, "Caption " * 60)
    pixels = image.imread(path)
    height, width, _ = pixels.shape
    assert len(figure.texts) == 2  # title and caption: nothing is cut at an edge
    for text in figure.texts:
        box = text.get_window_extent()  # as it was drawn
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    assert pixels.std() > 0.05  # something is on it


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
    shown, console = dumped(frame.as_uri(), page.parent / f"profile-{width}")
    assert console == []
    match = re.search(r"FACTS(\{.*?\})", shown)
    assert match, shown[:500]
    facts = json.loads(match.group(1).replace("&quot;", '"'))
    assert facts["width"] == width
    assert facts["page"] <= width  # nothing sticks out: wide tables scroll within themselves
    assert facts["plots"] == text.count('<div class="wide">')
    assert facts["marks"] > 10
    assert facts["texts"] > 100
    assert facts["text"] >= least
    assert facts["body"] >= 15
    assert facts["fetched"] == 0
