"""Replay: the same policies, on recorded text, with the arithmetic of speculation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from moecascade.core.marginal.rule import Marginal, MarginalSettings
from moecascade.core.step import RequestStep, Step
from moecascade.errors import ConfigError
from moecascade.replay.player import MIXTRAL_LIKE, ReplayConditions, play, summarise
from moecascade.telemetry import traces
from moecascade.telemetry.files import records
from moecascade.telemetry.traces import Trace
from tests.conftest import Answer

FREE = [1.0] * 9


def copies(seed: int = 0, length: int = 200) -> Trace:
    """A request that repeats its prompt: every draft is right."""
    rng = random.Random(seed)
    prompt = tuple(rng.sample(range(1000), 300))
    return Trace(f"copy-{seed}", "copy", prompt, prompt[:length])


def invents(seed: int = 0, length: int = 200) -> Trace:
    """A request whose pairs have occurred, but never go on as before: every draft is wrong."""
    rng = random.Random(seed)
    prompt, output = [], []
    for i in range(length):
        a, b = 10_000 + 2 * i, 10_001 + 2 * i
        prompt += [a, b, rng.randrange(1000)]
        output += [a, b, 2000 + i]
    return Trace(f"invent-{seed}", "invent", tuple(prompt), tuple(output[:length]))


def speedup(spec: str, trace: list[Trace], costs: Sequence[float], **more: float) -> float:
    return summarise(play(trace, spec, ReplayConditions(costs, **more))).speedup  # type: ignore[arg-type]


def test_without_drafts_a_token_takes_a_step() -> None:
    (outcome,) = play([copies()], "off", ReplayConditions(MIXTRAL_LIKE))
    assert (outcome.tokens, outcome.steps, outcome.time) == (199, 199, 199.0)
    assert outcome.speedup == 1.0


def test_right_drafts_emit_k_plus_1_tokens_at_their_cost() -> None:
    assert speedup("static:8", [copies()], MIXTRAL_LIKE) == pytest.approx(9 / 2.8, rel=0.06)
    assert speedup("static:3", [copies()], MIXTRAL_LIKE) == pytest.approx(4 / 1.95, rel=0.06)


def test_nothing_is_drafted_beyond_what_the_answer_has_room_for() -> None:
    (outcome,) = play([copies()], "static:8", ReplayConditions(MIXTRAL_LIKE))
    # Every draft is right, so none was verified for nothing.
    assert outcome.drafted + outcome.steps == outcome.tokens
    assert outcome.tokens % 9  # the last draft had to be cut


def test_wrong_drafts_cost_what_they_cost() -> None:
    (outcome,) = play([invents()], "static:3", ReplayConditions(MIXTRAL_LIKE))
    drafting = outcome.steps - outcome.off
    assert drafting > 50
    # The last draft is cut to two: the answer has room for no more.
    assert outcome.drafted == 3 * drafting - 1
    assert outcome.time == pytest.approx(outcome.off + 1.95 * (drafting - 1) + 1.68)
    assert outcome.tokens == 199


@pytest.mark.parametrize("spec", ["off", "static:4", "cascade", "marginal", "oracle"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_policy_emits_every_token(spec: str, batch: int) -> None:
    trace = [copies(1), invents(2), copies(3, 37), invents(4, 51)]
    outcomes = play(trace, spec, ReplayConditions(MIXTRAL_LIKE, noise=0.05, batch=batch))
    assert {o.trace.id: o.tokens for o in outcomes} == {t.id: len(t.output) - 1 for t in trace}


def test_the_oracle_is_never_beaten_without_noise() -> None:
    trace = [copies(1), invents(2), copies(3, 50)]
    best = speedup("oracle", trace, MIXTRAL_LIKE)
    for spec in ("off", "static:1", "static:3", "static:8", "cascade", "marginal"):
        assert speedup(spec, trace, MIXTRAL_LIKE) <= best + 1e-9


def test_the_same_seed_gives_the_same_result_and_another_gives_another() -> None:
    trace = [copies(i, 60) for i in range(4)] + [invents(i, 60) for i in range(4)]
    first = speedup("cascade", trace, MIXTRAL_LIKE, noise=0.05, seed=1)
    assert first == speedup("cascade", trace, MIXTRAL_LIKE, noise=0.05, seed=1)
    assert first != speedup("cascade", trace, MIXTRAL_LIKE, noise=0.05, seed=2)


def test_costs_beyond_the_curve_follow_the_expert_union() -> None:
    conditions = ReplayConditions(MIXTRAL_LIKE)
    costs = [conditions.cost(p) for p in range(1, 60)]
    assert costs[:9] == list(MIXTRAL_LIKE)
    assert all(a <= b for a, b in pairwise(costs))
    rises = [b - a for a, b in pairwise(costs[9:])]
    assert all(a >= b for a, b in pairwise(rises))  # experts run out


def test_marginal_uses_what_is_copied_and_leaves_what_is_not() -> None:
    trace = [t for i in range(6) for t in (copies(i), invents(i))]
    outcomes = play(trace, "marginal", ReplayConditions(MIXTRAL_LIKE, noise=0.05))
    found = summarise(outcomes).by_task
    assert found["copy"] > 2.5
    assert found["invent"] > 0.96


def test_marginal_with_free_drafts_is_as_good_as_the_longest_draft() -> None:
    trace = [t for i in range(4) for t in (copies(i), invents(i))]
    dense = [1 + 0.005 * k for k in range(9)]
    best = speedup("static:8", trace, dense)
    assert speedup("marginal", trace, dense) > 0.99 * best


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"costs": [1, 2]}, ["2 costs", "9 in all"]),
        ({"costs": [0.0] * 9}, ["cost 0"]),
        ({"noise": -1.0}, ["noise -1.0"]),
        ({"batch": 0}, ["batch 0"]),
        ({"seed": -1}, ["seed -1"]),
        ({"max_k": 0, "costs": [1.0]}, ["longest draft 0"]),
        ({"ngram_min": 5}, ["5 to 4"]),
    ],
)
def test_bad_conditions_are_refused(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ReplayConditions(**{"costs": FREE, **change})  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


def write(path: Path, trace: list[Trace]) -> Path:
    rows = [
        {"id": t.id, "task": t.task, "prompt_token_ids": t.prompt, "output_token_ids": t.output}
        for t in trace
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_prints_json_of_the_documented_form(
    cli: Callable[..., Answer], tmp_path: Path
) -> None:
    path = write(tmp_path / "t.jsonl", [copies(1), invents(2)])
    done = cli("replay", path, "--policies", "off,static:8,oracle", "--noise", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["tokens"]) == (2, 400)
    assert list(found["policies"]) == ["off", "static:8", "oracle"]
    off = found["policies"]["off"]
    assert off["by_task"] == {"copy": 1.0, "invent": 1.0}
    assert (off["speedup"], off["etr"], off["mean_k"], off["off_share"]) == (1.0, 1.0, 0.0, 1.0)
    assert found["policies"]["static:8"]["worst_request"] < 1
    table = cli("replay", path, "--policies", "static:8")
    assert "static:8" in table.stdout
    assert "speed-up" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such.jsonl"], ["no-such.jsonl", "cannot read"]),
        (["{path}", "--policies", "cascad"], ["'cascad'", "did you mean 'cascade'"]),
        (["{path}", "--cost", "1,x"], ["'1,x'"]),
        (["{path}", "--max-k", "9"], ["9 costs (--cost)", "10 in all"]),
        (["{path}", "--drafter", "eagle"], ["'eagle'", "ngram"]),
        (["{broken}"], ["line 1", "output_token_ids"]),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    cli: Callable[..., Answer], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    path = write(tmp_path / "t.jsonl", [copies(1)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "x"}\n')
    names = {"path": path, "broken": broken}
    done = cli("replay", *(a.format(**names) for a in arguments))
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr


def test_traces_are_read_with_blank_lines_and_extra_keys(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": 7, "task": "x", "prompt_token_ids": [1], "output_token_ids": [2, 3], "steps": []}
    empty = {**row, "output_token_ids": []}
    path.write_text(f"\n{json.dumps(row)}\n{json.dumps(empty)}\n")
    assert list(traces.read([path])) == [Trace("7", "x", (1,), (2, 3))]


def logged(path: Path, *, tokens: bool) -> list[dict[str, object]]:
    """Two requests served at once, one of them aborted; return their traces."""
    log = traces.TraceLog(path, tokens)
    log.begin("a", "code", (1, 2, 3))
    log.begin("b", "", (4,))
    first = (RequestStep("a", 0, 1, [5]), RequestStep("b", 0, 0), RequestStep("other", 0, 1, [9]))
    log.step(Step(None, False, first))
    log.step(Step(0.03, True, (RequestStep("a", 3, 2, [6, 7]), RequestStep("b", 0, 1, [8]))))
    log.end("a")
    log.end("b")
    log.end("never-begun")
    log.close()
    return [row for _, row in records(path)]


def test_live_traffic_becomes_traces_that_can_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "traces.jsonl"
    first, second = logged(path, tokens=True)
    assert first["steps"] == [
        {"drafted": 0, "emitted": 1, "seconds": None},
        {"drafted": 3, "emitted": 2, "seconds": 0.03},
    ]
    assert second["output_tokens"] == 1
    assert list(traces.read([path])) == [
        Trace("a", "code", (1, 2, 3), (5, 6, 7)),
        Trace("b", "", (4,), (8,)),
    ]


def test_what_was_said_is_kept_only_where_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    first, _ = logged(path, tokens=False)
    assert (first["prompt_tokens"], first["output_tokens"]) == (3, 3)
    assert first["prompt_token_ids"] is first["output_token_ids"] is None
    assert "[5" not in path.read_text()
    with pytest.raises(ConfigError, match="trace_tokens"):
        list(traces.read([path]))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_and_cuts_no_name(
    cli: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    columns: int,
) -> None:
    specs = ["off", "static:1", "cascade[backoff=1]", "marginal[crowd=0]", "survival-budget"]
    rows = [
        Trace(f"{task}-{i}", task, t.prompt, t.output)
        for task in ("code", "extraction", "math")
        for i, t in enumerate([copies(1, 40), invents(2, 40)])
    ]
    monkeypatch.setattr("tests.conftest.COLUMNS", columns)
    done = cli("replay", write(tmp_path / "t.jsonl", rows), "--policies", ",".join(specs))
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    for spec in specs:
        assert [line for line in lines if line.strip().startswith(f"{spec} ")], spec
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout


# ---- drafts that were recorded -------------------------------------------------------------------


def recorded(right: Sequence[int], length: int = 400, counts: bool = False) -> Trace:
    """A request of whose drafts of 8 tokens so many are right, in turn."""
    output = tuple(range(1, length + 1))
    drafts: list[tuple[int, ...] | int] = []
    for out in range(1, length):
        n = right[out % len(right)]
        drafts.append(n if counts else (*output[out : out + n], *[999_999] * (8 - n))[:8])
    return Trace("r", "model", (0,), output, tuple(drafts))


@pytest.mark.parametrize(("late", "counts"), [(False, False), (True, False), (True, True)])
def test_recorded_drafts_cost_a_pass_a_token(late: bool, counts: bool) -> None:
    traces = [recorded([8], counts=counts)]
    conditions = ReplayConditions(MIXTRAL_LIKE, recorded=True, pass_cost=0.1, late=late)
    for k in (1, 3, 8):
        found = summarise(play(traces, f"static:{k}", conditions))
        expected = (k + 1) * 1.1 / (MIXTRAL_LIKE[k] + 0.1 * k)
        assert found.speedup == pytest.approx(expected, rel=0.06)
    assert summarise(play(traces, "off", conditions)).speedup == 1.0


def test_drafts_of_which_only_a_count_is_known_cannot_be_seen() -> None:
    conditions = ReplayConditions(MIXTRAL_LIKE, recorded=True)
    with pytest.raises(ConfigError, match="replay with --late"):
        play([recorded([3], counts=True)], "marginal", conditions)


def test_wrong_drafts_are_paid_for() -> None:
    conditions = ReplayConditions(MIXTRAL_LIKE, recorded=True, pass_cost=0.1)
    found = summarise(play([recorded([0])], "static:3", conditions))
    assert found.speedup == pytest.approx(1.1 / (MIXTRAL_LIKE[3] + 0.3), rel=0.02)
    assert found.etr == 1.0


def test_a_model_drafts_as_many_as_it_is_told_one_step_before() -> None:
    """`marginal` drafts long where drafts are right, and one token where they are not."""
    conditions = ReplayConditions(MIXTRAL_LIKE, recorded=True, pass_cost=0.1)
    good = summarise(play([recorded([8], 2000)], "marginal", conditions))
    bad = summarise(play([recorded([0], 2000)], "marginal", conditions))
    assert good.speedup > 0.9 * 9 * 1.1 / (MIXTRAL_LIKE[8] + 0.8)
    assert bad.speedup > 0.97


@pytest.mark.parametrize("batch", [1, 4])
def test_the_oracle_knows_recorded_drafts_and_what_passes_cost(batch: int) -> None:
    rng = random.Random(5)
    traces = [recorded(rng.choices(range(9), k=40)) for _ in range(4)]
    conditions = ReplayConditions(MIXTRAL_LIKE, recorded=True, pass_cost=0.1, batch=batch)
    found = {
        spec: summarise(play(traces, spec, conditions)).speedup
        for spec in ("oracle", "static:1", "static:3", "static:8", "cascade", "marginal", "off")
    }
    assert max(found.values()) == found["oracle"]
    assert found["oracle"] > 1.02 * max(v for spec, v in found.items() if spec != "oracle")


def test_places_without_a_draft_go_on_without(tmp_path: Path) -> None:
    trace = Trace("r", "t", (0,), tuple(range(1, 50)), ((2, 3), (), (5,)))
    (outcome,) = play([trace], "static:4", ReplayConditions(FREE, recorded=True))
    # Two right of the first; with four tokens out there is none any more.
    assert (outcome.tokens, outcome.drafted) == (48, 2)


def test_drafts_are_read_from_traces(tmp_path: Path, cli: Callable[..., Answer]) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": "a", "task": "t", "prompt_token_ids": [1], "output_token_ids": [1, 2, 3, 4, 5]}
    path.write_text(json.dumps({**row, "drafts": [[2, 3], 1, [], [9]]}) + "\n")
    (trace,) = traces.read([path])
    assert trace.drafts == ((2, 3), 1, (), (9,))
    shown = cli("replay", path, "--drafter", "recorded", "--pass-cost", "0.1", "--late", "--json")
    assert shown.returncode == 0
    for wrong in (-1, "x", [-1], [[1]], True, None):
        path.write_text(json.dumps({**row, "drafts": [wrong]}) + "\n")
        with pytest.raises(ConfigError, match="drafts"):
            list(traces.read([path]))
    path.write_text(json.dumps(row) + "\n")
    shown = cli("replay", path, "--drafter", "recorded")
    assert (shown.returncode, "record --drafter" in shown.stderr) == (2, True)
    shown = cli("replay", path, "--pass-cost", "0.1")
    assert (shown.returncode, "has no passes" in shown.stderr) == (2, True)
    shown = cli("replay", path, "--drafter", "eagle")
    assert (shown.returncode, "ngram, recorded" in shown.stderr) == (2, True)


class Watched(Marginal):
    """`marginal`, of which every decode step is kept: its seconds and its tokens."""

    def __init__(self, settings: MarginalSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self.steps: list[tuple[float, int]] = []

    def observe(self, step: Step) -> None:
        super().observe(step)
        if step.seconds is not None:
            self.steps.append((step.seconds, sum(part.emitted for part in step.requests)))

    def rate(self, begin: int, end: int | None = None) -> float:
        """Tokens a second of some steps."""
        some = self.steps[begin:end]
        return sum(tokens for _, tokens in some) / sum(seconds for seconds, _ in some)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_model_drafter_that_collapses_is_left_alone_and_taken_up_again(
    seed: int, late: bool
) -> None:
    """Within 2% of no speculation from fifty steps on; half of the gain within two hundred."""
    rng = random.Random(seed)

    def draft(good: bool) -> int:
        n = 0
        while good and n < 8 and rng.random() < 0.8:
            n += 1
        return n

    cuts = [0, 1500, 2500, 5000]
    vocabulary = range(1000)  # so that a token tells nothing of whether it is right
    output = tuple(rng.choices(vocabulary, k=cuts[-1]))
    drafts = []
    for out in range(1, cuts[-1]):
        n = draft(good=not cuts[1] <= out < cuts[2])
        drafts.append((*output[out : out + n], *rng.choices(vocabulary, k=8 - n)))
    conditions = ReplayConditions(
        MIXTRAL_LIKE, noise=0.05, seed=seed, recorded=True, pass_cost=0.05, late=late
    )
    policy = Watched(MarginalSettings(), 8)
    play([Trace("r", "t", (0,), output, tuple(drafts))], policy, conditions)
    off = 1.0 / (0.02 * 1.05)  # tokens a second
    at, begins = 0, []
    for i, (_, tokens) in enumerate(policy.steps):
        begins += [i for cut in cuts[1:3] if at < cut <= at + tokens]
        at += tokens
    collapse, recovery = begins
    gain = policy.rate(0, collapse) / off - 1.0
    assert gain > 0.1
    assert policy.rate(collapse + 50, recovery) > 0.98 * off
    assert policy.rate(recovery + 200) / off - 1.0 > 0.5 * gain
